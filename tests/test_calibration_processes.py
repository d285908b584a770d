"""Calibration by two processes, as `torchrun --nproc-per-node 2` starts them, against one."""

import json
from dataclasses import replace

import pytest

import calibration_runs
import two_processes
from offramp.evaluation import read_records

JOBS = calibration_runs.JOBS


UNTIMED = {"seconds": 0, "prompt_seconds": 0, "round": 0}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    codes, errors = two_processes.run(calibration_runs.__file__, folder)
    assert codes == [0, 0], errors
    return folder


def records(folder):
    found = {path.relative_to(folder): read_records(path) for path in folder.rglob("*.jsonl")}
    return {name: (header, [replace(r, **UNTIMED) for r in some]) for name, (header, some) in found.items()}


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_give_the_certificate_of_one(two, tmp_path, job):
    one = calibration_runs.run(tmp_path, **JOBS[job])
    assert one.certificate.certified == (job == "path")  # thresholds of a few tokens are not worth much
    for file in ("policy.json", "result.json", "config.json", *(["thresholds.json"] if job == "per-layer" else [])):
        made, expected = (json.loads((where / file).read_text()) for where in (two / job, tmp_path))
        assert {**made, "seconds": None} == {**expected, "seconds": None}
    assert records(two / job) == records(tmp_path)
    assert not list((two / job).rglob("*-of-2*"))


def test_one_process_goes_on_where_two_were_and_finds_everything_done(two, monkeypatch):
    monkeypatch.setattr("offramp.evaluation.records._generate", None)  # nothing is decoded any more
    again = calibration_runs.run(two / "path", **JOBS["path"])
    assert again.certificate.to_dict() == json.loads((two / "path" / "policy.json").read_text())["certificate"]

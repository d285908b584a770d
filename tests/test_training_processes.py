"""Training by two processes on the loopback device, as `torchrun --nproc-per-node 2` starts them, against one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import training_runs
import two_processes
from offramp.runs.folder import RunFolder

FILES = {"config.json", "metrics.jsonl", "checkpoint.safetensors", "exits"}


def start(folder, *jobs):
    return two_processes.run(training_runs.__file__, folder, *jobs)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs of two processes; the last one is interrupted in both, and then continued."""
    folder = tmp_path_factory.mktemp("two")
    codes, errors = start(folder, "answers", "exits", "all", "classifiers", "mixed", "again:", "again")
    assert codes == [0, 0], errors
    return folder


def rows(folder):
    return [{**row, "tokens_per_second": 0} for row in RunFolder(folder).rows()]


@pytest.mark.parametrize("job", ["exits", "all", "classifiers", "mixed"])
def test_two_processes_train_what_one_does(two, tmp_path, job):
    training_runs.run(tmp_path, **training_runs.JOBS[job])
    coarse = (
        job == "mixed"
    )  # sums of bfloat16, which two processes round elsewhere: 2^-8, and a step where Adam divides
    close = {"rtol": 2e-2, "atol": 8e-3} if coarse else {"rtol": 2e-3, "atol": 2e-5}
    assert {path.name for path in (two / job).iterdir()} == {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} - {".lock", "model"} == FILES
    configs = [json.loads((folder / "config.json").read_text()) for folder in (two / job, tmp_path)]
    assert all(config.pop("about") for config in configs)  # threads and the like: nobody compares them
    assert all(config.pop("digest") for config in configs)  # of these, too
    assert configs[0] == configs[1]
    for file in ("exits/exits", "model/model", "checkpoint"):
        if (tmp_path / f"{file}.safetensors").exists():
            got, expected = (load_file(folder / f"{file}.safetensors") for folder in (two / job, tmp_path))
            assert got.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(got[name], expected[name], **close, msg=name)
    assert len(rows(two / job)) == len(rows(tmp_path))
    for got, expected in zip(rows(two / job), rows(tmp_path), strict=True):
        for name, value in expected.items():
            share = name in ("agreement", "full_accuracy")  # of 88 positions, some of which are all but a draw
            near = {"rel": 1e-2 if coarse else 1e-3, "abs": 0.05 if coarse and share else None}
            assert got[name] == (value if name == "kind" else pytest.approx(value, **near)), name


def test_accelerate_launches_one_process_that_trains_as_without_it(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*launch, training_runs.__file__, str(tmp_path / "launched"), "exits"], env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    training_runs.run(tmp_path / "alone", **training_runs.JOBS["exits"])
    got, expected = (load_file(tmp_path / name / "exits" / "exits.safetensors") for name in ("launched/exits", "alone"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_two_interrupted_processes_go_on(two):
    ends = [load_file(two / job / "model" / "model.safetensors") for job in ("all", "again")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert rows(two / "all") == rows(two / "again")


def test_one_of_two_processes_answers(two, tmp_path):
    made = training_runs.answers(tmp_path)
    assert (two / "answers" / "answers.jsonl").read_bytes() == (tmp_path / "answers.jsonl").read_bytes()
    assert len(made) == 3

"""`offramp serve` as a process, with a tiny model: its notes, one request, and its end."""

import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from offramp import ExitPolicy, cli
from serving import bound, model, posted, raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    lm = model()
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    ExitPolicy(threshold=0.5, min_layer=2).save(folder / "policy.json")
    return folder


def test_a_server_begins_answers_and_ends_with_status_0(folder):
    process = subprocess.Popen(
        [
            sys.executable, "-m", "offramp", "serve", str(folder), "--policy", str(folder / "policy.json"), "--port",
            "0", "--name", "tiny", "--engine", "torch", "--context", "100",
        ],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = ""
    try:
        while not (line := process.stderr.readline()).startswith("serving"):
            assert line, said
            said += line
        address = line.split()[-1]
        body = raw(address, posted("/v1/completions", {"prompt": "ab", "max_tokens": 3})).partition(b"\r\n\r\n")[2]
        assert len(json.loads(body)["offramp"]["exit_layers"][0]) <= 3
    finally:
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=120)[1]
    assert (process.returncode, rest) == (0, "")
    assert "No certificate is on file" in said


def failed(*arguments):
    """What the command says when it refuses, on one line."""
    said = CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])
    assert said.exit_code != 0
    return str(said.exception) if said.exit_code == 1 else said.output


def test_a_port_that_is_taken_is_said_before_the_model_is_read(folder):
    with bound("127.0.0.1", 0) as taken:
        assert "choose another --port" in failed("no-such-model", "--port", taken.getsockname()[1])


def test_wrong_options_are_refused(folder):
    assert "choose say or full" in failed(folder, "--on-drift", "stop")
    assert "encoder-decoder" in failed(_encoder_decoder(folder), "--port", "0")


def _encoder_decoder(folder):
    model("t5").model.save_pretrained(folder / "t5")
    model().tokenizer.save_pretrained(folder / "t5")
    return folder / "t5"


def test_without_the_extra_the_line_to_install_it_is_told(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "sse_starlette", None)
    assert "pip install 'offramp[serve]'" in failed(folder)


def test_without_ray_serve_the_line_to_install_it_is_told(monkeypatch):
    from offramp.serve.listen import deployment

    monkeypatch.setitem(sys.modules, "ray.serve", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'offramp\[serve-ray\]'"):
        deployment(lambda: None)

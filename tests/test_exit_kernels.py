"""The kernels of the CUDA engine's exit tests: run in Triton's interpreter, and compiled for GPUs, without one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from offramp.cuda.exit_test import ExitTests
from offramp.cuda.model import CudaModel
from offramp.families import SplitModel
from tiny import tiny

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is missing: pip install triton (1 GB when unpacked)"
)


def test_without_triton_torch_makes_the_tests(monkeypatch, caplog):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = CudaModel(tiny("llama"))
    assert (model.tests, model.fused) == (None, False)
    assert "exit tests run on torch, not in fused kernels: Triton is missing" in caplog.text


def test_where_triton_fails_torch_makes_the_tests(monkeypatch, caplog):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "offramp.cuda.kernels", type("Broken", (), {}))
    assert ExitTests.of(SplitModel(tiny("llama"))) is None
    assert "Triton failed, AttributeError: " in caplog.text


def test_on_a_cpu_nothing_is_said(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ExitTests.of(SplitModel(tiny("llama"))) is None
    assert caplog.text == ""


@pytest.mark.slow
@needs_triton
def test_kernels_are_right_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "OFFRAMP_TEST"))}
    env["TRITON_INTERPRET"] = "1"
    done = subprocess.run([*command, HERE / "exit_kernels.py"], capture_output=True, text=True, env=env, timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu(capability):
    """An A100's and an H100's machine code, by the assembler that Triton brings; nothing runs."""
    done = subprocess.run(
        [sys.executable, HERE / "compiled_kernels.py", str(capability)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.split() == ["linear", "scores", "scores", "scores", "merge"]

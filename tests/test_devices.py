"""Where models run: a GPU if there is one, what is named, and one rule for all commands."""

import re
from pathlib import Path

import pytest
import torch

import offramp
from offramp.hub.pretrained import named_device, process_device


def machine(monkeypatch, kind, count=1):
    """A machine with so many accelerators of a kind."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


@pytest.mark.parametrize(("kind", "chosen"), [(None, "cpu"), ("cuda", "cuda"), ("mps", "cpu"), ("xpu", "cpu")])
def test_a_cuda_gpu_is_used_when_there_is_one(monkeypatch, kind, chosen):
    machine(monkeypatch, kind)
    assert named_device().type == chosen
    assert named_device("cpu").type == "cpu"


def test_other_accelerators_are_used_when_named(monkeypatch):
    machine(monkeypatch, "mps")
    assert named_device("mps").type == "mps"


@pytest.mark.parametrize("name", ["cuda:2", "mps", "meta", "cupboard", -1, "cuda:x"])
def test_devices_that_are_not_here_are_refused_with_those_that_are(monkeypatch, name):
    machine(monkeypatch, "cuda", count=2)
    assert named_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"is not available on this machine; choose one of cpu, cuda$"):
        named_device(name)


def test_a_process_alone_runs_where_it_is_told():
    state, device = process_device("cpu")
    assert (state.num_processes, device.type) == (1, "cpu")


def test_no_command_has_a_rule_of_its_own():
    """Everywhere else a device is taken as it comes."""
    own = re.compile(r"cuda\.is_available|device or ['\"]cpu|device is None or|accelerator\.")
    source = Path(offramp.__file__).parent
    found = [
        f"{path.relative_to(source)}: {line.strip()}"
        for path in source.rglob("*.py")
        if path.name != "pretrained.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if own.search(line)
    ]
    assert not found

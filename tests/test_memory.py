"""How much memory work took, on a CPU and as CUDA tells it."""

import pytest
import torch

from offramp.runs.machine import is_shortage, peak, peak_name, release

CPU = torch.device("cpu")


def test_a_process_has_held_what_it_made():
    before = peak(CPU)
    torch.ones(before // 4 + 50_000_000)  # four bytes each: more than ever before
    assert peak(CPU) - before > 100_000_000
    assert peak_name(CPU) == "peak memory of the process"


def test_on_cuda_tensors_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if device.type == "cuda" else 0)
    assert peak(torch.device("cuda")) == 7
    assert peak_name(torch.device("cuda")) == "peak memory of tensors on the device"


def test_too_little_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_shortage(caught.value)
    assert is_shortage(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_shortage(MemoryError())
    assert not is_shortage(RuntimeError("shapes do not fit"))
    release(CPU)

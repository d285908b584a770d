"""How much memory work took, on a CPU and as CUDA tells it."""

import ctypes
import platform
import subprocess
import sys

import pytest
import torch

from offramp.runs.machine import is_shortage, memory_kept, peak, peak_name, release

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


KEPT = """
import resource
from pathlib import Path

import torch

from offramp.runs.machine import memory_kept


def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(1 << 24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


try:
    with memory_kept(torch.device("cpu")):
        faults(4)
        within, held = faults(8), resident()
        raise KeyError
except KeyError:
    print(within, held, resident(), faults(8))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_memory_of_large_tensors_is_kept_within_and_given_back_behind_even_an_error():
    # in a process of its own: where an allocation has failed before, glibc goes on with memory that it cannot keep
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    within, held, left, behind = map(int, done.stdout.split())
    assert within < 100
    assert held - left > 50_000_000
    assert behind >= 8 * 32  # pages of 2 MiB at most


def test_other_devices_and_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # without mallopt
    with memory_kept(CPU):
        torch.ones(1)
    monkeypatch.setattr(ctypes, "CDLL", None)
    with memory_kept(torch.device("cuda")):
        torch.ones(1)

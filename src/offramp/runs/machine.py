"""What a measurement or a training ran on, for its record, and how much memory it took at most.

Memory is that of tensors on a CUDA device, elsewhere all that this process ever held.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
import transformers


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, as JSON values: device, vector instructions, cores, threads in use, packages."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "offramp": version("offramp"),
    }


def forget_peak(device: torch.device) -> None:
    """Begin to measure anew; what a process held cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Bytes that were held at most.

    Args:
        device: Where the work was done.

    Returns:
        On CUDA those of all tensors since `forget_peak`, without other programs and freed blocks that PyTorch keeps;
        elsewhere the process's largest resident size since it began. None: this system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_name(device: torch.device) -> str:
    """What `peak` measures, in words."""
    return "peak memory of tensors on the device" if device.type == "cuda" else "peak memory of the process"


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory was too little, on whichever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def release(device: torch.device) -> None:
    """Give back what failed work held, once nothing refers to it any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- memory that stays

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # parameters of glibc's mallopt(3)
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 1 << 26}
_USUAL = {_MMAP_MAX: 1 << 16, _TRIM_THRESHOLD: 1 << 26, _TOP_PAD: 1 << 17, _MMAP_THRESHOLD: 1 << 25}


@contextlib.contextmanager
def memory_kept(device: torch.device) -> Iterator[None]:
    """Within, a CPU's freed tensors leave their memory to the next ones; afterwards the system gets it back.

    glibc takes each tensor of 32 MiB or more from the system anew, which fills it with zeros a page at a time: a fifth
    and more of a training step of long windows. Elsewhere, in other threads than the first and on other devices little
    changes. glibc does not tell what was set before: afterwards it has the values to which it moves by itself in such a
    process.
    """
    library = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if library is None or not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):  # musl has neither
        yield
        return
    for name, value in _KEEP.items():
        library.mallopt(name, value)
    try:
        yield
    finally:
        for name, value in _USUAL.items():
            library.mallopt(name, value)
        library.malloc_trim(ctypes.c_size_t(0))

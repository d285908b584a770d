"""How fast a plain read is: it bounds every engine that reads all weights for each token."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from offramp.native.kernels import library

_PASSES = 3
_WORD = 8  # bytes


def read_probe(size: int) -> Callable[[], float]:
    """A function that reads a buffer several times, with as many threads as torch has.

    Args:
        size: Size of the buffer in bytes; rounded up to whole words.

    Returns:
        The function; it returns bytes per second.

    Raises:
        NativeError: The kernels, of which the read is one, cannot be had.
    """
    kernels, words = library(), -(-size // _WORD)
    buffer = torch.ones(words, dtype=torch.int64)  # written, so that it has pages of its own

    def read() -> float:
        began = time.perf_counter()
        for _ in range(_PASSES):
            kernels.offramp_read(buffer.data_ptr(), words, torch.get_num_threads())
        return _PASSES * _WORD * words / (time.perf_counter() - began)

    return read

"""Who has the processor while the kernels work: they do, and torch keeps to one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Threads:
    """The kernels' threads: those that torch has, or had when it was kept to one."""

    def __init__(self) -> None:
        self._before: int | None = None

    @property
    def count(self) -> int:
        """How many."""
        return self._before or torch.get_num_threads()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep torch to one thread in the block, while the kernels have as many as it had.

        A thread that helped torch with one operation waits for the next one by spinning, and takes a core from the
        kernels meanwhile: on two cores, decoding was slower by a quarter to a half.
        """
        if self._before is not None:
            yield
            return
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._before)
            self._before = None

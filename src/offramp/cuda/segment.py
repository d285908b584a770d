"""The blocks between two layers, as one launch: a CUDA graph on a GPU, the same call again elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3  # runs before a capture: libraries choose and load their kernels in the first ones


class Segment:
    """Work that reads and writes buffers that stay where they are.

    Args:
        body: The work; what it returns lies at the same place after every launch. It may be run several times in a row
            on the same input, and must then give the same.
        device: Where it runs.
        pool: Memory that graphs which never run at the same time share, from `torch.cuda.graph_pool_handle`.
    """

    def __init__(self, body: Callable[[], Tensor], device: torch.device, pool: Any = None) -> None:
        self._body, self._device = body, device
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            return
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    body()
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._out = body()

    def launch(self) -> Tensor:
        """Run it; what comes back is overwritten by the next launch of any segment of the pool."""
        if self._graph is None:
            return self._body()
        with torch.cuda.device(self._device):  # whose stream it is launched on
            self._graph.replay()
        return self._out

"""The blocks between two layers as one launch, a CUDA graph on a GPU, and launches ahead of being asked for.

Segments are launched before the answer of the test in front of them is read, and not used if the token left.
Without this a GPU does nothing while an answer travels to the host and Python decides. A segment that was launched for
nothing takes its time on the device all the same, so that it is done only where it is likely to be used: where the
token before went on, in all rows. Then, too, no earlier token's keys and values have yet to be filled in there. If
others turn out to be written in between, what ran ahead has not seen them, and is not used.

What it wrote for tokens that left is written anew, by `fill` or by a later run, before any query sees that slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.families.state import Rows, State

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


@dataclass(eq=False)
class Launch:
    """A segment that ran.

    Attributes:
        stop: Up to which layer.
        rows: Those that it concerned, state by state, and `count`, how many.
        out: The states of all rows of the batch, [B, 1, D], until the next launch.
        ahead: The segment behind it, if that was launched before it was asked for.
    """

    stop: int
    rows: list[Rows]
    count: int
    out: Tensor
    ahead: Launch | None = None


class Ahead:
    """What ran last in a `Memory`, and what is likely to be asked for next.

    Attributes:
        last: The last launch; None if something else ran since.
        launched: How many segments were launched before they were asked for.
        used: How many of these then were asked for.
    """

    def __init__(self) -> None:
        self.last: Launch | None = None
        self.launched = self.used = 0
        self._follows: dict[int, int] = {}  # by layer, up to where the last token went on from there, in all rows

    def begin(self) -> None:
        """Know nothing: another batch."""
        self.last = None
        self._follows.clear()

    def spoil(self) -> None:
        """Keys and values were written: what was launched ahead has not seen them."""
        if self.last is not None:
            self.last.ahead = None

    def next(self) -> tuple[int, int] | None:
        """The segment that is worth launching now, as its first and its last layer; None: there is none."""
        last = self.last
        if last is None or last.ahead is not None or last.stop not in self._follows:
            return None
        return last.stop, self._follows[last.stop]

    def take(self, states: list[State], stop: int) -> Launch | None:
        """Note that states go on up to `stop`.

        Returns:
            What ran ahead of being asked for, if it is just this.
        """
        last = self.last
        if last is None:
            return None
        here = all(state.origin is last for state in states)
        if here and sum(len(state.hidden) for state in states) == last.count:
            self._follows[last.stop] = stop
        else:
            self._follows.pop(last.stop, None)
        if not here or last.ahead is None or last.ahead.stop != stop:
            return None
        self.used += 1
        return last.ahead

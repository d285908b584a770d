"""Where a batch stands between blocks: its states, its slots, what is memoised for them, and the caches they lie in.

`transformers` caches concatenate on every token and assume that all layers have seen the same positions. Early exit
needs neither: each `LayerCache` owns a buffer that grows by doubling, is written in place, and may lag behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_AHEAD = 64  # slots whose positions are worked out in advance: one token at a time, it would cost more than the rest
BLOCK = 16
"""Tokens whose keys and values are copied together; every cache has room for a multiple of it."""
Rows = slice | Tensor
"""Rows of a batch: a slice where they lie together (a view), else a LongTensor of row numbers (a copy)."""


@dataclass
class Context:
    """What one batch has computed so far; every state of the batch points to it.

    Attributes:
        cache: Self-attention keys and values: a `transformers` cache with one `LayerCache` per block.
        past: What the blocks receive: `cache`, or a pair of self- and cross-attention caches.
        positions: Position of every slot handed out so far, and of some to come, [B, T]; padding has position 0.
        padding: 1 for tokens, 0 for padding, [B, T]; None without padding.
        memory: Encoder output [B, X, D], or None.
        memory_mask: 1 for tokens of the encoder's input, [B, X]; None without padding.
        crossed: Blocks whose cross-attention keys and values are computed, in the order of their first visit.
        slots: Number of slots handed out.
    """

    cache: Any
    past: Any
    positions: Tensor
    padding: Tensor | None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    crossed: list[int] = field(default_factory=list)
    slots: int = 0

    def reach(self, slots: int) -> None:
        """Hand out slots up to `slots`, at every row's next positions."""
        self.slots = max(self.slots, slots)
        if (lacking := slots - self.positions.shape[1]) <= 0:
            return
        lacking += _AHEAD
        after = torch.arange(1, lacking + 1, device=self.positions.device) + self.positions[:, -1:]
        self.positions = torch.cat([self.positions, after], dim=1)
        if self.padding is not None:
            self.padding = F.pad(self.padding, (0, lacking), value=True)


@dataclass
class Frame:
    """Where some states sit: `queries` slots from `start` on, for `rows` of the batch. Memoises masks and rotations."""

    rows: Rows
    start: int
    queries: int
    memo: dict[tuple[str, str], Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """Residual states `hidden` [A, n, D] after `depth` layers, for the rows and slots of `frame`.

    `branch` is what the exit's own blocks make of them, if there is an exit with blocks here and they have run.
    `origin` is for the engine that ran them: what made them, all or some of which they are.
    """

    context: Context
    frame: Frame
    hidden: Tensor
    depth: int
    branch: Tensor | None = None
    origin: Any = None

    @property
    def read(self) -> Tensor:
        """What is read out here, [A, n, D]."""
        return self.hidden if self.branch is None else self.branch

    def select(self, keep: Any, rows: Rows) -> State:
        """The states `keep` (an index into the first axis), which are those of batch rows `rows`."""
        branch = None if self.branch is None else self.branch[keep]
        frame = Frame(rows, self.frame.start, self.frame.queries)
        return replace(self, hidden=self.hidden[keep], frame=frame, branch=branch)


@dataclass(frozen=True)
class Skipped:
    """N tokens that skip a block: frozen states `hidden` [N, D] at `rows` [N] and `slots` [N], all below `stop`."""

    hidden: Tensor
    rows: Tensor
    slots: Tensor
    stop: int
    memo: dict[str, Any] = field(default_factory=dict)


def as_rows(rows: list[int], device: torch.device) -> Rows:
    """The cheapest selection of ascending row numbers: a slice if they are consecutive."""
    if rows and rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, dtype=torch.long, device=device)


class LayerCache:
    """Keys and values [B, H, T, D_head] of one attention layer; speaks the protocol of a `transformers` cache layer.

    `length` slots are filled, and the next `update` appends behind them for the rows in `rows`; both are set by whoever
    runs the layer. With a sliding `window`, all slots are kept (so that any number can be taken back), but only those
    that the window can reach are handed to attention.
    """

    is_compileable = False
    is_croppable = True
    is_initialized = True

    def __init__(self, batch: int, window: int | None = None) -> None:
        self.batch, self.window = batch, window
        self.is_sliding = window is not None
        self.rows: Rows = slice(0, batch)
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """Keys of the selected rows, [A, H, T, D_head]."""
        assert self._keys is not None
        return self._keys[self.rows, :, : self.length]

    @property
    def values(self) -> Tensor:
        """Values of the selected rows, [A, H, T, D_head]."""
        assert self._values is not None
        return self._values[self.rows, :, : self.length]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [A, H, n, D_head] of the selected rows; return what their queries may attend to."""
        first = self.get_mask_sizes(keys.shape[2])[1]
        start, stop = self.length, self.length + keys.shape[2]
        into_keys, into_values = self._reserve(stop, keys)
        into_keys[self.rows, :, start:stop] = keys
        into_values[self.rows, :, start:stop] = values
        self.length = stop
        return into_keys[self.rows, :, first:stop], into_values[self.rows, :, first:stop]

    def write(self, rows: Tensor, slots: Tensor, keys: Tensor, values: Tensor, *, stop: int) -> None:
        """Put keys and values [N, H, D_head] at the N places (`rows`, `slots`), all below slot `stop`."""
        into_keys, into_values = self._reserve(stop, keys)
        into_keys[rows, :, slots] = keys.to(into_keys.dtype)  # autocast: keys that were rotated are float32, values not
        into_values[rows, :, slots] = values.to(into_values.dtype)

    def blocks(self, row: int, begin: int, end: int) -> list[Tensor]:
        """Keys and values of slots `begin` to `end` of a row, [H, n, BLOCK, D_head] each: views, with room made."""
        assert self._keys is not None
        own = self._reserve(end, self._keys)
        return [buffer[row, :, begin:end].unflatten(1, (-1, BLOCK)) for buffer in own]  # type: ignore[no-untyped-call]

    def _reserve(self, slots: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers with room for `slots` slots, doubled when full."""
        have = 0 if self._keys is None else self._keys.shape[2]
        if self._keys is None or self._values is None or have < slots:
            shape = (self.batch, like.shape[1], max(2 * have, -(-slots // 64) * 64), like.shape[-1])
            old = (self._keys, self._values)
            self._keys, self._values = like.new_zeros(shape), like.new_zeros(shape)
            if old[0] is not None and old[1] is not None:
                self._keys[:, :, :have] = old[0]
                self._values[:, :, :have] = old[1]
        return self._keys, self._values

    def get_seq_length(self) -> int:
        """Number of filled slots."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next `query_length` queries see, and the slot of the first of them."""
        first = 0 if self.window is None else max(0, self.length - self.window + 1)
        return self.length + query_length - first, first

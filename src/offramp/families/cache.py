"""Keys and values of one layer, kept so that layers may run at different times and for different rows.

`transformers` caches concatenate on every token and assume that all layers have seen the same positions. Early exit
needs neither: each layer here owns a buffer that grows by doubling, is written in place, and may lag behind the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 16
"""Tokens whose keys and values are copied together; every cache has room for a multiple of it."""

Rows = slice | Tensor
"""Rows of a batch: a slice where they lie together (a view), else a LongTensor of row numbers (a copy)."""


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

"""Keys and values of all layers as the kernels want them: every row of a batch fills its slots from 0 on.

Keys of `BLOCK` slots lie side by side. Padding takes no room: a token's slot is its position, so that a row in a batch
is computed exactly as it is alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.families.state import BLOCK


class NativeCache:
    """Buffers that grow by doubling, for all layers at once.

    Args:
        batch: Rows B.
        heads: Heads of keys and values, by layer.
        width: Width of a head, by layer.
        dtype: Number format, float32 or bfloat16.
    """

    def __init__(self, batch: int, heads: list[int], width: list[int], dtype: torch.dtype) -> None:
        self.batch, self.dtype = batch, dtype
        self.capacity = 0
        self.keys = [torch.empty(batch, h, 0, w, BLOCK, dtype=dtype) for h, w in zip(heads, width, strict=True)]
        self.values = [torch.empty(batch, h, 0, w, dtype=dtype) for h, w in zip(heads, width, strict=True)]

    def reserve(self, slots: int) -> None:
        """Make room for so many slots in every row."""
        if slots <= self.capacity:
            return
        capacity = max(2 * self.capacity, -(-slots // 64) * 64)
        self.keys = [_longer(keys, capacity // BLOCK) for keys in self.keys]
        self.values = [_longer(values, capacity) for values in self.values]
        self.capacity = capacity
        self._tables = [_addresses(buffers) for buffers in (self.keys, self.values)]

    def blocks(self, row: int, layers: Sequence[int], begin: int, end: int) -> list[Tensor]:
        """As `SplitModel.blocks_of`: keys [H, n, D_head, BLOCK] and values [H, n, BLOCK, D_head] of each layer."""
        self.reserve(end)
        keys = (self.keys[layer][row, :, begin // BLOCK : end // BLOCK] for layer in layers)
        values = (self.values[layer][row, :, begin:end].unflatten(1, (-1, BLOCK)) for layer in layers)  # type: ignore[no-untyped-call]
        return [*keys, *values]

    @property
    def addresses(self) -> tuple[int, int]:
        """Where the tables of all layers' keys and values lie."""
        keys, values = self._tables
        return ctypes.addressof(keys), ctypes.addressof(values)


def _addresses(buffers: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(buffers))(*(buffer.data_ptr() for buffer in buffers))


def _longer(buffer: Tensor, length: int) -> Tensor:
    """A copy with more room along the third axis, zeros behind what there was."""
    made = buffer.new_zeros(*buffer.shape[:2], length, *buffer.shape[3:])
    made[:, :, : buffer.shape[2]] = buffer
    return made

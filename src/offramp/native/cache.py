"""Keys and values of all layers as the kernels want them, and where tokens are in them: rows fill slots from 0 on.

Keys of `BLOCK` slots lie side by side. Padding takes no room: a token's slot is its position, so that a row in a batch
is computed exactly as it is alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.families.state import BLOCK, Context, Frame


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


# ---------------------------------------------------------------- where tokens are, as the kernels are told


@dataclass
class Places:
    """Where M tokens are cached, and where they stand in their texts.

    Attributes:
        batch: The cache row of each, [M].
        slots: Its slot there, [M].
        positions: Its position, [M].
        real: Which of a frame's A * n tokens these are; None: all of them, there is no padding.
        reach: One more than the largest position.
    """

    batch: Tensor
    slots: Tensor
    positions: Tensor
    real: Tensor | None = None
    reach: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.batch, self.slots, self.positions = (t.contiguous() for t in (self.batch, self.slots, self.positions))
        self.reach = int(self.positions.max()) + 1 if len(self.positions) else 0

    @classmethod
    def joined(cls, places: list[Places]) -> Places:
        """Those of several frames, one after another."""
        if len(places) == 1:
            return places[0]
        return cls(*(torch.cat([getattr(p, name) for p in places]) for name in ("batch", "slots", "positions")))


@dataclass
class Memory:
    """Keys and values of the encoder's output, where they stand, and how many each row has."""

    cache: NativeCache
    places: Places
    lengths: Tensor


def places_of(frame: Frame, context: Context) -> Places:
    """Where a frame's tokens are; found once per frame."""
    if ("native", "") not in frame.memo:
        span = slice(frame.start, frame.start + frame.queries)
        positions = context.positions[frame.rows, span].tolist()
        rows = torch.arange(len(context.positions))[frame.rows].tolist()
        slots: list[Sequence[int]] = [range(span.start, span.stop)] * len(rows)
        real = None
        if context.padding is not None:
            slots = own_slots(context)[frame.rows, span].tolist()
            kept = context.padding[frame.rows, span].flatten()
            real = None if bool(kept.all()) else kept.nonzero()[:, 0]
        # Lists, since a token's step is then five calls of torch instead of twenty
        table = torch.tensor([
            [row for row in rows for _ in range(frame.queries)],
            *([value for line in lines for value in line] for lines in (slots, positions)),
        ])  # fmt: skip
        batch, own, stand = table if real is None else table[:, real]
        frame.memo["native", ""] = Places(batch, own, stand, real)
    found: Places = frame.memo["native", ""]
    return found


def own_slots(context: Context) -> Tensor:
    """The slot of each token if padding takes none, [B, T]: a row in a batch is then cached as it is alone."""
    if context.padding is None:
        return torch.arange(context.positions.shape[1]).expand_as(context.positions)
    return context.padding.long().cumsum(-1) - 1

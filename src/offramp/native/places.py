"""Where tokens are cached, and where they stand in their texts, as the kernels are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.families.state import Context, Frame
from offramp.native.cache import NativeCache


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

"""A drafter's blocks on whole texts, as often as it drafts tokens in a row, each pass attending to what decoding would.

At a position p, pass s (from 0) stands for the draft that is s tokens behind the last one the full model has been at:
keys and values up to p - s are those of pass 0, whose inputs were the full model's, and the others those of the passes
in between, one position of each (HASS, Zhang et al. 2024, arXiv 2408.15766, section 3.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.core.policy import DRAFTER
from offramp.families.state import Frame, LayerCache, State

if TYPE_CHECKING:
    from offramp.families import SplitModel


class _Joined(LayerCache):
    """Keys and values that gradients go through: nothing is written in place."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, n, D_head] of all rows; return all there are."""
        if self._keys is not None and self._values is not None:
            keys, values = torch.cat([self._keys, keys], dim=2), torch.cat([self._values, values], dim=2)
        self._keys, self._values = keys, values
        return keys, values


class Unrolled:
    """The passes over one batch of texts; begins with pass 0, over all positions.

    Args:
        split: The model, with a drafter.
        mixed: What goes into its blocks, [B, T, D].
        places: The positions that later passes go over, ascending by one in each row, [B, n].

    Attributes:
        first: What the blocks make of `mixed`, [B, T, D].
    """

    def __init__(self, split: SplitModel, mixed: Tensor, places: Tensor) -> None:
        batch, length = mixed.shape[:2]
        self.split, self.places, self.length, self.passes = split, places, length, 0
        self.context = split._new_context(batch, None, None)
        self.context.positions = torch.arange(length, device=mixed.device).expand(batch, length)
        self.context.slots = length
        for index in split.branches[DRAFTER]:
            self.context.cache.layers[index] = _Joined(batch, split.windows[index])
        self.first = self._run(mixed, Frame(slice(0, batch), 0, length))

    def again(self, mixed: Tensor) -> Tensor:
        """The next pass, over `places` only, [B, n, D]."""
        self.passes += 1
        batch, count = mixed.shape[:2]
        frame = Frame(slice(0, batch), self.length + (self.passes - 1) * count, count)
        frame.memo["positions", ""] = self.places
        for index in self.split.branches[DRAFTER]:
            frame.memo["mask", self.split.types[index]] = self._mask(mixed, self.split.windows[index])
        return self._run(mixed, frame)

    def _run(self, mixed: Tensor, frame: Frame) -> Tensor:
        (state,) = self.split.branched([State(self.context, frame, mixed, DRAFTER)])
        return state.read

    def _mask(self, like: Tensor, window: int | None) -> Tensor:
        """What a pass may attend to, [B, 1, n, T + passes · n]: as the family's attention takes it."""
        far = torch.arange(self.length, device=like.device)
        last = self.places[..., None] - self.passes
        allowed = far <= last if window is None else (far <= last) & (far > self.places[..., None] - window)
        own = torch.arange(self.places.shape[1], device=like.device)
        apart = own[:, None] - own - self.passes  # how far a key of the first of the later passes is from its place
        near = [(apart + number == 0).expand(len(like), -1, -1) for number in range(1, self.passes + 1)]
        mask = torch.cat([allowed, *near], dim=-1)[:, None]
        if self.split.config._attn_implementation != "eager":
            return mask
        return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, -1e9)

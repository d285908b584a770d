"""What decoders hear of their encoders, at fixed addresses: keys and values of cross-attention, and which are padding.

They are as many as the encoder's input is long, which changes from batch to batch; segments read whole buffers, whose
rest is masked. Where an input does not fit, the buffers double, and all segments are captured anew.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from offramp.families.state import LayerCache

_LEAST = 128  # tokens of the encoder's input


class HeardLayer(LayerCache):
    """Cross-attention of one layer: buffers [B, H, capacity, D_head], of which segments get all.

    Args:
        heard: That it belongs to.
        batch: B.
    """

    def __init__(self, heard: Heard, batch: int) -> None:
        super().__init__(batch)
        self._heard = weakref.proxy(heard)

    @property
    def keys(self) -> Tensor:
        """As `LayerCache.keys`; in a segment the whole buffer."""
        return self._keys if self._heard.in_segment and self._keys is not None else super().keys

    @property
    def values(self) -> Tensor:
        """As `LayerCache.values`; in a segment the whole buffer."""
        return self._values if self._heard.in_segment and self._values is not None else super().values

    def _reserve(self, slots: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            shape = (self.batch, like.shape[1], self._heard.capacity, like.shape[-1])
            with torch.inference_mode(False):  # they outlive the generation, whichever mode it is in
                options: Any = {"dtype": like.dtype, "device": like.device}
                self._keys, self._values = torch.zeros(shape, **options), torch.zeros(shape, **options)
        return self._keys, self._values

    def clear(self, *, forget: bool) -> None:
        """Have nothing heard; `forget` the buffers, too, which then come back in another size."""
        self.length, self.rows = 0, slice(0, self.batch)
        if forget:
            self._keys = self._values = None
        elif self._keys is not None and self._values is not None:
            self._keys.zero_()
            self._values.zero_()


class Heard:
    """Cross-attention of one batch at a time, beside its `Memory`.

    Args:
        cache: Of self-attention, with as many layers.
        states: Like those that enter a segment, [B, 1, D].

    Attributes:
        in_segment: Whether blocks are to get whole buffers.
        past: What blocks receive, both caches.
        mask: What is added to scores of cross-attention, [B, 1, 1, capacity]: 0 for tokens of the input, else the
            least number.
    """

    def __init__(self, cache: Cache, states: Tensor) -> None:
        self.capacity, self.in_segment = _LEAST, False
        self.layers = [HeardLayer(self, len(states)) for _ in cache.layers]
        self.past = EncoderDecoderCache(cache, Cache(layers=self.layers))
        self.mask = self._new_mask(states)

    def _new_mask(self, like: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return like.new_zeros(len(like), 1, 1, self.capacity)

    def listen(self, length: int, tokens: Tensor | None) -> bool:
        """Be ready for another input.

        Args:
            length: Of the input, X.
            tokens: 1 for its tokens, 0 for padding, [B, X]; None without padding.

        Returns:
            Whether buffers have moved, so that nothing captured before is valid.
        """
        moves = length > self.capacity
        while self.capacity < length:
            self.capacity *= 2
        for layer in self.layers:
            layer.clear(forget=moves)
        if moves:
            self.mask = self._new_mask(self.mask)
        least = torch.finfo(self.mask.dtype).min
        self.mask.fill_(least)
        self.mask[..., :length] = 0 if tokens is None else (~tokens.bool())[:, None, None] * least
        return moves

"""Keys and values at fixed addresses, which graphs may remember, and the buffers that tell a segment where rows stand.

Inside a segment nothing may depend on a number that only the device knows: where keys go and what queries see is then
read from buffers. Outside, a layer is a `LayerCache` like any other, so that prompts and fills write to the same place.

What decoders hear of their encoders, keys and values of cross-attention, are as many as the encoder's input is long,
which changes from batch to batch; segments read whole buffers, whose rest is masked. Where an input does not fit, the
buffers double, and all segments are captured anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from offramp.cuda.segment import Ahead
from offramp.families.state import Context, LayerCache

_LEAST = 128  # slots of a row; beyond them the capacity doubles, and all graphs are captured anew


class FixedLayer(LayerCache):
    """A layer whose buffers [B, H, capacity, D_head] stay where they are, also when a batch is forgotten."""

    def _buffers(self, capacity: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            shape = (self.batch, like.shape[1], capacity, like.shape[-1])
            with torch.inference_mode(False):  # they outlive the generation, whichever mode it is in
                options: Any = {"dtype": like.dtype, "device": like.device}
                self._keys, self._values = torch.zeros(shape, **options), torch.zeros(shape, **options)
        return self._keys, self._values

    def clear(self) -> None:
        """Forget what was written: a NaN would get past any mask."""
        self.length, self.rows = 0, slice(0, self.batch)
        if self._keys is not None and self._values is not None:
            self._keys.zero_()
            self._values.zero_()


# ---------------------------------------------------------------- what is heard of an encoder


class HeardLayer(FixedLayer):
    """Cross-attention of one layer, of which segments get the whole buffers.

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
        return self._buffers(self._heard.capacity, like)

    def drop(self) -> None:
        """Have no buffers: they come back in another size."""
        self._keys = self._values = None


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
            if moves:
                layer.drop()
            layer.clear()
        if moves:
            self.mask = self._new_mask(self.mask)
        least = torch.finfo(self.mask.dtype).min
        self.mask.fill_(least)
        self.mask[..., :length] = 0 if tokens is None else (~tokens.bool())[:, None, None] * least
        return moves


# ---------------------------------------------------------------- what was generated


class SlotLayer(FixedLayer):
    """One layer of a `Memory`.

    Args:
        memory: That it belongs to.
        window: As for `LayerCache`.
    """

    def __init__(self, memory: Memory, window: int | None) -> None:
        super().__init__(memory.batch, window)
        self._memory = weakref.proxy(memory)

    def update(self, keys: Tensor, values: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """As `LayerCache.update`; in a segment, put [B, H, 1, D_head] where rows stand; return whole buffers."""
        if not self._memory.in_segment:
            return super().update(keys, values, *others, **named)
        assert self._keys is not None
        assert self._values is not None
        places = self._memory.rows, self._memory.slots
        self._keys[places[0], :, places[1]] = keys[:, :, 0]
        self._values[places[0], :, places[1]] = values[:, :, 0]
        return self._keys, self._values

    def _reserve(self, slots: int, like: Tensor) -> tuple[Tensor, Tensor]:
        self._memory.reserve(slots)
        return self._buffers(self._memory.capacity, like)

    @property
    def exists(self) -> bool:
        """Whether something was written here, so that the buffers' shape is known."""
        return self._keys is not None

    def grow(self, capacity: int) -> None:
        """Move to longer buffers."""
        if self._keys is None or self._values is None:
            return
        with torch.inference_mode(False):
            shape = (*self._keys.shape[:2], capacity, self._keys.shape[-1])
            keys, values = self._keys.new_zeros(shape), self._values.new_zeros(shape)
        keys[:, :, : self._keys.shape[2]] = self._keys
        values[:, :, : self._values.shape[2]] = self._values
        self._keys, self._values = keys, values


class Memory:
    """Keys and values of one batch at a time, and where its rows stand; used again when that batch is forgotten.

    The last slot is nobody's: rows that a segment does not concern write there, so that what was filled in for them
    stays, and no other query sees it.

    Args:
        batch: B.
        windows: Of each layer; None: it sees everything.
        width: D of the states.
        dtype: Of the states.
        device: Where all of it lies.
        hears: Whether there is cross-attention.

    Attributes:
        rows: 0..B-1, [B].
        slots: Where each row's token stands, [B]; the last slot for rows that a segment does not concern.
        positions: Its position, [B, 1].
        hidden: The states that enter a segment, [B, 1, D].
        valid: Slots that are no padding, bool [B, capacity].
        segments: What was captured, by first and last layer; void when the capacity grows.
        heard: Keys and values of cross-attention; None for decoder-only models.
        pool: What they share on CUDA; a new one where all of them are new.
        captured: How many segments were made ready, and `launched`, how often one ran.
        ahead: What ran last, and what may run next.
    """

    def __init__(
        self, batch: int, windows: Sequence[int | None], width: int, dtype: torch.dtype, device: torch.device,
        *, hears: bool = False,
    ) -> None:  # fmt: skip
        self.batch, self.capacity = batch, _LEAST
        self.layers = [SlotLayer(self, window) for window in windows]
        self.cache = Cache(layers=self.layers)
        with torch.inference_mode(False):
            self.rows = torch.arange(batch, device=device)
            self.slots = torch.zeros(batch, dtype=torch.long, device=device)
            self.positions = torch.zeros(batch, 1, dtype=torch.long, device=device)
            self.hidden = torch.zeros(batch, 1, width, dtype=dtype, device=device)
            self.valid = torch.ones(batch, self.capacity, dtype=torch.bool, device=device)
        self.heard = Heard(self.cache, self.hidden) if hears else None
        self.segments: dict[tuple[int, int], Any] = {}
        self.pool: Any = None
        self._in_segment = False
        self.captured = self.launched = 0
        self.ahead = Ahead()
        self._padded = False
        self._owner: weakref.ref[Context] | None = None

    @property
    def in_segment(self) -> bool:
        """Whether blocks are run in a segment now, where they get whole buffers."""
        return self._in_segment

    @in_segment.setter
    def in_segment(self, value: bool) -> None:
        self._in_segment = value
        if self.heard is not None:
            self.heard.in_segment = value

    @property
    def is_free(self) -> bool:
        """Whether the batch it was lent to is gone."""
        return self._owner is None or self._owner() is None

    def lend(self, context: Context) -> None:
        """Hold this batch's keys and values from now on."""
        self._owner, self._padded = weakref.ref(context), False
        self.valid.fill_(True)
        self.ahead.begin()
        for layer in self.layers:
            layer.clear()
        if self.heard is not None:
            assert context.memory is not None
            if self.heard.listen(context.memory.shape[1], context.memory_mask):
                self._forget_segments()

    def is_ready(self, context: Context, lo: int, hi: int) -> bool:
        """Whether blocks `lo` to `hi` have run on this batch, so that buffers exist and hold what was heard."""
        crossed = self.heard is None or set(context.crossed).issuperset(range(lo, hi))
        return crossed and all(layer.exists for layer in self.layers[lo:hi])

    def _forget_segments(self) -> None:
        self.segments.clear()
        self.pool = None

    def reserve(self, slots: int) -> None:
        """Have room for so many slots, and the one that is nobody's."""
        if slots < self.capacity:
            return
        while self.capacity <= slots:
            self.capacity *= 2
        self._forget_segments()
        for layer in self.layers:
            layer.grow(self.capacity)
        with torch.inference_mode(False):
            self.valid = self.valid.new_ones(self.batch, self.capacity)
        self._padded = False

    def pad(self, padding: Tensor | None) -> None:
        """Learn which slots are padding, [B, T], once: later ones are not."""
        if padding is None or self._padded:
            return
        self._padded = True
        self.valid[:, : padding.shape[1]] = padding[:, : self.capacity]

    def mask(self, window: int | None) -> Tensor:
        """What is added to scores, [B, 1, 1, capacity]: 0 for what rows' queries see, else the least number."""
        slots, at = torch.arange(self.capacity, device=self.slots.device), self.slots[:, None]
        seen = (slots <= at) & self.valid
        if window is not None:
            seen = seen & (slots > at - window)
        least = torch.finfo(self.hidden.dtype).min
        return torch.zeros_like(seen, dtype=self.hidden.dtype).masked_fill(~seen, least)[:, None, None]

"""What a generation costs: FLOPs, bytes read and seconds, by part, with nothing left out.

A multiply-add counts 2 FLOPs and only matrix products count, as in `torch.utils.flop_counter`. Bytes are weights and
cached keys and values read, plus both copies that a gathered (pruned) readout makes; tokens that run together may be
sent to the same expert, and count as if they were not. Seconds are measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

PARTS = ("encoder", "blocks", "fill", "readout", "pruned_readout", "select", "confidence")
"""encoder · blocks (attention, FFN, first-visit cross keys and values) · fill (keys and values of skipped layers) ·
readout (lenses; all V rows) · pruned_readout (K rows) · select (top-k and gather) · confidence (the measure itself;
only classifiers and posteriors have products, and so FLOPs)."""


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one decoder block, in weights and widths.

    Attributes:
        weights: Weights that every token is multiplied with: all matrices except the cross-attention K/V, and of
            experts only those that it is sent to.
        kv_weights: Weights of the self-attention key and value projections.
        query_width: Heads times head width of the queries.
        kv_width: Heads times head width of the keys, and of the values.
        cross_kv_weights: Weights of the cross-attention key and value projections; 0 without cross-attention.
        window: Sliding attention window in tokens, or None.
        experts: How many experts a router can send a token to; 0 without.
        active_experts: To how many of them it sends each.
        expert_weights: Weights of one of them.
    """

    weights: int
    kv_weights: int
    query_width: int
    kv_width: int
    cross_kv_weights: int = 0
    window: int | None = None
    experts: int = 0
    active_experts: int = 0
    expert_weights: int = 0

    def weights_read(self, tokens: int) -> int:
        """Weights that `tokens` tokens read together: of experts as many as they can be sent to, if none share one."""
        more = min(self.experts, tokens * self.active_experts) - self.active_experts
        return self.weights + more * self.expert_weights


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, enough to count the work of any way through it.

    Attributes:
        blocks: The L decoder blocks; what comes between the embeddings and the first one counts with it.
        width: Width D of the states.
        vocabulary: Rows V of the head.
        element_size: Bytes per weight.
        encoder_weights: Weights each encoder position is multiplied with.
        encoder_attention_width: Query width summed over the encoder's layers.
        lenses: Weights of the lens after each of layers 1..L, 0 where there is none; empty without trained exits.
        head_width: Width of the head's rows where a matrix from D to it comes before the head (OPT-350m); None: D.
    """

    blocks: tuple[BlockShape, ...]
    width: int
    vocabulary: int
    element_size: int
    encoder_weights: int = 0
    encoder_attention_width: int = 0
    lenses: tuple[int, ...] = ()
    head_width: int | None = None

    def block_flops(self, layer: int, queries: int, start: int, memory: int = 0) -> int:
        """FLOPs of block `layer` (0-based) for `queries` tokens of one row that come after `start` cached ones."""
        block = self.blocks[layer]
        keys = queries + (start if block.window is None else min(start, block.window - 1))
        attended = keys + (memory if block.cross_kv_weights else 0)
        return queries * (2 * block.weights + 4 * block.query_width * attended)

    def fill_flops(self, layer: int) -> int:
        """FLOPs of the keys and values of one token at block `layer` (0-based)."""
        return 2 * self.blocks[layer].kv_weights

    @property
    def squeeze_weights(self) -> int:
        """Weights of the matrix before the head; 0 where there is none."""
        return 0 if self.head_width is None else self.width * self.head_width

    def row_weights(self, rows: int | None = None) -> int:
        """Weights of `rows` rows of the head (None: all V)."""
        return (self.head_width or self.width) * (self.vocabulary if rows is None else rows)

    def readout_weights(self, rows: int | None = None) -> int:
        """Weights that one state is multiplied with to score `rows` kept tokens (None: all V)."""
        return self.squeeze_weights + self.row_weights(rows)

    def readout_flops(self, rows: int | None = None) -> int:
        """FLOPs of reading one state out on `rows` kept tokens (None: all V)."""
        return 2 * self.readout_weights(rows)

    def lens_weights(self, layer: int) -> int:
        """Weights of the lens after `layer`, 1..L; 0 where there is none."""
        return self.lenses[layer - 1] if self.lenses else 0

    def encoder_flops(self, positions: int) -> int:
        """FLOPs of the encoder for one row of `positions` outputs."""
        return 2 * self.encoder_weights * positions + 4 * self.encoder_attention_width * positions**2

    def cross_flops(self, layer: int, memory: int) -> int:
        """FLOPs of the cross-attention keys and values of one row at a first visit of block `layer` (0-based)."""
        return 2 * self.blocks[layer].cross_kv_weights * memory

    def generation_flops(self, prompt: int, new: int, memory: int = 0) -> int:
        """FLOPs of the full model for one row: encoder, prompt and `new` generated tokens."""
        passes = [(prompt, 0), *((1, prompt + t) for t in range(new - 1))]
        layers = range(len(self.blocks))
        blocks = sum(self.block_flops(layer, n, start, memory) for n, start in passes for layer in layers)
        cross = sum(self.cross_flops(layer, memory) for layer in layers)
        return self.encoder_flops(memory) + cross + blocks + new * self.readout_flops()


@dataclass
class Part:
    """FLOPs, bytes and seconds of one part."""

    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass
class Costs:
    """The bill of one generation.

    Attributes:
        parts: One `Part` per name in `PARTS`.
        tokens: Generated tokens, over all rows.
        tests: Confidence tests made, one per row and layer.
        exit_layers: Sum of the exit layers of all tokens: the ideal depth.
        executed_layers: Decoder blocks run, one per row and token position, prompt excluded. Above `exit_layers` where
            a batch made rows wait or deferred positions were caught up with.
        draft_flops: "FLOPs" as counted by the source document: d²·V per test, or d²·k on a pruned vocabulary, whose
            first (full) projection it leaves out; no blocks, no fill. Only for comparing tables with it.
        seconds: Wall-clock time of the whole generation.
    """

    parts: dict[str, Part] = field(default_factory=lambda: {name: Part() for name in PARTS})
    tokens: int = 0
    tests: int = 0
    exit_layers: int = 0
    executed_layers: int = 0
    draft_flops: int = 0
    seconds: float = 0.0

    @property
    def flops(self) -> int:
        """FLOPs of all parts."""
        return sum(part.flops for part in self.parts.values())

    @property
    def bytes(self) -> int:
        """Bytes read by all parts."""
        return sum(part.bytes for part in self.parts.values())

    @property
    def mean_exit_layer(self) -> float:
        """Mean exit layer of the generated tokens."""
        return self.exit_layers / max(self.tokens, 1)

    def to_dict(self) -> dict[str, Any]:
        """Totals, means per token and parts, for JSON; `per_token` divides by `tokens`."""
        tokens = max(self.tokens, 1)
        total = {"flops": self.flops, "bytes": self.bytes, "seconds": self.seconds}
        parts = {name: vars(part).copy() for name, part in self.parts.items()}
        return {
            **total,
            "tokens": self.tokens,
            "tests": self.tests,
            "mean_exit_layer": self.mean_exit_layer,
            "executed_layers": self.executed_layers,
            "draft_flops": self.draft_flops,
            "parts": parts,
            "per_token": {
                **{key: value / tokens for key, value in total.items()},
                "parts": {name: {key: value / tokens for key, value in part.items()} for name, part in parts.items()},
            },
        }


class Ledger:
    """Writes a `Costs` while a generation runs.

    On CUDA, parts are timed with events that are read once at the end, so measuring does not synchronise.
    """

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        self.shape, self.costs = shape, Costs()
        self._cuda = device.type == "cuda"
        self._running: list[str] = []
        self._since: Any = None
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the time of the `with` block to a part; a block inside it takes its own time out of the outer one's."""
        self._switch()
        self._running.append(part)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def _switch(self) -> None:
        """Book the time since the last switch on the innermost running part."""
        now = self._now()
        if self._running and self._cuda:
            self._events.append((self._running[-1], self._since, now))
        elif self._running:
            self.costs.parts[self._running[-1]].seconds += now - self._since
        self._since = now

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def settle(self) -> Costs:
        """The bill so far, with all measured times in it."""
        if self._events:
            torch.cuda.synchronize()
        for part, begin, end in self._events:
            self.costs.parts[part].seconds += begin.elapsed_time(end) / 1000
        self._events.clear()
        return self.costs

    def _add(self, part: str, flops: int, elements: int) -> None:
        entry = self.costs.parts[part]
        entry.flops += flops
        entry.bytes += elements * self.shape.element_size

    def encoder(self, rows: int, positions: int) -> None:
        """One pass of the encoder."""
        self._add("encoder", rows * self.shape.encoder_flops(positions), self.shape.encoder_weights)

    def blocks(
        self, lo: int, hi: int, *, rows: int, queries: int, start: int, memory: int = 0, prompt: bool = False
    ) -> None:
        """Blocks lo..hi-1 (0-based) for `queries` tokens of each of `rows` rows, after `start` cached tokens."""
        self.costs.executed_layers += 0 if prompt else rows * queries * (hi - lo)
        for layer in range(lo, hi):
            block = self.shape.blocks[layer]
            seen = start if block.window is None else min(start, block.window - 1)
            cached = 2 * block.kv_width * rows * (seen + (memory if block.cross_kv_weights else 0))
            read = block.weights_read(rows * queries) + cached
            self._add("blocks", rows * self.shape.block_flops(layer, queries, start, memory), read)

    def cross(self, layer: int, rows: int, memory: int) -> None:
        """First visit of a block's cross-attention."""
        self._add("blocks", rows * self.shape.cross_flops(layer, memory), self.shape.blocks[layer].cross_kv_weights)

    def fill(self, layer: int, tokens: int) -> None:
        """Keys and values of `tokens` tokens that skipped a layer, in one product."""
        self._add("fill", tokens * self.shape.fill_flops(layer), self.shape.blocks[layer].kv_weights)

    def lens(self, layer: int, states: int) -> None:
        """The lens after `layer`, if there is one, on `states` states."""
        weights = self.shape.lens_weights(layer)
        self._add("readout", states * 2 * weights, weights)

    def classifier(self, states: int) -> None:
        """A consistency classifier on `states` states."""
        self._add("confidence", states * 2 * self.shape.width, self.shape.width)

    def posterior(self, states: int, flops: int, shared: int, own: int) -> None:
        """A posterior's confidence of `states` states: FLOPs of each, float32 numbers read for all and for each."""
        part = self.costs.parts["confidence"]
        part.flops += states * flops
        part.bytes += 4 * (shared + states * own)

    def readout(self, states: int) -> None:
        """A readout of `states` states on the full vocabulary, in one product."""
        self._add("readout", states * self.shape.readout_flops(), self.shape.readout_weights())

    def pruned_readout(self, states: int, kept: int) -> None:
        """A readout of each of `states` states on `kept` rows gathered for it."""
        shape, rows = self.shape, states * self.shape.row_weights(kept)
        self._add("pruned_readout", states * shape.readout_flops(kept), shape.squeeze_weights + rows)

    def gather(self, states: int, kept: int) -> None:
        """Copying `kept` rows of the head for each of `states` states: read and written."""
        self._add("select", 0, 2 * states * self.shape.row_weights(kept))

    def test(self, rows: int, scored: int | None, *, pruned: bool) -> None:
        """A confidence test of `rows` rows on `scored` tokens (None: it read no logits)."""
        self.costs.tests += rows
        if scored is not None and (scored < self.shape.vocabulary or not pruned):
            self.costs.draft_flops += rows * self.shape.width**2 * scored

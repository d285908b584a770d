"""What a generation costs: FLOPs, bytes read and seconds, by part, with nothing left out.

A multiply-add counts 2 FLOPs and only matrix products count, as in `torch.utils.flop_counter`. Bytes are weights and
cached keys and values read, plus both copies that a gathered (pruned) readout makes; tokens that run together may be
sent to the same expert, and count as if they were not. Seconds are measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from offramp.families.sizes import BlockShape, ModelShape

PARTS = ("encoder", "blocks", "fill", "readout", "pruned_readout", "select", "confidence")
"""encoder · blocks (attention, FFN, first-visit cross keys and values) · fill (keys and values of skipped layers) ·
readout (lenses; all V rows) · pruned_readout (K rows) · select (top-k and gather) · confidence (the measure itself;
only classifiers and posteriors have products, and so FLOPs)."""


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
        prompt_flops: Of all, FLOPs of the encoder and of the prompt's own pass, with the token read off it.
        prompt_tokens: Of all, tokens read off the prompt's own pass, one per row; encoder-decoders with a single start
            token have none.
        seconds: Wall-clock time of the whole generation.
        engine: What generated, "torch", "native" or "cuda"; FLOPs and bytes are those of the model whatever it is.
    """

    parts: dict[str, Part] = field(default_factory=lambda: {name: Part() for name in PARTS})
    tokens: int = 0
    tests: int = 0
    exit_layers: int = 0
    executed_layers: int = 0
    draft_flops: int = 0
    prompt_flops: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    engine: str = "torch"

    def __repr__(self) -> str:
        return (
            f"Costs({self.tokens} tokens, {self.flops:.4g} FLOPs, {self.bytes:.4g} bytes, {self.seconds:.3g} s, "
            f"{self.tests} tests, mean exit layer {self.mean_exit_layer:.1f}, {self.engine})"
        )

    @property
    def flops(self) -> int:
        """FLOPs of all parts."""
        return sum(part.flops for part in self.parts.values())

    @property
    def bytes(self) -> int:
        """Bytes read by all parts."""
        return sum(part.bytes for part in self.parts.values())

    @property
    def flops_per_token(self) -> float:
        """FLOPs per generated token, without encoder and prompt, drafts that were discarded included; 0 of none."""
        return (self.flops - self.prompt_flops) / max(self.tokens - self.prompt_tokens, 1)

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
            "engine": self.engine,
            "tokens": self.tokens,
            "tests": self.tests,
            "mean_exit_layer": self.mean_exit_layer,
            "executed_layers": self.executed_layers,
            "draft_flops": self.draft_flops,
            "prompt_flops": self.prompt_flops,
            "prompt_tokens": self.prompt_tokens,
            "flops_per_token": self.flops_per_token,
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
        self._kinds: dict[tuple[int, int], list[tuple[int, int]]] = {}

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
        for first, like in self._alike(lo, hi):
            block = self.shape.block(first)
            seen = start if block.window is None else min(start, block.window - 1)
            cached = 2 * block.kv_width * rows * (seen + (memory if block.cross_kv_weights else 0))
            read = block.weights_read(rows * queries) + cached
            self._add("blocks", like * rows * self.shape.block_flops(first, queries, start, memory), like * read)

    def _alike(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """Blocks lo..hi-1 by kind, and how many there are of each: the same sizes are not added up one by one."""
        if (lo, hi) not in self._kinds:
            found: dict[BlockShape, list[int]] = {}
            for layer in range(lo, hi):
                found.setdefault(self.shape.block(layer), []).append(layer)
            self._kinds[lo, hi] = [(layers[0], len(layers)) for layers in found.values()]
        return self._kinds[lo, hi]

    def cross(self, layer: int, rows: int, memory: int) -> None:
        """First visit of a block's cross-attention."""
        self._add("blocks", rows * self.shape.cross_flops(layer, memory), self.shape.block(layer).cross_kv_weights)

    def fill(self, layers: Iterable[int], tokens: int) -> None:
        """Keys and values of `tokens` tokens that skipped these layers, in one product per layer."""
        for layer in layers:
            self._add("fill", tokens * self.shape.fill_flops(layer), self.shape.block(layer).kv_weights)

    def lens(self, layer: int, states: int) -> None:
        """The lens after `layer`, if there is one, on `states` states."""
        weights = self.shape.lens_weights(layer)
        self._add("readout", states * 2 * weights, weights)

    def mix(self, states: int) -> None:
        """The two inputs of the drafter, at `states` positions."""
        self._add("blocks", states * 2 * self.shape.mix_weights, self.shape.mix_weights)

    def confidence(self, states: int, flops: int, shared: int, own: int) -> None:
        """What a measure computes beyond logits: FLOPs of each of `states` states, bytes read for all and for each."""
        part = self.costs.parts["confidence"]
        part.flops += states * flops
        part.bytes += shared + states * own

    def readout(self, states: int) -> None:
        """A readout of `states` states on the full vocabulary, in one product."""
        self._add("readout", states * self.shape.readout_flops(), self.shape.readout_weights())

    def pruned_readout(self, states: int, kept: int, *, shared: bool = False) -> None:
        """A readout of each of `states` states on `kept` rows gathered for it, or for all of them together."""
        shape, rows = self.shape, (1 if shared else states) * self.shape.row_weights(kept)
        self._add("pruned_readout", states * shape.readout_flops(kept), shape.squeeze_weights + rows)

    def gather(self, states: int, kept: int) -> None:
        """Copying `kept` rows of the head for each of `states` states: read and written."""
        self._add("select", 0, 2 * states * self.shape.row_weights(kept))

    def test(self, rows: int, scored: int | None, *, pruned: bool) -> None:
        """A confidence test of `rows` rows on `scored` tokens (None: it read no logits)."""
        self.costs.tests += rows
        if scored is not None and (scored < self.shape.vocabulary or not pruned):
            self.costs.draft_flops += rows * self.shape.width**2 * scored


# ---------------------------------------------------------------- where leaving early pays


def exit_flops(shape: ModelShape, layer: int, first: int | None, kept: int | None = None) -> int:
    """FLOPs of one token that leaves after `layer`: blocks, lenses, branches, readouts, keys and values it skips.

    Weights only, as for a short context. The logits of the last test are those the token is taken from. A token that
    reaches layer L has failed all tests and is read out once more, in full.

    Args:
        shape: The model.
        layer: Exit layer, 1..L.
        first: First tested layer; every layer from it on is tested. None: no tests, one readout where it leaves.
        kept: Tokens scored by the tests after the first; None: all V. Copying their head rows is bytes, not FLOPs.

    Returns:
        FLOPs, with a multiply-add counted as 2.
    """
    depth = len(shape.blocks)
    passed = sum(2 * block.weights for block in shape.blocks[:layer])
    filled = sum(shape.fill_flops(index) for index in range(layer, depth))
    full, later, read = shape.readout_flops(), 0, range(layer, layer + 1)
    if first is not None and layer >= first:
        later = min(layer, depth - 1) - first  # tests after the first
        full = full * 2 if layer == depth else full
        read = range(first, layer + 1)
    lenses = sum(2 * shape.adapter_weights(index) for index in read)
    return passed + filled + lenses + full + later * shape.readout_flops(kept)


def saved_flops(
    shape: ModelShape, layer: int, exits: Sequence[int], kept: int | None = None, *, scored: bool = True
) -> int:
    """FLOPs that a token saves which leaves at a test after `layer`, against going on to the last layer.

    Weights only, as for a short context.

    Args:
        shape: The model.
        layer: One of the exits.
        exits: All layers that are tested.
        kept: Tokens that later tests score; None: all V.
        scored: Whether tests score tokens, so that the leaving one needs no readout of its own.

    Returns:
        Blocks less keys and values, tests, lenses and branches behind `layer`, and the last readout unless one is made
        here.
    """
    depth = len(shape.blocks)
    behind = sum(2 * shape.blocks[index].weights - shape.fill_flops(index) for index in range(layer, depth))
    later = [exit for exit in exits if exit > layer]
    tests = sum(2 * shape.adapter_weights(exit) for exit in later)
    tests += len(later) * shape.readout_flops(kept) + shape.readout_flops() if scored else 0
    return behind + tests


def ratios(shape: ModelShape) -> tuple[float, float]:
    """H = readout / block and φ = fill / block, in FLOPs of the mean block."""
    depth = len(shape.blocks)
    block = sum(2 * block.weights for block in shape.blocks) / depth
    return shape.readout_flops() / block, sum(shape.fill_flops(index) for index in range(depth)) / depth / block


def break_even(
    shape: ModelShape, first: int, kept: int | None = None, tests: int | None = None, frequent: int | None = None
) -> float:
    """The exit layer l* at which a token costs as much as in the full model; leaving before it saves FLOPs.

    With H = readout / block, φ = fill / block and every layer from m on tested, a token that leaves after l costs
    l + H(l - m + 1) + φ(L - l) blocks against L + H, its last test being its readout, so

        l* = (L(1 - φ) + H·m) / (1 + H - φ).

    With only n tested layers, spread evenly from m on, H(l - m + 1) becomes H(ρ(l - m) + 1) with ρ = n / (L - m); it is
    1 if every layer is tested. A lens of λ blocks in each test (the mean over the tests) comes on top of H there.

    With a fixed pruned vocabulary the first test scores V tokens and the l - m later ones K: the first test takes the
    place of the full model's readout and the formula keeps its shape, with H_K = H·K/V in place of H. A token that
    never leaves then pays one more full readout than the straight line through the exits says (H - H_K), so means have
    to be compared by `exit_flops`; without pruning the line holds at L as well, and the mean exit layer decides.

    Where the first test scores F frequent tokens instead of V, the token saves H - H_F there, and L(1 - φ) grows by it.

    Args:
        shape: The model, its blocks alike.
        first: m, the first tested layer, 1..L-1.
        kept: K; None: V.
        tests: n; None: every layer from m on.
        frequent: F; None: V.

    Returns:
        l*, between m and L where there are no lenses; above L, where every exit saves, if the first test is a cheap
        one; not a whole number in general.
    """
    head, fill = ratios(shape)
    depth = len(shape.blocks)
    tests = depth - first if tests is None else tests
    lens = sum(shape.adapter_weights(layer) for layer in range(first, depth)) / tests
    lens /= sum(block.weights for block in shape.blocks) / depth
    tested = (head * (1 if kept is None else kept / shape.vocabulary) + lens) * tests / (depth - first)
    saved = 0.0 if frequent is None else head * (1 - frequent / shape.vocabulary)
    return (depth * (1 - fill) + saved + tested * first - lens) / (1 + tested - fill)

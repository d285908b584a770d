"""What a probe found, as numbers, in words, as text for a terminal, and as files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from offramp.runs.results import Result
from offramp.runs.tables import markdown

SCHEMA = "offramp/probe/1"
COVERAGE = 0.995
"""Share of the final tokens that a pruned vocabulary should hold."""
TOLERANCE = 0.1
"""A layer's confidence is believed if it is off by less than this."""


@dataclass(frozen=True)
class LayerReport:
    """What one layer would have said, over all positions.

    Attributes:
        layer: 1..L.
        agreement: Share of positions whose most probable token is already the final one.
        max_probability: Mean of the largest probability: how sure the layer is.
        gap: Mean difference of the two largest probabilities, the usual exit confidence.
        overconfidence: `max_probability` - `agreement`; says nothing at layer L, which agrees with itself.
        rank: Tokens scoring above the final one (0: none), as quantiles p5 .. p99; box p25 to p75, whiskers p5 to p95.
        coverage_size: Smallest number of best tokens that holds the final one in 99.5 % of the positions.
        settled: Share of positions whose saturation layer is this one or an earlier one.
        break_even: Were this the first tested layer: the break-even layer with all V tokens scored; None at layer L.
        break_even_pruned: Likewise, with `coverage_size` tokens scored after the first test.
    """

    layer: int
    agreement: float
    max_probability: float
    gap: float
    overconfidence: float
    rank: dict[str, float]
    coverage_size: int
    settled: float
    break_even: float | None
    break_even_pruned: float | None


@dataclass(frozen=True)
class Depths:
    """Layers, one per position: `mean`, `quantiles` p5 .. p99, and `counts`, how many of them are 1, 2, .. L."""

    mean: float
    quantiles: dict[str, float]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Probe(Result):
    """The suitability of a model for early exits; made by `probe`.

    Attributes:
        model: Its name.
        source: What it was probed on: "bundled prompts", "prompts" or "texts".
        examples: Prompts, or windows of text.
        tokens: Positions looked at.
        num_layers: L.
        vocabulary: V.
        min_layer: Exits are thought to be tested after layers min_layer .. L-1.
        layers: One report per layer 1..L.
        saturation: From this layer on, every layer's choice is the final token.
        oracle: First layer from `min_layer` on whose choice is the final token, even if a later one wavers.
        suggested_min_layer: From this layer on, no mean confidence is off by 0.1 or more; None: no such layer before L.
        suggested_vocabulary_size: `coverage_size` at `min_layer`, where a pruned vocabulary would be chosen.
        head_ratio: H: FLOPs of a full readout over those of a block.
        fill_ratio: φ: FLOPs of the keys and values of a skipped block over those of a block.
        break_even: Mean exit layer up to which testing all V tokens after layers min_layer, .. saves FLOPs.
        break_even_pruned: Likewise, with `suggested_vocabulary_size` tokens after the first test.
        default_vocabulary_size: Tokens that a policy keeps at `min_layer` unless it is told otherwise.
        default_coverage: Share of the final tokens among them at that layer.
        break_even_default: Break-even with that many.
        ceiling: FLOPs of the full model over those of leaving at the oracle layer, without any test: no exit rule that
            keeps the tokens saves more.
        flops: FLOPs over those of the full model when every token leaves at its saturation layer (`min_layer` at the
            earliest): "untested", "tested" (all V tokens at each test) and "pruned".
        suitable: Whether "tested" or "pruned" is below 1 by a 95 % interval in which examples, not positions, count.
        verdict: That in words, with the reason and the remedies.
    """

    schema, noun, files = SCHEMA, "probe", ("probe.json", "probe.txt")

    model: str
    source: str
    examples: int
    tokens: int
    num_layers: int
    vocabulary: int
    min_layer: int
    layers: tuple[LayerReport, ...]
    saturation: Depths
    oracle: Depths
    suggested_min_layer: int | None
    suggested_vocabulary_size: int
    head_ratio: float
    fill_ratio: float
    break_even: float
    break_even_pruned: float
    default_vocabulary_size: int
    default_coverage: float
    break_even_default: float
    ceiling: float
    flops: dict[str, float]
    suitable: bool
    verdict: str

    def __repr__(self) -> str:
        found = "saves" if self.suitable else "is not shown to save"
        return (
            f"Probe({self.model!r}, {self.num_layers} layers, {self.tokens} positions of {self.examples} "
            f"{self.source_noun}: leaving where layers have settled {found} FLOPs)"
        )

    def _rows(self) -> Iterable[Any]:
        """A row per layer, as `LayerReport` has them."""
        return self.layers

    @property
    def source_noun(self) -> str:
        """What `examples` counts."""
        return "windows of text" if self.source == "texts" else self.source

    def table(self) -> str:
        """The probe as plain text: a row per layer (of deep models every second or third) and what follows from it."""
        return "\n".join([*_rows(self), "", *_summary(self)])


# ---------------------------------------------------------------- as text


def _rows(probe: Probe) -> list[str]:
    head = [
        "layer", "same token", "max prob", "gap", "too sure", "rank p50", "p90", "p99", "K 99.5%", "settled"
    ]  # fmt: skip
    step = -(-probe.num_layers // 20)
    rows = []
    for r in probe.layers:
        if r.layer not in (1, probe.min_layer) and (probe.num_layers - r.layer) % step:
            continue
        rows.append([
            f"{'>' if r.layer == probe.min_layer else ''}{r.layer}", f"{r.agreement:.2f}", f"{r.max_probability:.2f}",
            f"{r.gap:.2f}", "" if r.layer == probe.num_layers else f"{r.overconfidence:+.2f}",
            *(f"{r.rank[name]:.0f}" for name in ("p50", "p90", "p99")), f"{r.coverage_size}", f"{r.settled:.2f}",
        ])  # fmt: skip
    where = f"{probe.model}: {probe.num_layers} layers, {probe.vocabulary} tokens in the vocabulary"
    seen = f"{probe.tokens} positions of {probe.examples} {probe.source_noun}; the final token is the last layer's"
    note = "rank: tokens above the final one; K: so many best tokens hold 99.5% of the final ones; settled: so far"
    return [where, seen, "", markdown(head, rows), "", *textwrap.wrap(note, 100)]


def _summary(probe: Probe) -> list[str]:
    last, first = probe.num_layers, probe.min_layer
    size, share = probe.suggested_vocabulary_size, probe.suggested_vocabulary_size / probe.vocabulary
    believed = probe.suggested_min_layer
    if believed is None:
        minimum = f"none: even layer {last - 1} is off by {abs(probe.layers[-2].overconfidence):.2f}"
    else:
        minimum = f"{believed}, from where on no layer's mean confidence is off by {TOLERANCE} or more"
    lines = {
        "saturation layer": f"{_spread(probe.saturation)}; all later layers choose the final token",
        "oracle exit layer": f"{_spread(probe.oracle)}; the first from layer {first} on that chooses it",
        "break-even layer": f"{probe.break_even:.1f} with every test on all {probe.vocabulary} tokens",
        "  pruned": f"{probe.break_even_default:.1f} with {probe.default_vocabulary_size} kept (default), with "
        f"{probe.default_coverage:.0%} of the final tokens; {probe.break_even_pruned:.1f} with {size} ({COVERAGE:.1%})",
        "cost of a test": f"{probe.head_ratio:.2f} layers; a skipped layer still costs {probe.fill_ratio:.1%} of one",
        "FLOPs at saturation": f"{probe.flops['tested']:.0%} of the full model's; {probe.flops['pruned']:.0%} pruned; "
        f"{probe.flops['untested']:.0%} if the tests were free",
        "speed-up at most": f"{probe.ceiling:.2f}x, with an oracle in place of tests",
        "suggested min_layer": minimum,
        "suggested vocabulary": f"{size} tokens ({share:.0%}), with {COVERAGE:.1%} of the final ones at layer {first}",
    }
    width = max(map(len, lines))
    listed = [
        textwrap.fill(f"{name:{width}}  {text}", 100, subsequent_indent=" " * (width + 2))
        for name, text in lines.items()
    ]
    tests = f"layers {first}..{last - 1}" if first < last - 1 else f"layer {first}"
    return [f"Exits are thought to be tested after {tests} (>).", *listed, "", *textwrap.wrap(probe.verdict, 100)]


def _spread(depths: Depths) -> str:
    return f"mean {depths.mean:.1f}, half of them in {depths.quantiles['p25']:.0f}..{depths.quantiles['p75']:.0f}"


# ---------------------------------------------------------------- in words


def verdict(
    flops: Mapping[str, float], margins: Mapping[str, float], head: float, saturation: float, min_layer: int,
    depth: int, examples: int,
) -> str:  # fmt: skip
    """Whether a model is worth early exits, no surer than the margins (half 95 % intervals over examples) allow."""
    tests = f"after each of layers {min_layer}..{depth - 1}" if min_layer < depth - 1 else f"after layer {min_layer}"
    setting = (
        f"if every token left where its choice is settled (after {saturation:.1f} of {depth} layers on average), "
        f"with a test {tests},"
    )
    tested, pruned = flops["tested"], flops["pruned"]
    bound = "No rule knows where a choice is settled: `offramp evaluate` shows what one saves and loses."
    if tested + margins["tested"] < 1:
        also = f", {pruned:.0%} with a pruned vocabulary" if pruned < tested - 0.005 else ""
        sure = f"(at most {tested + margins['tested']:.0%}, by a 95 % interval over {examples} examples)"
        return f"Worth trying: {setting} it would cost {tested:.0%} {sure} of the full model's FLOPs{also}. {bound}"
    if pruned + margins["pruned"] < 1:
        sure = f"(at most {pruned + margins['pruned']:.0%}, by a 95 % interval over {examples} examples)"
        return (
            f"Worth trying with a pruned vocabulary: {setting} it would cost {pruned:.0%} {sure} of the full model's "
            f"FLOPs, but {tested:.0%} without, as one readout of the whole vocabulary costs as much as {head:.1f} "
            f"layers. {bound}"
        )
    if min(tested, pruned) < 1:
        return (
            f"Not shown: {setting} it would cost {min(tested, pruned):.0%} of the full model's FLOPs"
            f"{' (pruned)' if pruned < tested else ''}, which {examples} examples do not tell from 100%; "
            f"{_wanted(flops, margins, examples)} would."
        )
    reasons = []
    if saturation > 0.75 * depth:
        reasons.append("the final token is settled late")
    if flops["untested"] < 0.95:
        reasons.append(
            f"the tests eat the gain (one readout of the whole vocabulary costs as much as {head:.1f} layers)"
        )
    elif head >= 1:
        reasons.append(f"one readout of the whole vocabulary costs as much as {head:.1f} layers")
    cheaper = " (pruned)" if pruned < tested else ""
    return (
        f"Not suitable as is: {setting} it would cost {min(tested, pruned):.0%} of the full model's FLOPs{cheaper}; "
        f"{' and '.join(reasons) or 'the tests cost more than the skipped layers save'}. Remedies: train the exits, "
        "test fewer of them, prune the vocabulary, or let the deep layers verify the tokens, which keeps the output "
        'exact (skipped="verify").'
    )


def _wanted(flops: Mapping[str, float], margins: Mapping[str, float], examples: int) -> str:
    """About how many examples an interval would have to be of to end below the full model's cost."""
    if examples < 2:
        return "more"
    ratios = [(margins[name] / (1 - flops[name])) ** 2 for name in margins if flops[name] < 1]
    return f"about {math.ceil(1 + (examples - 1) * min(ratios)) + 1:,}"

"""Pictures and the page of a probe: what every layer would have said, and whether leaving pays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from offramp.lm.probe_result import Probe
from offramp.report.blocks import Code, Page, Section, Text, draw, repeat
from offramp.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    footnote,
    headed,
    layer_ticks,
    legend,
    percent,
    require_matplotlib,
    save_figures,
)
from offramp.runs.tables import Table

SHOWN = {
    "confidence": "How sure each layer is, and how often it is right",
    "rank": "Place of the final token among each layer's choices",
    "exits": "Where tokens could leave, and up to where leaving saves FLOPs",
}


def page(path: Path, values: dict[str, Any]) -> Page:
    """The page of a probe, from its JSON."""
    probe = Probe.from_dict(values)
    pictures = {name: draw(partial(PICTURES[name], probe), says) for name, says in SHOWN.items()}
    head = ["after layer", "accuracy", "confidence", "too sure by", "gap", "settled so far", "median rank"]
    rows = [
        [
            f"{r.layer}", f"{r.agreement:.1%}", f"{r.max_probability:.1%}",
            "" if r.layer == probe.num_layers else f"{r.overconfidence:+.1%}", f"{r.gap:.2f}", f"{r.settled:.1%}",
            f"{r.rank['p50'] + 1:,.0f}",
        ]
        for r in probe.layers
    ]  # fmt: skip
    marks = ["full" if r.layer == probe.num_layers else "" for r in probe.layers]
    note = (
        "Accuracy: how often the layer's choice is the final token. Confidence: mean probability of its choice. Gap: "
        "mean difference of its two largest probabilities. Settled: share of positions at which this and all later "
        "layers choose the final token."
    )
    about = {
        "model": probe.model, "source": probe.source, "examples": probe.examples, "positions": probe.tokens,
        "min_layer": probe.min_layer,
    }  # fmt: skip
    return Page(
        f"Probe: {probe.model}",
        str(path),
        [
            Section("Is it worth it?", [Text((probe.verdict,), _mark(probe.verdict)), pictures["exits"]]),
            Section(
                "Confidence and accuracy by layer",
                [pictures["confidence"], Table(head, rows, marks=marks), Text((note,)), pictures["rank"]],
            ),
            Section("In figures", [Code(probe.table(), "The probe as text")]),
            repeat(about),
        ],
    )


def _mark(verdict: str) -> str:
    """Of its box; an earlier version's praise, which no interval supports, has none."""
    return "good" if verdict.startswith("Worth trying") else "bad" if verdict.startswith("Not suitable") else ""


# ---------------------------------------------------------------- pictures


def save_probe(probe: Probe, folder: Path) -> list[Path]:
    """Draw all pictures of a probe (see `save_figures`)."""
    return save_figures({f"probe-{name}": partial(draw, probe) for name, draw in PICTURES.items()}, folder)


def rank_figure(probe: Probe) -> Any:
    """Box plot of the final token's rank by layer, on a logarithmic axis, and the suggested pruned vocabulary."""
    figure, axes = _axes(probe, _rank_title(probe))
    x = [r.layer for r in probe.layers]
    low, q1, median, q3, high, p99 = (
        [r.rank[name] + 1 for r in probe.layers] for name in ("p5", "p25", "p50", "p75", "p95", "p99")
    )
    # Not axes.bxp: it walks through all settings and thereby chooses a window system.
    axes.vlines(x, low, high, color=BLUE, linewidth=1)
    for caps in (low, high):
        axes.hlines(caps, [v - 0.15 for v in x], [v + 0.15 for v in x], color=BLUE, linewidth=1)
    heights = [top - bottom for bottom, top in zip(q1, q3, strict=True)]
    boxes = axes.bar(x, heights, 0.6, bottom=q1, facecolor="#bfdbec", edgecolor=BLUE, zorder=2)
    axes.hlines(median, [v - 0.3 for v in x], [v + 0.3 for v in x], color=BLUE, linewidth=2.5, zorder=3)
    (dots,) = axes.plot(x, p99, ".", color=GREY)
    size = probe.suggested_vocabulary_size
    line = axes.axhline(size, color=ORANGE, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylim(0.8, probe.vocabulary * 1.3)
    axes.yaxis.set_major_formatter(require_matplotlib().ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.minorticks_off()
    axes.set_ylabel("place of the final token among the layer's choices\n(1 = its first choice)")
    labels = [
        "half of the positions (bar: median; whiskers: 5th to 95th percentile)",
        "99th percentile",
        f"the best {size:,} of {probe.vocabulary:,} hold 99.5% of the final tokens at layer {probe.min_layer}",
    ]
    legend(axes, [boxes, dots, line], labels)
    return figure


def _rank_title(probe: Probe) -> str:
    first = probe.num_layers
    while first > 1 and probe.layers[first - 2].rank["p50"] == 0:
        first -= 1
    return f"The final token is the first choice half of the time only from layer {first} of {probe.num_layers} on"


def confidence_figure(probe: Probe) -> Any:
    """How sure each layer is and how often it is right, with the difference shaded."""
    off = max(probe.layers[probe.min_layer - 1 : -1], key=lambda r: r.overconfidence)
    if off.overconfidence >= 0.1:
        says, is_so = f"{off.max_probability:.0%} sure", f"{off.agreement:.0%} right"
        title = f"Early layers are too sure: layer {off.layer} is {says} and {is_so}"
    else:
        title = f"From layer {probe.min_layer} on, layers are about as sure as they are right, or less"
    figure, axes = _axes(probe, title)
    early = probe.layers[:-1]
    x = [r.layer for r in early]
    right, sure = [r.agreement for r in early], [r.max_probability for r in early]
    (a,) = axes.plot([*x, probe.num_layers], [*right, 1.0], "-o", color=BLUE, markersize=4)
    (b,) = axes.plot(x, sure, "-s", color=ORANGE, markersize=4)
    over = [s > r for s, r in zip(sure, right, strict=True)]
    shade = axes.fill_between(x, right, sure, where=over, interpolate=True, color=ORANGE, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(require_matplotlib().ticker.PercentFormatter(1.0))
    axes.set_ylabel("mean over the positions")
    labels = ["right: chooses the final token", "sure: mean probability of its choice", "too sure (overconfidence)"]
    legend(axes, [a, b, shade], labels)
    return figure


def exit_figure(probe: Probe) -> Any:
    """Where tokens could leave, and up to where leaving saves FLOPs."""
    depth, mean, pays = probe.num_layers, probe.saturation.mean, probe.break_even
    figure, axes = _axes(
        probe, f"Tokens settle after {mean:.1f} of {depth} layers on average; leaving pays up to layer {pays:.1f}"
    )
    sober = [n / probe.tokens for n in probe.saturation.counts]
    best = [n / probe.tokens for n in probe.oracle.counts]
    x = range(1, depth + 1)
    bars = axes.bar([v - 0.2 for v in x], sober, 0.4, color=BLUE)
    oracle = axes.bar([v + 0.2 for v in x], best, 0.4, color=GREEN, alpha=0.55)
    center = axes.axvline(mean, color=BLUE, linewidth=1.2)
    full = axes.axvline(probe.break_even, color=ORANGE, linestyle="--", linewidth=1.8)
    axes.axvspan(0, probe.break_even, color=ORANGE, alpha=0.06, linewidth=0)
    axes.yaxis.set_major_formatter(percent())
    axes.set_ylabel("share of positions")
    axes.set_ylim(0, max(*sober, *best) * 1.15)
    labels = [
        "saturation layer: from here on every layer chooses the final token",
        f"oracle exit: first layer from {probe.min_layer} on that chooses it",
        f"mean saturation layer, {mean:.1f}",
        f"break-even, {probe.break_even:.1f}: exits to the left of it (on average) save FLOPs",
    ]
    handles, pruned = [bars, oracle, center, full], f"with {probe.default_vocabulary_size:,} tokens kept"
    if probe.break_even_default - probe.break_even < depth / 100:  # one line would hide the other
        labels[-1] += f"; {pruned}, {probe.break_even_default:.1f}"
    else:
        handles.append(axes.axvline(probe.break_even_default, color=ORANGE, linestyle=":", linewidth=2.2))
        labels.append(f"break-even {pruned} after the first test, {probe.break_even_default:.1f}")
    legend(axes, handles, labels)
    return figure


def _axes(probe: Probe, title: str) -> tuple[Any, Any]:
    """A figure with one pair of axes: layers along x, the title above and the footnote below."""
    figure = headed(title, 9, 5.6)
    axes = figure.add_subplot()
    depth = probe.num_layers
    axes.set_xticks(layer_ticks(depth, 1))
    axes.set_xlim(0.3, depth + 0.7)
    axes.set_xlabel(f"layer (layer {depth} is the full model)")
    footnote(
        figure,
        f"{probe.model} · {probe.examples} {probe.source_noun}, {probe.tokens:,} positions · exits tested after layers "
        f"{probe.min_layer} to {depth - 1}",
    )
    return figure, axes


PICTURES: dict[str, Callable[[Probe], Any]] = {
    "rank": rank_figure,
    "confidence": confidence_figure,
    "exits": exit_figure,
}

"""Results as plain text, for a terminal."""

from __future__ import annotations

import textwrap

from offramp.lm.probe import COVERAGE, TOLERANCE, Depths, Probe
from offramp.runs.tables import markdown


def probe_table(probe: Probe) -> str:
    """A row per layer (of deep models every second or third), what follows from it, and the verdict."""
    return "\n".join([*_rows(probe), "", *_summary(probe)])


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

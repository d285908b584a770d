"""Pictures of a probe, a bench and an evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.report.drawing import (
    BLUE,
    COLOURS,
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

if TYPE_CHECKING:
    from offramp.evaluation.result import Evaluation
    from offramp.evaluation.summary import ArmSummary
    from offramp.lm.bench_results import Bench
    from offramp.lm.probe_result import Probe
    from offramp.metrics.bootstrap import Interval


def save_probe(probe: Probe, folder: Path) -> list[Path]:
    """Draw all pictures of a probe (see `save_figures`)."""
    return save_figures({f"probe-{name}": partial(draw, probe) for name, draw in PICTURES.items()}, folder)


def save_bench(bench: Bench, folder: Path) -> list[Path]:
    """Draw the picture of a bench (see `save_figures`)."""
    return save_figures({"bench": partial(bench_figure, bench)}, folder)


def save_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Draw the pictures of an evaluation (see `save_figures`)."""
    drawings = {"pareto": partial(pareto_figure, evaluation), "exits": partial(histogram_figure, evaluation)}
    return save_figures({f"evaluate-{name}": draw for name, draw in drawings.items()}, folder)


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


def bench_figure(bench: Bench) -> Any:
    """Speed of every arm and peer beside the full model, and the arms' FLOPs."""
    own, others = bench.arms[::-1], bench.peers[::-1]
    arms = [*others, *own]
    colors = [GREEN for _ in others] + [GREY if arm.policy is None else BLUE for arm in own]
    conditions = bench.conditions
    figure = headed(
        f"{conditions['model']} in {conditions['dtype']}: speed and compute beside transformers' generate",
        9,
        1.9 + 0.36 * len(arms),
    )
    axes = figure.add_subplot()
    places = range(len(arms))
    ratios = [arm.ratio.median for arm in arms]
    spread = [[arm.ratio.median - arm.ratio.low for arm in arms], [arm.ratio.high - arm.ratio.median for arm in arms]]
    bars = axes.barh(places, ratios, 0.6, color=colors, alpha=0.85)
    axes.errorbar(ratios, places, xerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    work = [arm.flops_ratio for arm in own]
    flops = axes.scatter(work, places[-len(own) :], marker="D", color=ORANGE, zorder=3)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(places, [f"{arm.name}  ({arm.agreement:.0%} same)" for arm in arms])
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_xlim(0)
    axes.set_xlabel("full model = 1   (a bar right of 1 is faster, a diamond left of 1 is less work)")
    labels = ["tokens per second: median of the rounds, and quartiles", "FLOPs per token"]
    legend(axes, [bars, flops], labels, ncols=2)
    footnote(
        figure,
        f"same: positions with the full model's token · {conditions['prompts']} prompts, "
        f"{conditions['new_tokens']} tokens, {conditions['repeats']} rounds, {conditions['threads']} threads",
    )
    return figure


COST_LABELS = {
    "flops_ratio": "FLOPs (full model = 1), all parts counted",
    "flops_per_token_ratio": "FLOPs per generated token (full model = 1)",
    "seconds_ratio": "seconds (full model = 1), of arms that took turns",
}
"""Panels, by the ratio of `ArmSummary` along x."""
MOST_NAMED = 8
"""Policies that are named beside their points; of more only those on the Pareto front."""


def pareto_figure(evaluation: Evaluation) -> Any:
    """Quality over FLOPs, all and per token, and over seconds where arms took turns: policies and their baselines."""
    good, metric = evaluation.recommended(), evaluation.metric
    count = sum(not arm.is_static for arm in evaluation.arms)
    title = f"{len(good)} of {count} policies are shown to be near the full model for less" if count else "Static exits"
    conditions = evaluation.conditions
    known = pareto_costs(evaluation)
    figure = headed(f"{title}: {metric} over compute\n", max(11, 4.8 * len(known)), 5.4)
    left, *others = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    for axes, (cost, label) in zip((left, *others), known.items(), strict=True):
        _pareto(axes, evaluation, cost)
        axes.set_xlabel(label)
    _quality_axis(left, metric)
    legend(left, wide=True, ncols=8)
    footnote(
        figure,
        f"{conditions['model']} · {conditions['task']} · {conditions['examples']} examples · bars: "
        f"{conditions.get('level', 0.95):.0%} intervals",
    )
    return figure


def pareto_costs(evaluation: Evaluation) -> dict[str, str]:
    """The costs that have a panel, with what is written along it."""
    return {cost: label for cost, label in COST_LABELS.items() if evaluation.front(cost)}


def pareto_panel(evaluation: Evaluation, cost: str) -> Any:
    """One panel of `pareto_figure` alone, for pages that place them side by side or one below the other."""
    figure = headed("", 4.6, 4.8)
    axes = figure.add_subplot()
    _pareto(axes, evaluation, cost)
    axes.set_xlabel(COST_LABELS[cost])
    _quality_axis(axes, evaluation.metric)
    legend(axes, ncols=2)
    return figure


def _quality_axis(axes: Any, metric: str) -> None:
    """Upwards is better: perplexity goes down, logarithmically."""
    if metric != "perplexity":
        axes.set_ylabel(metric)
        return
    ticker = require_matplotlib().ticker
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.minorticks_off()
    axes.set_ylabel(f"{metric} (logarithmic, better above)")


def _pareto(axes: Any, evaluation: Evaluation, cost: str) -> None:
    """One panel: points with intervals, the static exits joined, the Pareto front stepped."""
    arms = [arm for arm in evaluation.arms if getattr(arm, cost) is not None]

    def put(some: list[ArmSummary], **options: Any) -> None:
        prices = [getattr(arm, cost) for arm in some]
        scores = [arm.quality[evaluation.metric] for arm in some]
        axes.errorbar(
            [p.value for p in prices], [s.value for s in scores], xerr=_whiskers(prices), yerr=_whiskers(scores),
            elinewidth=0.8, markersize=6, alpha=0.9, **options,
        )  # fmt: skip

    put([arm for arm in arms if arm.policy is None], fmt="*", color="black", label="full model", zorder=4)
    statics: dict[int | None, list[ArmSummary]] = {}
    for arm in arms:
        if arm.is_static and arm.policy is not None:
            statics.setdefault(arm.policy.get("prompt_layer"), []).append(arm)
    for (stop, some), line in zip(statics.items(), itertools.cycle(("-s", ":s")), strict=False):
        put(some, fmt=line, color=GREY, linewidth=1, label="static exits" + (f", prompt to {stop}" if stop else ""))
    dynamic: dict[str, list[ArmSummary]] = {}
    for arm in arms:
        if not arm.is_static and arm.policy is not None:
            dynamic.setdefault(arm.policy["confidence"], []).append(arm)
    markers = zip("oDv^<>PX", COLOURS, strict=True)
    for (name, some), (marker, color) in zip(dynamic.items(), itertools.cycle(markers), strict=False):
        put(some, fmt=marker, color=color, label=name)
    front = [evaluation.arm(name) for name in evaluation.front(cost)]
    axes.step(
        [getattr(arm, cost).value for arm in front], [arm.quality[evaluation.metric].value for arm in front],
        where="post", color=ORANGE, linewidth=1, linestyle="--", label="Pareto front", zorder=1,
    )  # fmt: skip
    for arm in evaluation.arms:  # the same heights in all panels, also where an arm has no such cost
        score = arm.quality[evaluation.metric]
        axes.update_datalim([(1, score.value if end is None else end) for end in (score.low, score.high)])
    axes.autoscale_view()
    full = evaluation.arms[0].quality[evaluation.metric].value
    axes.axvline(1, color=GREY, linewidth=1)
    axes.axhline(full, color=GREY, linewidth=1)
    axes.annotate("full model = 1", (1, 0.01), xycoords=("data", "axes fraction"), xytext=(-3, 0), ha="right",
                  textcoords="offset points", rotation=90, fontsize=8, color=GREY)  # fmt: skip
    _name_points(axes, evaluation, cost, front)


def _name_points(axes: Any, evaluation: Evaluation, cost: str, front: list[ArmSummary]) -> None:
    """The names of those on the front, and of all policies where they are few, beside their points."""
    policies = [arm for arm in evaluation.arms if getattr(arm, cost) is not None and not arm.is_static]
    named = front + (policies if len(policies) <= MOST_NAMED else [])
    labelled = {arm.name: arm for arm in named if arm.policy is not None}.values()
    for shift, side in ((6, "left"), (-6, "right")):  # of points below 1, and of those from 1 on
        beside = [arm for arm in labelled if (getattr(arm, cost).value < 1) == (side == "left")]
        beside.sort(key=lambda arm: arm.quality[evaluation.metric].value, reverse=evaluation.metric == "perplexity")
        for place, arm in enumerate(beside):  # from the lowest point up
            axes.annotate(  # of two neighbours the lower one's name below, the upper one's above
                arm.name, (getattr(arm, cost).value, arm.quality[evaluation.metric].value), ha=side, fontsize=8,
                xytext=(shift, (-12, 6)[place % 2]), textcoords="offset points", zorder=5,
            )  # fmt: skip


def _whiskers(intervals: list[Interval]) -> list[list[float]]:
    """Lengths below and above the estimates, [2, N]."""
    below = [0.0 if i.low is None else max(i.value - i.low, 0.0) for i in intervals]
    return [below, [0.0 if i.high is None else max(i.high - i.value, 0.0) for i in intervals]]


def histogram_figure(evaluation: Evaluation) -> Any:
    """Where tokens left: share of the tokens by layer, a row per policy; static exits would only say their layer."""
    arms, depth = [arm for arm in evaluation.arms if not arm.is_static] or evaluation.arms, evaluation.num_layers
    figure = headed(f"Where tokens leave the {depth} layers", 9, 1.6 + 0.36 * len(arms))
    axes = figure.add_subplot()
    first = depth + 1 - max(len(arm.histogram) for arm in arms)  # 0 where a drafter drafted
    counts = [[0] * (depth + 1 - first - len(arm.histogram)) + arm.histogram for arm in arms]
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    picture = axes.imshow(
        shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=(first - 0.5, depth + 0.5, len(arms) - 0.5, -0.5)
    )
    axes.plot([arm.exit_layer.value for arm in arms], range(len(arms)), "|", color=ORANGE, markersize=14, mew=2)
    axes.set_xticks(layer_ticks(depth, first))
    axes.set_yticks(range(len(arms)), [f"{arm.name}  (mean {arm.exit_layer.value:.1f})" for arm in arms])
    axes.set_xlabel("layer after which tokens left (mark: mean)")
    axes.grid(visible=False)
    figure.colorbar(picture, ax=axes, format=percent(), label="share of the tokens", shrink=0.8)
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
"""By the name that the file gets: probe-NAME.svg."""

"""Pictures that commands draw into a run's folder: of a bench, an evaluation and a calibration."""

from __future__ import annotations

import itertools
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
    from offramp.calibration.result import Calibration
    from offramp.evaluation.result import Evaluation
    from offramp.evaluation.summary import ArmSummary
    from offramp.lm.bench_results import Bench
    from offramp.metrics.intervals import Interval


def save_bench(bench: Bench, folder: Path) -> list[Path]:
    """Draw the picture of a bench (see `save_figures`)."""
    return save_figures({"bench": partial(bench_figure, bench)}, folder)


def save_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Draw the pictures of an evaluation (see `save_figures`)."""
    drawings = {"pareto": partial(pareto_figure, evaluation), "exits": partial(histogram_figure, evaluation)}
    return save_figures({f"evaluate-{name}": draw for name, draw in drawings.items()}, folder)


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


"""By the name that the file gets: probe-NAME.svg."""


# ---------------------------------------------------------------- a calibration


SMALLEST = 1e-6
"""P-values below are drawn there."""


def save_calibration(calibration: Calibration, folder: Path) -> list[Path]:
    """Draw the picture, if settings were tested (see `save_figures`)."""
    tested = {"calibrate": partial(calibration_figure, calibration)} if calibration.certificate.tests else {}
    return save_figures(tested, folder)


def calibration_figure(calibration: Calibration) -> Any:
    """Mean loss and p-value of the settings that were looked at, with the lines that they must stay below."""
    certificate, promise = calibration.certificate, calibration.certificate.promise
    tests = certificate.tests
    chosen = None if certificate.selected is None else tests[certificate.selected]["name"]
    nothing = "Nothing certified costs less than the full model" if certificate.pays_nothing else "Nothing is certified"
    title = nothing if chosen is None else f"Certified: {chosen}"
    figure = headed(title, 9, 6.4)
    losses, p_values = figure.subplots(2, 1, sharex=True)
    numbers = calibration.settings
    groups: dict[int, list[int]] = {}  # tests by their setting's minimum layer and vocabulary size
    for place, test in enumerate(tests):
        groups.setdefault(numbers[test["setting"]].chain, []).append(place)
    for chain, places in groups.items():
        color = COLOURS[chain % 6]
        name = numbers[tests[places[0]]["setting"]].name if len(groups) > 1 else None
        label = None if name is None else name.partition(", ")[2] or name
        losses.plot(places, [tests[i]["loss"] for i in places], "-o", color=color, markersize=4, label=label)
        p_values.plot(places, [max(tests[i]["p_value"], SMALLEST) for i in places], "-o", color=color, markersize=4)
    crc = promise.bound == "crc"
    for axes, key, line, what in (
        (losses, "loss", promise.tolerance, "tolerance"),
        (p_values, "p_value", promise.tolerance if crc else certificate.level, "tolerance" if crc else "level"),
    ):
        axes.axhline(line, color=GREY, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"{what} {line:.3g}", (1, line), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right", fontsize=8,
            textcoords="offset points", color=GREY,
        )  # fmt: skip
        if certificate.selected is not None:
            value = max(tests[certificate.selected][key], SMALLEST if key == "p_value" else 0)
            axes.plot([certificate.selected], [value], "o", markersize=11, mfc="none", color="black", label="chosen")
    if len(groups) > 1 or chosen is not None:
        legend(losses, ncols=6)
    losses.set_ylabel("mean loss")
    p_values.set_ylabel("mean for conformal risk control" if crc else "p-value")
    if not crc:
        p_values.set_yscale("log")
    p_values.set_xticks(range(len(tests)), [test["name"] for test in tests], rotation=35, ha="right", fontsize=8)
    footnote(
        figure,
        f"{certificate.conditions['model']} · {certificate.conditions['task']['name']} · {promise.kind} losses of "
        f"{promise.metric} · bound {promise.bound} · {certificate.n} certification {promise.unit}s · in order of tests",
    )
    return figure

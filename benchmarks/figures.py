"""Redo figures 4 to 9 and table 1 of "Early Exit LLMs" from evaluations over several minimum exit layers.

    python benchmarks/figures.py EVALUATION.json [EVALUATION.json ...] --out FOLDER

The evaluations are of the same model and examples; together they have softmax, contrastive and jsd at each minimum
layer, softmax and jsd with each kind of pruning too. What is missing is left out. Every figure of the document stands
for one minimum layer of one model; here all minimum layers are shown, so that none has to be chosen.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from offramp.evaluation import FULL, ArmSummary, Evaluation
from offramp.metrics.intervals import Interval
from offramp.report.drawing import BLUE, GREEN, GREY, ORANGE, footnote, headed, save_figures
from offramp.runs.tables import markdown

PRUNING = (None, "fixed", "decaying", "adaptive")
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9")
Rule = tuple[str, str | None]
"""A measure, and a kind of pruning."""

PICTURES: dict[str, tuple[str, tuple[Rule, ...]]] = {
    "4-5-pruning": (
        "Figures 4 and 5: pruning the vocabulary of the softmax test", tuple(("softmax", kind) for kind in PRUNING)
    ),
    "8-9-jsd": (
        "Figures 8 and 9: the tests of the baselines beside JSD with pruning",
        (("softmax", None), ("softmax", "fixed"), ("softmax", "decaying"), ("jsd", None), ("jsd", "adaptive")),
    ),
}  # fmt: skip
MEASURES: tuple[Rule, ...] = (("softmax", None), ("contrastive", None), ("jsd", None))


def together(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The arms of evaluations of the same examples, each once."""
    first, *others = evaluations
    same = ("model", "task", "data", "examples", "limit", "seed", "dtype", "max_new_tokens")
    for other in others:
        if different := [key for key in same if first.conditions.get(key) != other.conditions.get(key)]:
            raise SystemExit(f"the evaluations differ in {', '.join(different)}; give some of the same examples")
    arms = {arm.name: arm for evaluation in evaluations for arm in evaluation.arms}
    return Evaluation(first.conditions, first.metric, first.num_layers, list(arms.values()))


def by_layer(evaluation: Evaluation, rule: Rule) -> dict[int, ArmSummary]:
    """The arms of a measure with a kind of pruning, by their minimum layer."""
    found = {}
    for arm in evaluation.arms:
        policy = arm.policy or {}
        if (policy.get("confidence"), policy.get("vocabulary")) == rule and policy["min_layer"] is not None:
            found[policy["min_layer"]] = arm
    return dict(sorted(found.items()))


def named(rule: Rule) -> str:
    """As in the tables of an evaluation."""
    return rule[0] if rule[1] is None else f"{rule[0]} + {rule[1]}"


# ---------------------------------------------------------------- pictures


def readouts(arm: ArmSummary) -> Interval:
    """FLOPs of readouts, pruned or not, over the full model's whole: about what the document calls FLOPs."""
    return Interval(sum(arm.parts[part] for part in ("readout", "pruned_readout", "select")), None, None)


def bars(evaluation: Evaluation, title: str, rules: Sequence[Rule]) -> Any:
    """Quality, FLOPs of the readouts and FLOPs of everything: a group of bars per minimum layer, a bar per rule."""
    panels = (
        (evaluation.metric, lambda arm: arm.quality[evaluation.metric]),
        ("FLOPs of readouts after the prompt\n(full model's whole = 1)", readouts),
        ("FLOPs, all parts (full model = 1)", lambda arm: arm.flops_ratio),
    )
    figure = drawn_on(evaluation, title, width=13)
    arms = {rule: found for rule in rules if (found := by_layer(evaluation, rule))}
    layers = sorted({layer for found in arms.values() for layer in found})
    for axes, (label, value) in zip(figure.subplots(1, 3), panels, strict=True):
        width = 0.8 / len(arms)
        for place, (rule, found) in enumerate(arms.items()):
            x = [layers.index(layer) + (place - (len(arms) - 1) / 2) * width for layer in found]
            heights = [value(arm) for arm in found.values()]
            axes.bar(
                x, [height.value for height in heights], width, yerr=whiskers(heights), color=COLOURS[place],
                error_kw={"elinewidth": 0.8}, label=named(rule),
            )  # fmt: skip
        axes.axhline(value(evaluation.arm(FULL)).value, color=GREY, linestyle="--", linewidth=1.2, label=FULL)
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_xlabel("minimum exit layer")
        axes.set_ylabel(label)
    figure.axes[0].legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), fontsize=9, ncols=7).set_in_layout(False)
    return figure


def lines(evaluation: Evaluation) -> Any:
    """Mean exit layer and quality over the minimum layer, a line per measure."""
    figure = drawn_on(evaluation, "Figures 6 and 7: contrastive measures and the minimum exit layer", width=11)
    left, right = figure.subplots(1, 2)
    panels = (
        (left, "mean exit layer", lambda arm: arm.exit_layer),
        (right, evaluation.metric, lambda arm: arm.quality[evaluation.metric]),
    )
    for axes, label, value in panels:
        for (rule, marker), colour in zip(zip(MEASURES, "osD", strict=True), COLOURS, strict=False):
            if found := by_layer(evaluation, rule):
                points = [value(arm) for arm in found.values()]
                axes.errorbar(
                    list(found), [point.value for point in points], yerr=whiskers(points), fmt=f"-{marker}",
                    color=colour, elinewidth=0.8, markersize=5, label=named(rule),
                )  # fmt: skip
        axes.axhline(value(evaluation.arm(FULL)).value, color=GREY, linestyle="--", linewidth=1.2, label=FULL)
        axes.set_xticks(sorted({layer for rule in MEASURES for layer in by_layer(evaluation, rule)}))
        axes.set_xlabel("minimum exit layer")
        axes.set_ylabel(label)
    left.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), fontsize=9, ncols=5).set_in_layout(False)
    return figure


def drawn_on(evaluation: Evaluation, title: str, width: float) -> Any:
    """An empty figure with a title and a footnote."""
    figure = headed(f"{title}\n", width, 4.8)
    conditions = evaluation.conditions
    footnote(
        figure,
        f"{conditions['task']} · {conditions['examples']} examples · {evaluation.num_layers} layers · whiskers: "
        f"{conditions.get('level', 0.95):.0%} intervals",
    )
    return figure


def whiskers(intervals: Sequence[Interval]) -> list[list[float]]:
    """Lengths below and above the estimates, [2, N]."""
    below = [0.0 if i.low is None else max(i.value - i.low, 0.0) for i in intervals]
    return [below, [0.0 if i.high is None else max(i.high - i.value, 0.0) for i in intervals]]


# ---------------------------------------------------------------- the table


def table(evaluation: Evaluation) -> str:
    """Table 1: JSD with each kind of pruning, mean and standard deviation over the minimum layers."""
    scale = 1 if evaluation.metric.endswith("(corpus)") else 100
    rows = []
    for kind in PRUNING:
        if found := list(by_layer(evaluation, ("jsd", kind)).values()):
            columns = (
                [arm.exit_layer.value for arm in found],
                [arm.quality[evaluation.metric].value * scale for arm in found],
                [arm.flops_ratio.value for arm in found],
            )
            rows.append(
                [named(("jsd", kind)), *(mean_and_deviation(c, d) for c, d in zip(columns, (2, 1, 3), strict=True))]
            )
    return markdown(["table 1", "exit layer", evaluation.metric, "FLOPs (full model = 1)"], rows)


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Over the minimum layers, which are not draws of anything: no interval."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    """Draw, and print the table."""
    parser = argparse.ArgumentParser(description='Redo figures 4 to 9 and table 1 of "Early Exit LLMs".')
    parser.add_argument("evaluations", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    evaluation = together([
        Evaluation.from_dict(json.loads(path.read_text(encoding="utf-8"))) for path in options.evaluations
    ])  # fmt: skip
    drawings = {
        f"figures-{name}": partial(bars, evaluation, title, rules)
        for name, (title, rules) in PICTURES.items()
        if any(by_layer(evaluation, rule) for rule in rules)
    }
    save_figures({**drawings, "figures-6-7-measures": partial(lines, evaluation)}, options.out)
    layers = sorted({layer for rule in MEASURES for layer in by_layer(evaluation, rule)})
    print(table(evaluation))
    print(f"\nMeans and standard deviations over the minimum exit layers {', '.join(map(str, layers))}.")


if __name__ == "__main__":
    main()

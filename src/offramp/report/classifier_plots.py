"""Pictures of calibrated exits: how well calibrated each exit is, and quality over cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.report.drawing import BLUE, COLOURS, GREY, ORANGE, footnote, headed, legend, percent, save_figures

if TYPE_CHECKING:
    from offramp.classifiers.evaluate import Method
    from offramp.classifiers.result import ClassifierEvaluation

CURVES = {"top1": "Top-1 accuracy", "nlpd": "NLPD (nats)", "ece": "expected calibration error"}
"""Drawn over cost, by metric."""
MOST_EXITS = 8


def save_classifiers(evaluation: ClassifierEvaluation, folder: Path) -> list[Path]:
    """Draw a reliability diagram and curves over cost for each test set (see `save_figures`)."""
    drawings: dict[str, Callable[[], Any]] = {}
    for test in evaluation.tests:
        name = "".join(c if c.isalnum() else "-" for c in test)
        drawings[f"classify-reliability-{name}"] = partial(reliability_figure, evaluation, test)
        drawings[f"classify-curves-{name}"] = partial(curves_figure, evaluation, test)
    return save_figures(drawings, folder)


def reliability_figure(evaluation: ClassifierEvaluation, test: str) -> Any:
    """Accuracy over confidence in bins, a panel per method and exit, of the first seed; too sure below the diagonal."""
    names = [name for name in evaluation.methods(test) if not name.startswith(("static", "full"))]
    methods = [evaluation.of(test, name)[0] for name in names]
    exits = _some(len(methods[0].alone))
    size = (1.6 + 1.75 * len(exits), 1.6 + 1.75 * len(names))
    figure = headed("Accuracy over confidence at each exit: too sure below the diagonal", *size)
    panels = figure.subplots(len(names), len(exits), sharex=True, sharey=True, squeeze=False)
    for row, method in zip(panels, methods, strict=True):
        for axes, exit_ in zip(row, exits, strict=True):
            _reliability(axes, method, exit_)
        row[0].set_ylabel(f"{method.name}\naccuracy", fontsize=9)
    for axes, exit_ in zip(panels[0], exits, strict=True):
        axes.set_title(f"exit {exit_ + 1}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("confidence", fontsize=9)
    footnote(figure, f"{_what(evaluation, test)} · dots: bins, area by rows")
    return figure


def _reliability(axes: Any, method: Method, exit_: int) -> None:
    bins = method.reliability[exit_]
    total = sum(rows for _, _, rows, _, _ in bins)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
    sure, right = [b[3] for b in bins], [b[4] for b in bins]
    axes.vlines(sure, right, sure, color=ORANGE, linewidth=1.2, alpha=0.7)
    axes.scatter(sure, right, s=[4 + 160 * b[2] / total for b in bins], color=BLUE, alpha=0.85, linewidth=0, zorder=3)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    ece = method.alone[exit_].metrics["ece"]
    axes.annotate(f"ECE {ece:.3f}", (0.04, 0.96), xycoords="axes fraction", va="top", fontsize=8)


def curves_figure(evaluation: ClassifierEvaluation, test: str) -> Any:
    """Accuracy, NLPD and calibration error over realised FLOPs, both averaged over seeds budget by budget."""
    figure = headed(f"Quality over cost on {test}: every method at 39 budgets\n\n", 13, 4.8)
    panels = figure.subplots(1, len(CURVES))
    colours = iter(COLOURS * 2)
    for name in evaluation.methods(test):
        found = evaluation.of(test, name)
        style = _style(found[0], colours)
        for axes, metric in zip(panels, CURVES, strict=True):
            costs, values = (
                [sum(column) / len(column) for column in zip(*rows, strict=True)]
                for rows in (
                    [[p.cost / m.full_cost for p in m.points] for m in found],
                    [[p.metrics[metric] for p in m.points] for m in found],
                )
            )
            axes.plot(costs, values, label=name, **style)
    for axes, (metric, label) in zip(panels, CURVES.items(), strict=True):
        axes.set_ylabel(label)
        axes.set_xlabel(f"realised FLOPs per row ({evaluation.unit} = 1)")
        axes.set_xlim(left=0)
        if metric == "top1":
            axes.yaxis.set_major_formatter(percent())
    legend(panels[0], wide=True, fontsize=8, ncols=5)
    footnote(figure, _what(evaluation, test))
    return figure


def _style(method: Method, colours: Any) -> dict[str, Any]:
    """Methods in colour, static exits as grey steps, full models as stars."""
    if not method.is_curve:
        return {"linestyle": "", "marker": "*", "markersize": 9, "color": _shade(method)}
    if method.name.startswith("static"):
        return {"linestyle": "", "marker": "s", "markersize": 4, "color": _shade(method)}
    return {"linewidth": 1.6, "color": next(colours)}


def _shade(method: Method) -> str:
    return "#aaaaaa" if method.name.endswith("vanilla") else "#333333"


def _some(exits: int) -> list[int]:
    """All exits, or some evenly spread ones with the first and the last."""
    if exits <= MOST_EXITS:
        return list(range(exits))
    return sorted({round(place * (exits - 1) / (MOST_EXITS - 1)) for place in range(MOST_EXITS)})


def _what(evaluation: ClassifierEvaluation, test: str) -> str:
    model = evaluation.conditions.get("model", "")
    seeds = f"{len(evaluation.seeds)} training seed{'s' * (len(evaluation.seeds) > 1)}"
    return " · ".join([part for part in (model, test, seeds) if part])

"""Pictures of the page on fair distillation."""

from __future__ import annotations

from typing import Any

import numpy as np

from offramp.report.drawing import BLUE, GREEN, GREY, ORANGE, footnote, headed
from offramp.report.grids import by_method, worst

COLOURS = (BLUE, ORANGE, GREEN, GREY, "black", "purple")
"""Of groups; where there are more groups, the best, the mean and the worst are drawn."""


def worst_figure(results: list[dict[str, Any]], rule: str, study: str) -> Any:
    """Worst groups of all runs by method, a colour for each teacher."""
    names = list(dict.fromkeys(r["name"] for r in results))
    figure = headed(f"{study}: the worst group of every run", 8, 0.28 * len(names) + 1.5)
    axes = figure.subplots()
    for at, (teacher, colour) in enumerate(((None, GREY), ("erm", ORANGE), ("group_dro", BLUE))):
        own = {n: [r for r in results if r["name"] == n and r["teacher"] == teacher] for n in names}
        for y, name in enumerate(names):
            if own[name]:
                values = worst(own[name], rule)
                axes.plot(values, [y + 0.2 * (at - 1)] * len(values), "o", color=colour, markersize=3, alpha=0.6)
                axes.plot([values.mean()], [y + 0.2 * (at - 1)], "|", color=colour, markersize=10, markeredgewidth=2)
        axes.plot([], [], "o", color=colour, label="no teacher" if teacher is None else f"{teacher} teacher")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy of the worst group")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), fontsize=8, ncols=3)
    axes.grid(axis="x", alpha=0.3)
    footnote(figure, "a dot is a run, a line the mean over seeds")
    return figure


def exits_figure(results: list[dict[str, Any]], study: str) -> Any:
    """Accuracy of each exit by group, of plain training, distillation and DEDIER."""
    own = by_method(results, "erm")
    shown = [name for name in ("erm", "kd", "dedier") if name in own]
    figure = headed(f"{study}: groups at every exit", 3.2 * max(len(shown), 1) + 2, 3.5)
    for axes, name in zip(np.atleast_1d(figure.subplots(1, max(len(shown), 1), sharey=True)), shown, strict=False):
        table = np.mean([r["exits"]["accuracy"] for r in own[name]], 0)  # [E, G]
        groups = own[name][0]["groups"]
        counted = zip(groups["names"], groups["test"], strict=True)
        lines = {f"{group}, n = {n:,}": table[:, g] for g, (group, n) in enumerate(counted)}
        if len(lines) > len(COLOURS):
            lines = {"best group": table.max(1), "worst group": table.min(1), "mean": table.mean(1)}
        for (label, values), colour in zip(lines.items(), COLOURS, strict=False):
            axes.plot(range(1, len(table) + 1), values, "o-", color=colour, label=label)
        axes.set_title(name)
        axes.set_xlabel("exit")
        axes.set_xticks(range(1, len(table) + 1))
    figure.axes[0].set_ylabel("test accuracy")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    footnote(figure, "biased teacher; means over seeds; n: test rows of the first seed")
    return figure

"""Pictures of groups: how each is served, where each leaves, and what its rows weigh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from offramp.metrics.group_exits import ExitsByGroup
from offramp.metrics.group_members import Groups
from offramp.metrics.groups import GroupReport
from offramp.report.drawing import BLUE, GREEN, GREY, ORANGE, footnote, headed, legend, percent

COLOURS = (BLUE, ORANGE, GREEN, GREY)
"""Of the models in one picture, in turn."""
UPRIGHT = 8
"""Most groups whose bars stand side by side; those of more lie one below the other."""


def groups_figure(reports: Mapping[str, GroupReport], whiskers: str = "Wilson intervals") -> Any:
    """Accuracy of the same groups with their intervals, by model; lines at the models' averages."""
    first = next(iter(reports.values()))
    names = [group.name for group in first.groups]
    upright = len(names) <= UPRIGHT
    size = (max(6.0, 2.4 + 1.3 * len(names)), 5.0) if upright else (9.0, 1.6 + (0.2 + 0.12 * len(reports)) * len(names))
    figure = headed(_worst(reports), *size)
    axes = figure.add_subplot()
    width = 0.8 / len(reports)
    for place, (model, report) in enumerate(reports.items()):
        colour = COLOURS[place % len(COLOURS)]
        x = np.arange(len(names)) - 0.4 + width * (place + 0.5)
        values = [group.accuracy for group in report.groups]
        ends = [
            [max(g.accuracy - g.right.low, 0.0) for g in report.groups],
            [max(g.right.high - g.accuracy, 0.0) for g in report.groups],
        ]
        whisker: dict[str, Any] = {"fmt": "none", "ecolor": "black", "elinewidth": 1, "capsize": 2}
        if upright:
            axes.bar(x, values, 0.92 * width, color=colour, label=model)
            axes.errorbar(x, values, yerr=ends, **whisker)
            axes.axhline(report.average, color=colour, linewidth=0.8, linestyle=":")
        else:
            axes.barh(x, values, 0.92 * width, color=colour, label=model)
            axes.errorbar(values, x, xerr=ends, **whisker)
            axes.axvline(report.average, color=colour, linewidth=0.8, linestyle=":")
    if upright:
        axes.set(ylim=(0, 1.02), ylabel="accuracy")
        axes.set_xticks(range(len(names)), [f"{g.name}\nn = {g.n:,}".replace(", ", ",\n", 1) for g in first.groups])
        axes.yaxis.set_major_formatter(percent())
    else:
        axes.set(xlim=(0, 1.02), xlabel="accuracy")
        axes.set_yticks(range(len(names)), [f"{g.name}, n = {g.n:,}" for g in first.groups])
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(percent())
    legend(axes, ncols=4)
    footnote(figure, f"{first.split}, {first.n:,} rows · whiskers: {whiskers}; dotted: average over all rows")
    return figure


def exits_figure(exits: ExitsByGroup, model: str = "") -> Any:
    """Exit x group: accuracy as colour, and in each cell accuracy, confidence and the share that leaves there."""
    depth = exits.depth.tolist()
    slowest, fastest = (exits.names[depth.index(choose(depth))] for choose in (max, min))
    count, groups = exits.accuracy.shape
    width = max(7, 3 + 1.5 * count + 0.08 * max(map(len, exits.names)))
    begin = f"{model}: latest" if model else "Latest"
    said = f"{begin} to leave: {slowest}, exit {max(depth):.2f} on average\nEarliest: {fastest}, exit {min(depth):.2f}"
    if max(depth) == min(depth):
        said = f"{model}{', all' if model else 'All'} groups leave at exit {max(depth):.2f} on average"
    figure = headed(said, width, 2 + 0.6 * groups)
    axes = figure.add_subplot()
    picture = axes.imshow(exits.accuracy.T.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    for e in range(count):
        for g in range(groups):
            axes.text(
                e, g, f"{exits.accuracy[e, g]:.0%} | {exits.confidence[e, g]:.0%}\n{exits.exit_rate[e, g]:.0%} leave",
                ha="center", va="center", fontsize=8, color="white" if exits.accuracy[e, g] < 0.6 else "black",
            )  # fmt: skip
    axes.set_xticks(range(count), [f"exit {e + 1}\n{cost:.3g} FLOPs" for e, cost in enumerate(exits.costs.tolist())])
    axes.set_yticks(
        range(groups), [f"{name}\nn = {int(n):,}" for name, n in zip(exits.names, exits.counts, strict=True)]
    )
    axes.grid(visible=False)
    figure.colorbar(picture, ax=axes, format=percent(), label="accuracy if all left here", shrink=0.8)
    footnote(figure, "in a cell: accuracy | mean confidence, and share of the group's rows that leave there")
    return figure


def weights_figure(weights: Tensor, groups: Groups, *, epoch: int, model: str = "") -> Any:
    """Histograms of the weights [N], above 0, of each group's rows after an epoch, one below the other."""
    means = {
        n: float(weights[i].double().mean()) for n, i in zip(groups.names, groups.members.T, strict=True) if i.any()
    }
    heaviest = max(means, key=lambda name: means[name])
    begin = f"{model}{', epoch' if model else 'Epoch'} {epoch}"
    figure = headed(
        f"{begin}: {heaviest} weigh most, {means[heaviest]:.2f} on average", 8, 1.4 + 1.1 * len(groups.names)
    )
    values = weights.double().numpy()
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high if high > low else low + 1, 41)
    panels = figure.subplots(len(groups.names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name, inside in zip(panels, groups.names, groups.members.T, strict=True):
        rows = values[inside.numpy()]
        axes.hist(rows, edges, weights=np.full(len(rows), 1 / max(len(rows), 1)), color=BLUE)
        if name in means:
            axes.axvline(means[name], color=ORANGE, linewidth=1.5)
        axes.set_yscale("log")
        axes.set_ylim(5e-4, 1.5)
        axes.set_yticks([0.001, 0.01, 0.1, 1], ["0.1%", "1%", "10%", "100%"])
        axes.minorticks_off()
        axes.set_title(f"{name}, n = {len(rows):,}", loc="left", fontsize=9)
    panels[-1].set_xlabel("weight")
    footnote(figure, "share of each group's rows, on a logarithmic scale; line: mean weight")
    return figure


def _worst(reports: Mapping[str, GroupReport]) -> str:
    said = [
        f"{model} {report.worst.accuracy:.0%}" for model, report in reports.items() if report.worst is not None
    ]  # fmt: skip
    return f"Worst group: {', '.join(said)}" if said else "All groups are too small to call one the worst"

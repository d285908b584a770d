"""Pictures and pages of fair distillation: a grid of methods, teachers and seeds, and one of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from offramp.distillation.judging import kept_weights
from offramp.distillation.results import (
    Result,
    budget_of,
    budgets_of,
    changes_of,
    epochs_of,
    exits_of,
    mean_exits,
    mean_report,
    readouts_of,
    report_of,
    results_in,
    selected_by,
    truncated_in,
    weights_of,
)
from offramp.metrics.group_effects import ExitsByGroup
from offramp.metrics.groups import GroupReport, Groups
from offramp.report.blocks import Block, Page, Picture, Section, Text, draw, repeat
from offramp.report.drawing import BLUE, GREEN, GREY, ORANGE, footnote, headed, legend, percent
from offramp.report.grids import by_method, tables_of, teachers_of
from offramp.report.groups import (
    budgets_table,
    changes_table,
    exits_table,
    groups_table,
    selection_table,
    weights_table,
)
from offramp.runs.resume import differences
from offramp.runs.tables import Table

PICTURED = ("erm", "kd", "dedier", "laplace")
"""Methods in the pictures of a grid that has more than these; others take the places of those it lacks."""


def is_grid(folder: Path) -> bool:
    """Whether a folder holds runs of `offramp distill`, finished or not."""
    return any((folder / "runs").glob("*--seed*/config.json"))


def grid_page(folder: Path) -> Page:
    """The page of a grid: for each teacher the tables that `offramp distill` prints, with pictures of some methods."""
    results, unfinished = results_in(folder)
    if not results:
        raise ValueError(f"no run in {folder} is finished; start offramp distill again with the same options to go on")
    sections = [Section("What was run", _about(results, unfinished))]
    for teacher in teachers_of(results):
        methods, rule = by_method(results, teacher), selected_by(results[0])
        named = f"Teacher {teacher}: " if teacher else ""
        shown = _pictured(list(methods))
        pictures = {
            "Every group": [_groups({name: methods[name] for name in shown}, rule)],
            "Exits by group": [_exits(name, methods[name]) for name in shown],
            "Weights of training rows": [
                picture for name in shown if (picture := _weights(name, folder / "runs" / methods[name][0]["key"]))
            ],
        }
        for table in tables_of(methods, rule):
            title = named + (table.title[0].lower() + table.title[1:] if named else table.title)
            sections.append(Section(title, [*pictures.get(table.title, []), table]))
    study = results[0]["study"]
    sections.append(repeat({"data": study["data"]["path"], "select": study["select"]}, study))
    return Page(f"Fair distillation: {study['data']['path']}", str(folder), sections)


def run_page(folder: Path, values: dict[str, Any]) -> Page:
    """The page of one run, from its result.json."""
    rule = selected_by(values)
    says = f"Epoch {values['selected']} of {len(values['history'])}, chosen by {rule}."
    if values["flip_rate"] is not None:
        flips = values["flip_rate"]
        says += (
            f" The answer changes with the attribute alone for {flips['value']:.1%} of the things shown twice "
            f"({flips['low']:.1%} to {flips['high']:.1%})."
        )
    blocks: list[Block] = [Text((says, *truncated_in([values]))), _groups({values["name"]: [values]}, rule)]
    sections = [Section("Every group", [*blocks, groups_table(report_of(values))])]
    if changes := changes_of(values):
        sections.append(_section(changes_table(changes)))
    sections.append(_section(exits_table(exits_of(values)), _exits(values["name"], [values])))
    if budgets := budgets_of(values):
        sections.append(_section(budgets_table(budgets, values["groups"]["names"])))
    if weights := weights_of(values):
        sections.append(_section(weights_table(weights, readouts_of(values)), _weights(values["name"], folder)))
    sections.append(_section(selection_table(epochs_of(values))))
    sections.append(Section("Where group labels were used", [Text((budget_of(values).line(),))]))
    about = {
        "method": values["name"], "teacher": values["teacher"], "seed": values["seed"],
        "parameters": f"{values['parameters']:,}", "seconds": f"{values['seconds']['wall']:.0f}",
    }  # fmt: skip
    config = {name: values[name] for name in ("study", "method")}
    return Page(f"Distilled: {values['key']}", str(folder), [*sections, repeat(about, config)])


# ---------------------------------------------------------------- its parts


def _about(results: Sequence[Result], unfinished: Sequence[str]) -> list[Block]:
    study = results[0]["study"]
    seeds = sorted({result["seed"] for result in results})
    hours = sum(result["seconds"]["wall"] for result in results) / 3600
    blocks: list[Block] = [
        Text((
            f"Student {study['student']['source']}, teacher {study['teacher']['source']}; "
            f"{len({result['name'] for result in results})} methods, seeds {', '.join(map(str, seeds))}; "
            f"{len(results)} runs in {hours:.2f} hours.",
        ))
    ]  # fmt: skip
    apart = [found for result in results if (found := differences(study, result["study"]))]
    if apart:
        words = f"{len(apart)} runs are of another study ({apart[0][0]}): they differ in more than the method."
        blocks.append(Text((words,), "bad"))
    if unfinished:
        some = ", ".join(unfinished[:5]) + (", …" if len(unfinished) > 5 else "")
        blocks.append(Text((f"Not finished, and left out here: {len(unfinished)} runs ({some}).",), "bad"))
    return blocks


def _pictured(names: list[str]) -> list[str]:
    """As many methods as a picture has colours, in their order."""
    first = [name for name in PICTURED if name in names]
    kept = [*first, *(name for name in names if name not in first)][: len(COLOURS)]
    return [name for name in names if name in kept]


def _section(table: Table, picture: Picture | None = None) -> Section:
    return Section(table.title, [*([picture] if picture else []), table])


def _groups(methods: dict[str, list[Result]], rule: str) -> Picture:
    reports = {name: mean_report(own, rule) for name, own in methods.items()}
    several = any(len(own) > 1 for own in methods.values())
    whiskers = "t intervals over seeds" if several else "Wilson intervals"
    figure = partial(groups_figure, reports, whiskers)
    return draw(figure, f"Accuracy of every group with its interval: {', '.join(reports)}")


def _exits(name: str, own: Sequence[Result]) -> Picture:
    figure = partial(exits_figure, mean_exits(own), name)
    return draw(figure, f"Accuracy, confidence and share of leavers of every exit by group: {name}")


def _weights(name: str, folder: Path) -> Picture | None:
    """Of one run, where its weights were kept."""
    if (kept := kept_weights(folder)) is None:
        return None
    weights, groups, epoch = kept
    figure = partial(weights_figure, weights, groups, epoch=epoch, model=name)
    return draw(figure, f"Weights of the training rows by group after epoch {epoch}: {folder.name}")


# ---------------------------------------------------------------- pictures

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

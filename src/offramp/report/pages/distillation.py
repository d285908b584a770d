"""The pages of fair distillation: a grid of methods, teachers and seeds, and one of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from offramp.report import group_plots
from offramp.report.grids import by_method, tables_of, teachers_of
from offramp.report.groups import (
    budgets_table,
    changes_table,
    exits_table,
    groups_table,
    selection_table,
    weights_table,
)
from offramp.report.pages.blocks import Block, Page, Picture, Section, Text, draw, repeat
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
    kept = [*first, *(name for name in names if name not in first)][: len(group_plots.COLOURS)]
    return [name for name in names if name in kept]


def _section(table: Table, picture: Picture | None = None) -> Section:
    return Section(table.title, [*([picture] if picture else []), table])


def _groups(methods: dict[str, list[Result]], rule: str) -> Picture:
    reports = {name: mean_report(own, rule) for name, own in methods.items()}
    several = any(len(own) > 1 for own in methods.values())
    whiskers = "t intervals over seeds" if several else "Wilson intervals"
    figure = partial(group_plots.groups_figure, reports, whiskers)
    return draw(figure, f"Accuracy of every group with its interval: {', '.join(reports)}")


def _exits(name: str, own: Sequence[Result]) -> Picture:
    figure = partial(group_plots.exits_figure, mean_exits(own), name)
    return draw(figure, f"Accuracy, confidence and share of leavers of every exit by group: {name}")


def _weights(name: str, folder: Path) -> Picture | None:
    """Of one run, where its weights were kept."""
    if (kept := kept_weights(folder)) is None:
        return None
    weights, groups, epoch = kept
    figure = partial(group_plots.weights_figure, weights, groups, epoch=epoch, model=name)
    return draw(figure, f"Weights of the training rows by group after epoch {epoch}: {folder.name}")

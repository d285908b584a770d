"""The page of a training run: what was trained, what each exit reached, the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from offramp.report import training_plots
from offramp.report.pages.blocks import Block, Page, Section, Text, draw, facts, repeat
from offramp.runs.folder import RunFolder
from offramp.runs.tables import Table
from offramp.training.consistency import OBJECTIVES

SAID = ("trainable", "objective", "rank", "lora_rank", "weights", "learning_rate", "batch_size", "seed")
"""Options named at the beginning; the others stand at the end."""


def page(folder: Path, config: dict[str, Any]) -> Page:
    """The page of a training run, finished or not, from its config.json."""
    rows = measured(folder)
    steps, judged = ([row for row in rows if row["kind"] == kind] for kind in ("step", "validation"))
    options, layers = config["config"], config["config"]["layers"]
    drafter = options.get("trainable") == "drafter"
    said = {name: options.get(name) for name in SAID}
    if drafter:
        layers = list(range(1, options["unroll"] + 1))
    curves = training_plots.Curves(
        model=config["model"]["name"], layers=layers, steps=steps, validations=judged,
        what="accuracy" if options["objective"] in OBJECTIVES else "agreement",
        each="draft in a row" if drafter else "exit after layer",
    )  # fmt: skip
    conditions = {
        "model": config["model"]["name"], "weights": config["model"]["fingerprint"], "dtype": config["model"]["dtype"],
        **config.get("about", {}), **config["data"],
    }  # fmt: skip
    return Page(
        f"Training: {config['model']['name']}, {options['objective']}",
        str(folder),
        [
            Section(
                "What the drafter reached" if drafter else "What each exit reached",
                [
                    *how_far(rows, config, options),
                    _table(curves),
                    draw(
                        partial(training_plots.layers_figure, curves),
                        f"{curves.what} of each {curves.each.split()[0]}, before and after",
                    ),
                    facts({curves.each if drafter else "exits after layers": layers, **said}),
                ],
            ),
            Section(
                "Training curves",
                [
                    draw(
                        partial(training_plots.curves_figure, curves),
                        f"Loss and {curves.what} of each {curves.each.split()[0]} over the positions trained on",
                    )
                ],
            ),
            repeat(conditions, options),
        ],
    )


def measured(folder: Path, what: str = "training") -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a ValueError if nothing has been judged yet."""
    rows = RunFolder(folder, writes=False).rows()
    if not any(row["kind"] == "validation" for row in rows):
        raise ValueError(f"the {what} in {folder} has measured nothing yet; start it again to go on")
    return rows


def how_far(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], options: Mapping[str, Any]) -> list[Block]:
    """How far a run is, by its metrics, config.json and options of training, and what was changed behind stops."""
    done = next(row for row in reversed(rows) if "tokens" in row)
    unit, wanted = ("steps", options["steps"]) if options["steps"] is not None else ("tokens", options["tokens"])
    reached = done["step" if unit == "steps" else "tokens"]
    state = f"{done['step']} steps on {done['tokens']} positions."
    if reached < wanted:
        state = f"Not finished: {reached} of {wanted} {unit} so far; started again with the same options it goes on."
    if "stopped" in config:
        state = f"Not finished: {config['stopped']}; {reached} of {wanted} {unit} are kept. Started again it goes on, "
        state += "with another learning rate or clipping norm if it is given one."
    found: list[Block] = [Text((state,), "bad" if reached < wanted or "stopped" in config else "")]
    if changed := config.get("changed"):
        said = (f"{each.removeprefix('config.').removeprefix('training.')}." for each in changed)
        found.append(Text(("Options were changed on the way, so those below alone do not repeat this run:", *said)))
    return found


def before_and_after(
    first: str, share: str, labels: Sequence[object], key: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Table:
    """A row for each label, in the column `first`: a share of right answers, under `key`, and the loss."""
    rows = [
        [f"{label}", *(f"{row[name][place]:.3f}" for name in (key, "loss") for row in (before, after))]
        for place, label in enumerate(labels)
    ]
    return Table([first, f"{share} before", "after", "loss before (nats)", "after"], rows)


def _table(curves: training_plots.Curves) -> Table:
    before, after = curves.validations[0], curves.validations[-1]
    table = before_and_after(curves.each, curves.what, curves.layers, "agreement", before, after)
    if curves.each != "exit after layer":
        return table
    last = [
        "full model, on the text",
        *(f"{row[f'full_{of}']:.3f}" for of in ("accuracy", "loss") for row in (before, after)),
    ]
    return replace(table, rows=[*table.rows, last])

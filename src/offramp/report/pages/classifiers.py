"""The pages of classifiers: methods compared, one calibration, a training.

They are made from results.json, result.json, and config.json with metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from offramp.classifiers.calibrate import EARLIER, exit_table, kept_words, set_table
from offramp.classifiers.result import ClassifierEvaluation
from offramp.report import classifier_plots
from offramp.report.pages.blocks import Block, Page, Section, Text, draw, facts, repeat
from offramp.report.pages.training import before_and_after, measured
from offramp.runs.tables import Table
from offramp.uncertainty.posterior import PosteriorConfig


def evaluation_page(folder: Path, values: dict[str, Any]) -> Page:
    """The page of an evaluation, from its results.json."""
    found = ClassifierEvaluation.from_dict(values)
    conditions = found.conditions
    sections = []
    for test in found.tests:
        blocks: list[Block] = [
            _marked(found.mean_table(test)),
            draw(
                partial(classifier_plots.curves_figure, found, test),
                f"Accuracy, NLPD and calibration error of every method over FLOPs, on {test}",
            ),
            draw(
                partial(classifier_plots.reliability_figure, found, test),
                f"Accuracy over confidence of each exit, by method, on {test}",
            ),
        ]
        if (differences := found.difference_table(test)).rows:
            blocks += [Text(("The same minus temperature's:",)), _marked(differences)]
        blocks += [Text(("Along the curve over realised costs:",)), _marked(found.curve_table(test))]
        sections.append(Section(f"On {test}: mean over the budgets", blocks))
    first = found.tests[0]
    sections += [
        Section(f"Each exit alone, on {first}", [_marked(found.anytime_table(first))]),
        Section(f"Asked and realised cost, {found.unit} = 1", [_marked(found.cost_table(first))]),
        *([Section("Temperatures T and prior variances ω", [_marked(found.fitted_table())])] if found.fitted else []),
        Section("How to read this", [Text(tuple(found.notes()))]),
    ]
    title = f"Classifier: {conditions.get('model', folder.name)}"
    return Page(title, str(folder), [*sections, repeat({**conditions, "trained models": len(found.seeds)})])


def _marked(table: Table) -> Table:
    kinds = ("static", "full model")
    found = [next((kind for kind in kinds if row[0].startswith(kind)), "") for row in table.rows]
    return replace(table, marks=[kind.removesuffix(" model") for kind in found])


# ---------------------------------------------------------------- one calibration


def calibration_page(folder: Path, values: dict[str, Any]) -> Page:
    """The page of a calibration, from its result.json."""
    config, conditions = values["config"], values["conditions"]
    method = config["posterior"]["method"]
    blocks: list[Block] = [exit_table(values)]
    choice, effect = values.get("choice"), values.get("effect")  # which earlier results do not have
    if choice is not None:
        blocks.append(Text((choice["words"],)))
    if effect is not None:
        blocks.append(Text((effect["words"],), _mark(effect["nlpd"])))
    if values["messages"]:
        blocks.append(Text(tuple(f"* {message}" for message in values["messages"]), "bad"))
    sections = [Section(f"Each exit, softmax -> {method}, on {values['rows']} threshold rows", blocks)]
    if (certificate := values["certificate"]) is not None:
        kept = values["kept"]
        sections.append(Section("The certificate", [_certificate(certificate, kept, values)]))
    if values["sets"] is not None:
        sections.append(Section("Nested sets, on the test rows", [set_table(values["sets"])]))
    title = f"Calibration of a classifier: {conditions.get('model', folder.name)}, {method}"
    return Page(title, str(folder), [*sections, repeat(conditions, config)])


def _mark(change: Mapping[str, Any]) -> str:
    """Good where all of a change's interval is an improvement, bad where all of it is the opposite."""
    return "good" if change["high"] < 0 else "bad" if change["low"] > 0 else ""


def _certificate(certificate: Mapping[str, Any], kept: Mapping[str, Any], values: Mapping[str, Any]) -> Text:
    """What is promised and what came of it; good only if rows do leave early, and the test rows do not break it."""
    config = values["config"]
    if values["schema"] == EARLIER:
        said = (
            f"On the {kept['rows']} test rows: mean loss {kept['loss']:.4f}, saving {kept['saving']:.1%}. Both losses "
            "are against the last exit with the posterior, and the savings of a network that computes the heads of all "
            "exits, which nobody would run: an earlier version wrote this. Calibrate again."
        )
    else:
        said = kept_words(kept, config["reference"], PosteriorConfig(**config["posterior"]))
    broken = kept["loss"] > config["promise"]["tolerance"]
    mark = "bad" if broken or not certificate["certified"] else "good" if certificate["index"] else ""
    more = "The mean loss on the test rows is above the tolerance: so it may be by chance, or these are other rows."
    return Text((certificate["words"], said, *([more] if broken else [])), mark)


# ---------------------------------------------------------------- a training


def training_page(folder: Path, config: dict[str, Any]) -> Page:
    """The page of a training, finished or not, from its config.json."""
    judged = [row for row in measured(folder) if row["kind"] == "validation"]
    before, after, options = judged[0], judged[-1], config["config"]
    done, wanted = after["epoch"], options["epochs"]
    state = f"{done} of {wanted} epochs; judged on {after['rows']} rows of the tune split."
    blocks: list[Block] = [Text((state,), "bad" if done < wanted else "")]
    exits = range(1, len(after["accuracy"]) + 1)
    blocks.append(before_and_after("exit", "accuracy", exits, "accuracy", before, after))
    about = config.get("about", {})
    division = config["settings"].get("division", {})
    splits = {name: entry["rows"] for name, entry in division.get("splits", {}).items()}
    conditions = {**about, "classes": config["data"]["classes"], "rows": splits or None}
    title = f"Training of a classifier: {about.get('architecture', config['model']['kind'])}"
    sections = [Section("What each exit reached", blocks), Section("Options", [facts(options)])]
    return Page(title, str(folder), [*sections, repeat(conditions, options)])

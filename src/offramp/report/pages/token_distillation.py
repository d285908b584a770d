"""The page of a language model that was distilled: its groups of prompts before and after, the curves, the weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from offramp.distillation.token_report import labels_used, readouts_table, summary
from offramp.report import training_plots
from offramp.report.pages.blocks import Page, Section, Text, draw, facts, repeat
from offramp.report.pages.training import how_far, measured
from offramp.runs.folder import TrainState

SAID = ("objective", "temperature", "trainable", "lora_rank", "learning_rate", "batch_size", "seed")
"""Options of training named at the beginning; the others stand at the end."""


def page(folder: Path, config: dict[str, Any]) -> Page:
    """The page of a run, finished or not, from its config.json."""
    rows = measured(folder, "distillation")
    kinds = ("step", "validation", "weights")
    steps, judged, readouts = ([row for row in rows if row["kind"] == kind] for kind in kinds)
    options, groups = config["config"], config["groups"]
    student, teacher = config["student"]["name"], config["teacher"]["name"]
    result = summary(rows, groups, TrainState(), folder / "model")
    sections = [
        Section(
            "Every group",
            [
                *how_far(rows, config, options["training"]),
                draw(
                    partial(training_plots.token_groups_figure, result, student),
                    "Divergence from the teacher and agreement with it, of every group, before and after",
                ),
                result.by_group(),
                Text(_explained(config)),
                facts(_said(options)),
            ],
        ),
        Section(
            "Training curves",
            [
                draw(
                    partial(training_plots.token_curves_figure, steps, judged, groups, student),
                    "Divergence and agreement of every group over the tokens trained on",
                )
            ],
        ),
    ]
    if readouts:
        table = readouts_table(rows, groups)
        picture = draw(
            partial(training_plots.token_weights_figure, readouts, groups, student),
            "Mean weight of every group's training tokens after each readout",
        )
        sections.append(Section(table.title, [picture, table]))
    counted = "Counted in tokens, each of which has the group of its prompt; held-out ones stand under test."
    used = Text((labels_used(rows, groups).line(), *([counted] if groups else [])))
    sections.append(Section("Where group labels were used", [used]))
    conditions = {
        **{f"{who}{what}": config[who][key] for who in ("student", "teacher") for what, key in _WHAT.items()},
        **config.get("about", {}), **config["data"],
    }  # fmt: skip
    sections.append(repeat(conditions, options))
    return Page(f"Distilled: {student}, from {teacher}", str(folder), sections)


_WHAT = {"": "name", " weights": "fingerprint", " dtype": "dtype"}


def _said(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader wants to know first."""
    found = {"share of the teacher in the loss": options["fraction"], **{n: options["training"].get(n) for n in SAID}}
    if options["training"]["trainable"] != "lora":
        del found["lora_rank"]
    if (weights := options["weights"]) is not None:
        rule, readout = weights["rule"], weights["readout"]
        control = "" if rule["control"] == "none" else f", {rule['control']}"
        layer = "a sixth of the depth" if readout["layer"] is None else f"layer {readout['layer']}"
        found |= {
            "tokens are weighted by": f"{rule['signal']}, gate {rule['gate']}, alpha {rule['alpha']:g}, "
            f"beta {rule['beta']:g}, on {rule['weight_on']}{control}",
            "readout": f"{readout['kind']} after {layer}, should say the {weights['target']}'s token, every "
            f"{weights['every']} steps",
        }  # fmt: skip
    return found


def _explained(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the columns mean in this run."""
    own = "answers" in config["data"]
    texts = "the student's own answers from before training" if own else "held-out texts"
    temperature = config["config"]["training"]["temperature"]
    return (
        f"Means over tokens of {texts}, before -> after. Divergence: from the teacher at temperature {temperature:g}, "
        "times its square; text: cross-entropy to the text; agreement: share of tokens where student and teacher "
        "choose the same; right: where the student chooses the text's.",
        "The worst group agrees least. Tokens of one text are not independent, so no intervals are given.",
    )

"""Pictures and pages of trainings, of exits and of distilled language models: what was reached, and the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from offramp.distillation.token_report import TokenDistillResult, labels_used, readouts_table, summary
from offramp.report.blocks import Block, Page, Section, Text, draw, facts, repeat
from offramp.report.drawing import BLUE, GREY, footnote, headed, legend, percent, require_matplotlib
from offramp.runs.folder import RunFolder, TrainState
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
    curves = Curves(
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
                        partial(layers_figure, curves),
                        f"{curves.what} of each {curves.each.split()[0]}, before and after",
                    ),
                    facts({curves.each if drafter else "exits after layers": layers, **said}),
                ],
            ),
            Section(
                "Training curves",
                [
                    draw(
                        partial(curves_figure, curves),
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


def _table(curves: Curves) -> Table:
    before, after = curves.validations[0], curves.validations[-1]
    table = before_and_after(curves.each, curves.what, curves.layers, "agreement", before, after)
    if curves.each != "exit after layer":
        return table
    last = [
        "full model, on the text",
        *(f"{row[f'full_{of}']:.3f}" for of in ("accuracy", "loss") for row in (before, after)),
    ]
    return replace(table, rows=[*table.rows, last])


# ---------------------------------------------------------------- the page of a distilled language model

TOKEN_SAID = ("objective", "temperature", "trainable", "lora_rank", "learning_rate", "batch_size", "seed")
"""Options of training named at the beginning; the others stand at the end."""


def token_page(folder: Path, config: dict[str, Any]) -> Page:
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
                    partial(token_groups_figure, result, student),
                    "Divergence from the teacher and agreement with it, of every group, before and after",
                ),
                result.by_group(),
                Text(_explained(config)),
                facts(_token_said(options)),
            ],
        ),
        Section(
            "Training curves",
            [
                draw(
                    partial(token_curves_figure, steps, judged, groups, student),
                    "Divergence and agreement of every group over the tokens trained on",
                )
            ],
        ),
    ]
    if readouts:
        table = readouts_table(rows, groups)
        picture = draw(
            partial(token_weights_figure, readouts, groups, student),
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


def _token_said(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader wants to know first."""
    found = {
        "share of the teacher in the loss": options["fraction"],
        **{n: options["training"].get(n) for n in TOKEN_SAID},
    }
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


# ---------------------------------------------------------------- pictures of exits in training

POINTS = 200
"""Most points of a curve; neighbouring steps are averaged."""
WORDS = {"agreement": "share of the last layer's choices", "accuracy": "share of right verdicts"}
"""What the share of an exit means."""
PANELS = (("kd", "divergence from the teacher (nats)"), ("agreement", "agreement with the teacher"))
Rows = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl of one kind."""


@dataclass(frozen=True)
class Curves:
    """The metrics of a run.

    Attributes:
        model: Its name.
        layers: The E exits, or of a drafter 1, 2, .. E drafts in a row.
        steps: Rows of metrics.jsonl, one per step.
        validations: Likewise, one per judgement on held-out data; at least one.
        what: "agreement" with the last layer, or "accuracy" of classifiers.
        each: What `layers` says: "exit after layer", or "draft in a row".
    """

    model: str
    layers: Sequence[int]
    steps: Sequence[dict[str, Any]]
    validations: Sequence[dict[str, Any]]
    what: str = "agreement"
    each: str = "exit after layer"


def curves_figure(curves: Curves) -> Any:
    """Loss and agreement of every exit: lines while training, dots on held-out data."""
    matplotlib = require_matplotlib()
    first, last = curves.validations[0], curves.validations[-1]
    means = [sum(row["loss"]) / len(row["loss"]) for row in (first, last)]
    figure = headed(f"Mean loss on held-out data: {means[0]:.2f} to {means[1]:.2f} nats\n", 11, 5)
    left, right = figure.subplots(1, 2)
    for axes, key, label in ((left, "loss", "loss (nats)"), (right, "agreement", WORDS[curves.what])):
        for place, layer in enumerate(curves.layers):
            color = colour(place, len(curves.layers))
            steps = [(row["tokens"], row[key][place]) for row in curves.steps if row[key][place] is not None]
            x, y = averaged(steps) if steps else ([], [])  # a curriculum leaves exits out
            axes.plot(x, y, color=color, linewidth=1, alpha=0.8)
            axes.plot(
                [row["tokens"] for row in curves.validations], [row[key][place] for row in curves.validations], "o",
                color=color, markersize=5, label=f"{layer}" if place else f"{curves.each} {layer}",
            )  # fmt: skip
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        axes.set_xlabel("positions trained on")
        axes.set_ylabel(label)
    if last.get("full_loss") != first.get("full_loss"):  # it was trained as well
        left.plot(*averaged([(row["tokens"], row["full_loss"]) for row in curves.steps]), color="black", linewidth=1)
        left.plot(
            [row["tokens"] for row in curves.validations], [row["full_loss"] for row in curves.validations], "*",
            color="black", label="full model, on the text",
        )  # fmt: skip
    right.set_ylim(0, 1.02)
    legend(left, wide=True, ncols=17, columnspacing=1.0, handletextpad=0.4)
    footnote(figure, f"{curves.model} · lines: while training; dots: {last['positions']} held-out positions")
    return figure


def layers_figure(curves: Curves) -> Any:
    """The share of every exit by its layer, before and after."""
    first, last = curves.validations[0], curves.validations[-1]
    before, after = ([sum(row["agreement"]) / len(row["agreement"])] for row in (first, last))
    figure = headed(f"Mean {curves.what} of the exits: {before[0]:.0%} to {after[0]:.0%}", 9, 4.6)
    axes = figure.add_subplot()
    axes.plot(curves.layers, first["agreement"], "-o", color=GREY, markersize=4, label="before")
    axes.plot(curves.layers, last["agreement"], "-o", color=BLUE, markersize=5, label="after")
    axes.set_xticks(curves.layers)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(curves.each)
    axes.set_ylabel(WORDS[curves.what])
    legend(axes, ncols=2)
    footnote(figure, f"{curves.model} · {last['positions']} held-out positions · {last['step']} steps")
    return figure


def colour(place: int, count: int) -> Any:
    """From dark to light, short of yellow."""
    return require_matplotlib().colormaps["viridis"](0.9 * place / max(count - 1, 1))


def averaged(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Means of as many neighbours as leave at most `POINTS` points."""
    size = max(1, -(-len(points) // POINTS))
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [group[-1][0] for group in groups], [sum(y for _, y in group) / len(group) for group in groups]


# ---------------------------------------------------------------- pictures of distilled language models


def token_groups_figure(result: TokenDistillResult, model: str = "") -> Any:
    """Divergence and agreement of every group, before and after; lines at those of all tokens."""
    parts = result.groups or (result.overall,)
    low = result.worst or result.overall
    said = f"Worst group: {low.name}, agreement" if result.groups else "Agreement of all tokens:"
    figure = headed(f"{said} {low.agreement_before:.0%} to {low.agreement:.0%}", max(9.0, 4 + 1.6 * len(parts)), 4.6)
    x = np.arange(len(parts))
    for axes, (key, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for name, shift, shade, what in ((f"{key}_before", -0.2, GREY, "before"), (key, 0.2, BLUE, "after")):
            axes.bar(x + shift, [getattr(each, name) for each in parts], 0.37, color=shade, label=what)
            axes.axhline(getattr(result.overall, name), color=shade, linewidth=0.8, linestyle=":")
        axes.set_xticks(x, [f"{each.name}\n{each.tokens:,} tokens" for each in parts])
        axes.set_ylabel(label)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(percent())
    legend(figure.axes[0], ncols=2)
    footnote(figure, f"{model} · {result.overall.tokens:,} held-out tokens; dotted: all of them")
    return figure


def token_curves_figure(steps: Rows, judged: Rows, groups: Sequence[str], model: str = "") -> Any:
    """Divergence and agreement over the tokens trained on: a line while training, dots on held-out tokens by group."""
    figure = headed(f"Divergence on held-out tokens: {judged[0]['kd']:.2f} to {judged[-1]['kd']:.2f} nats", 11, 4.8)
    tokens = [row["tokens"] for row in judged]
    for axes, (key, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        if steps:
            x, y = averaged([(row["tokens"], row[key]) for row in steps])
            axes.plot(x, y, color=GREY, linewidth=1, label="while training")
        axes.plot(tokens, [row[key] for row in judged], "-o", color="black", markersize=5, label="all")
        for place, group in enumerate(groups):
            shade, values = colour(place, len(groups)), [row[f"group_{key}"][place] for row in judged]
            axes.plot(tokens, values, "--o", color=shade, linewidth=1, markersize=4, label=group)
        axes.xaxis.set_major_formatter(require_matplotlib().ticker.EngFormatter())
        axes.set_xlabel("tokens trained on")
        axes.set_ylabel(label)
    axes.set_ylim(0, 1.02)
    figure.axes[0].legend(fontsize=9)
    footnote(figure, f"{model} · grey: while training; dots: {judged[-1]['positions']:,} held-out tokens")
    return figure


def token_weights_figure(readouts: Rows, groups: Sequence[str], model: str = "") -> Any:
    """Mean weight of each group's training tokens after each readout; of unknown groups that of all tokens alone."""
    last = readouts[-1]
    means = {f" of {name}": mean for name, mean in zip(groups, last.get("weight", ()), strict=True)}
    heaviest, mean = max((means or {"": last["mean"]}).items(), key=lambda each: each[1])
    figure = headed(f"Step {last['step']}: tokens{heaviest} weigh {mean:.2f} on average", 8, 4.4)
    axes, steps = figure.add_subplot(), [row["step"] for row in readouts]
    axes.plot(steps, [row["mean"] for row in readouts], "-o", color="black", markersize=5, label="all")
    for place, group in enumerate(groups):
        values = [row["weight"][place] for row in readouts]
        axes.plot(steps, values, "--o", color=colour(place, len(groups)), linewidth=1, markersize=4, label=group)
    axes.xaxis.set_major_locator(require_matplotlib().ticker.MaxNLocator(integer=True))
    axes.set_xlabel("readout after step")
    axes.set_ylabel("mean weight of the training tokens")
    axes.legend(fontsize=9)
    footnote(figure, f"{model} · weights hold until the next readout")
    return figure

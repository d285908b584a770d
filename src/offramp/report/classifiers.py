"""Pictures and pages of classifiers: methods compared, one calibration, a training.

They are made from results.json, result.json, and config.json with metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.classifiers.calibrate import EARLIER, exit_table, kept_words, set_table
from offramp.classifiers.result import ClassifierEvaluation
from offramp.report.blocks import Block, Page, Section, Text, draw, facts, repeat
from offramp.report.drawing import BLUE, COLOURS, GREY, ORANGE, footnote, headed, legend, percent, save_figures
from offramp.report.training import before_and_after, measured
from offramp.runs.tables import Table
from offramp.uncertainty.posterior import PosteriorConfig

if TYPE_CHECKING:
    from offramp.classifiers.evaluate import Method


def evaluation_page(folder: Path, values: dict[str, Any]) -> Page:
    """The page of an evaluation, from its results.json."""
    found = ClassifierEvaluation.from_dict(values)
    conditions = found.conditions
    sections = []
    for test in found.tests:
        blocks: list[Block] = [
            _marked(found.mean_table(test)),
            draw(
                partial(curves_figure, found, test),
                f"Accuracy, NLPD and calibration error of every method over FLOPs, on {test}",
            ),
            draw(
                partial(reliability_figure, found, test),
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


# ---------------------------------------------------------------- pictures

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

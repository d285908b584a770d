"""A student judged: on validation rows after each epoch, on test rows once, at the epochs that rules chose."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.classifiers.batches import Rows, by_length
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.outputs import collect
from offramp.distillation import teacher as teachers
from offramp.distillation.by_group import PREDICTIONS
from offramp.distillation.config import SCHEMA, Run
from offramp.distillation.early_exits import fit_early_exits
from offramp.distillation.history import History
from offramp.distillation.networks import begun_from
from offramp.distillation.parts import Parts
from offramp.distillation.results import budget_of
from offramp.metrics.group_effects import exits_by_group
from offramp.metrics.groups import Groups, flip_rate
from offramp.metrics.selection import SPLITS, WITH_GROUPS, LabelBudget, judge
from offramp.risk.budgets import leave
from offramp.runs.bounded import read_object
from offramp.runs.codec import encode
from offramp.runs.lines import read_lines
from offramp.runs.tensor_files import write_tensors
from offramp.uncertainty.outputs import ExitOutputs


def record(history: History, epoch: int, student: EarlyExitClassifier, parts: Parts, more: dict[str, Any]) -> None:
    """Judge validation rows after an epoch, counted from 1, and write down `more` besides."""
    select = parts.kept[0]
    logits = teachers.logits_of_all(student, parts.select, parts.precision)[-1]
    val = judge(logits, select.rows.labels, select.groups, split="val")
    found = {"groups": _accuracies(logits, select.rows.labels, select.groups), **more}
    history.add(epoch, val, encode(found), student)


def judged(run: Run, parts: Parts, student: EarlyExitClassifier, history: History, folder: Path) -> dict[str, Any]:
    """Judge a student whose training is over, save it as selected, with its predictions; what result.json says."""
    chosen, test = history.choices(), parts.data.test
    labels, groups = test.rows.labels, test.groups
    assert groups is not None
    selected = chosen[run.study.select]
    logits, rules = {}, {}
    for epoch in sorted(set(chosen.values()) - {selected}):
        student.load_state_dict(history.weights(epoch))
        logits[epoch] = teachers.logits_of_all(student, parts.test, parts.precision)[-1]
    student.load_state_dict(history.weights(selected))
    if not run.joint:
        fit_early_exits(student, parts.train, parts.precision)
    student.save(folder / "model")
    outputs = outputs_of(student, parts.test, parts.precision)
    logits[selected] = outputs.logits[-1].clone()  # the file holds both
    vals = {row["epoch"]: row for row in history.rows}
    for rule, epoch in chosen.items():
        found = judge(logits[epoch], labels, groups, split="test")
        rules[rule] = {
            "epoch": epoch, "val": vals[epoch]["val"], "test": asdict(found),
            "groups": _accuracies(logits[epoch], labels, groups),
        }  # fmt: skip
    _save_predictions(folder / PREDICTIONS, outputs.logits, logits[chosen["last"]], test.rows.ids)
    sure = outputs.logits.softmax(-1).amax(-1)  # [E, N]
    left = leave(sure, sure.new_full((len(sure),), run.study.threshold))
    exits = exits_by_group(outputs, left, groups, split="test")
    counts = parts.data.counts().get("train")
    flips = None if test.pairs is None else flip_rate(outputs.logits[-1].argmax(-1), test.pairs)[0]
    path = folder / "training" / "metrics.jsonl"
    metrics = read_lines(path, "metrics") if path.is_file() else []
    budget = label_budget(run, len(parts.data.train) if counts else 0, len(parts.kept[0]), len(test))
    return {
        "groups": {"names": groups.names, "train": counts, "test": groups.counts.tolist()},
        "selected": selected,
        "rules": rules,
        "history": history.rows,
        "terms": _terms(metrics),
        "exits": asdict(exits),
        "flip_rate": None if flips is None else asdict(flips),
        "budget": [[use, split, count] for (use, split), count in budget.used.items()],
        "parameters": sum(p.numel() for p in student.parameters()),
    }


def outputs_of(student: EarlyExitClassifier, rows: Rows, precision: str | None = None) -> ExitOutputs:
    """What all exits say of all rows, in their order."""
    labels, batches = rows.data.labels, by_length(rows)
    found = collect(student, ((rows.inputs(places), labels[places]) for places in batches), precision=precision)
    return found.take(torch.cat(batches).argsort())


def _accuracies(logits: Tensor, labels: Tensor, groups: Groups | None) -> list[float]:
    if groups is None:
        return []
    right = (logits.argmax(-1) == labels).double()
    found: list[float] = (right @ groups.members.double() / groups.counts).tolist()
    return found


def _save_predictions(path: Path, selected: Tensor, last: Tensor, ids: Sequence[str]) -> None:
    write_tensors(path, {"selected": selected.float(), "last": last.float()}, {"ids": json.dumps(list(ids))})


def _terms(metrics: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each term of the loss, its mean over the logged steps of every epoch."""
    sums: dict[str, dict[int, list[float]]] = {}
    for row in metrics:
        for name, value in row.get("terms", {}).items():
            sums.setdefault(name, {}).setdefault(row["epoch"], []).append(value)
    return {name: [sum(v) / len(v) for v in epochs.values()] for name, epochs in sums.items()}


# ---------------------------------------------------------------- where a run uses group labels

# A method is label-free only if they serve for nothing but the report.


def label_budget(run: Run, train: int, select: int, test: int) -> LabelBudget:
    """The account of a run, its teacher included.

    Args:
        run: The run.
        train: Training rows; 0 if their groups are unknown.
        select: Validation rows that epochs are chosen by.
        test: Test rows.

    Returns:
        Counts of labels by use and split; a classifier that was saved by a finished run, and is a teacher or what a
        network begins as, brings that run's account, and of any other that was not trained here nothing is known, None.
    """
    own = [*_trained(run, "student training", train, select)]
    if run.method.weights is not None and run.method.weights.control == "oracle":
        own.append(("weights", "train", train))
    if run.study.select in WITH_GROUPS:
        own.append(("selection", "val", select))
    taught = run.teacher_run()
    if taught is not None:
        own += _trained(taught, "teacher training", train, select)
        if taught.study.select in WITH_GROUPS and not taught.method.refit:
            own.append(("teacher training", "val", select))
    elif run.teacher is not None:
        own += [("teacher training", split, count) for split, count in _of_given(run.teacher).items()]
    budget = LabelBudget().plus("reporting", "test", test)
    for use, split, count in [*own, *([("reporting", "train", train)] if train else [])]:
        budget = budget.plus(use, split, count)
    return budget


def _trained(run: Run, use: str, train: int, select: int) -> Iterator[tuple[str, str, int | None]]:
    """What training used: the method, and the saved classifier that the network begins as."""
    if run.method.balanced or run.method.loss == "group_dro":
        yield use, "train", train
    if run.method.refit:
        yield use, "val", select
    if (begun := begun_from(run.study.student)) is not None:
        for split, count in _of_given(f"folder:{begun}").items():
            yield use, split, count


def _of_given(teacher: str) -> dict[str, int | None]:
    """Labels that the run of a classifier used, but for its report, by split; {"train": None} where nothing is known.

    Labels of a split that served for several things are the same ones, so the most that one thing used is counted; what
    is known to have been used outweighs what is unknown.

    Returns:
        Of a teacher as in a `Run`; what a network begins as is a folder too.
    """
    kind, _, path = teacher.partition(":")
    folder = Path(path).expanduser()
    try:
        values = read_object(folder.parent / "result.json", "")
        if kind != "folder" or folder.name != "model" or values["schema"] != SCHEMA:
            return {"train": None}
        used = budget_of(values).used
    except (OSError, ValueError, KeyError, TypeError):  # no run of ours, or not a whole one
        return {"train": None}
    found: dict[str, int | None] = {}
    for split in SPLITS:
        counts = [count for (use, of), count in used.items() if of == split and use != "reporting"]
        if counts:
            found[split] = max(filter(None, counts), default=None if None in counts else 0)
    return found

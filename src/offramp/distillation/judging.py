"""A student judged: on validation rows after each epoch, on test rows once, at the epochs that rules chose, by group.

What is found about groups comes from its predictions and its teacher's, and from its rows' weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.classifiers.batches import Rows, by_length
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.loading import load
from offramp.classifiers.outputs import collect
from offramp.distillation import teacher as teachers
from offramp.distillation.config import SCHEMA, Run
from offramp.distillation.linear_probes import fit_early_exits
from offramp.distillation.networks import begun_from, rows_for
from offramp.distillation.parts import Parts
from offramp.distillation.results import AGAIN, History, budget_of
from offramp.distillation.teacher import load_logits, logits_of_all
from offramp.metrics.group_effects import budgets_by_group, exits_by_group, group_changes
from offramp.metrics.groups import Groups, flip_rate, group_report
from offramp.metrics.selection import SPLITS, WITH_GROUPS, LabelBudget, judge
from offramp.risk.budgets import leave
from offramp.runs.bounded import parsed, read_object
from offramp.runs.codec import encode
from offramp.runs.resume import read_lines
from offramp.runs.tensor_files import read_tensors, write_tensors
from offramp.tasks.group_sets import Grouped, GroupedSet
from offramp.uncertainty.outputs import ExitOutputs

PREDICTIONS, WEIGHTS = "predictions.safetensors", "weights.safetensors"
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Confidences above which rows leave, each of which is a budget; at 1 all rows wait for the last exit."""


def found_by_group(
    run: Run, data: GroupedSet, folder: Path, costs: Sequence[float] | Tensor, need: Callable[[Run], Path]
) -> dict[str, Any]:
    """Groups of the test rows, in more detail than selection needs.

    Args:
        run: Which.
        data: Its set.
        folder: Folder of the run, with its predictions.
        costs: FLOPs up to each exit, [E].
        need: Gives the folder of another run, finished.

    Returns:
        "report": a `GroupReport` of the last exit; "adjusted": its adjusted average; "budgets": a `BudgetByGroup` for
        each of `THRESHOLDS`; "changes": a `GroupChange` from teacher to student for all rows and each group, None where
        the teacher's answers to test rows are unknown.
    """
    test = data.test
    assert test.groups is not None
    labels, logits = test.rows.labels, _selected(folder, test)
    report = group_report(
        logits[-1], labels, test.groups, split="test", attribute=suggested(data),
        train_counts=data.counts().get("train"),
    )  # fmt: skip
    outputs = ExitOutputs([logits.new_empty(len(test), 0)] * len(logits), logits, labels, torch.as_tensor(costs))
    sure = logits.softmax(-1).amax(-1)  # [E, N]
    chosen = [leave(sure, sure.new_full((len(sure),), threshold)) for threshold in THRESHOLDS]
    budgets = budgets_by_group(outputs, chosen, test.groups, split="test")
    taught = _teachers_logits(run, test, need)
    changes = None if taught is None else group_changes(
        taught.argmax(-1) == labels, logits[-1].argmax(-1) == labels, test.groups, split="test", seed=run.seed,
        units=test.pairs,
    )  # fmt: skip
    return {
        "report": asdict(report),
        "adjusted": report.adjusted,
        "budgets": [{"threshold": at, **asdict(found)} for at, found in zip(THRESHOLDS, budgets, strict=True)],
        "changes": None if changes is None else [asdict(change) for change in changes],
    }


def suggested(data: GroupedSet) -> Tensor | None:
    """The class that the shortcut suggests for each test row: the most frequent one among training rows that look so.

    Returns:
        [N], -1 where the attribute is unknown; None if there is not one attribute with a value for each class.
    """
    train, test = data.train, data.test
    names = [name for name in train.attributes if name != "conflict"]
    if len(names) != 1 or not bool((train.attributes[names[0]] >= 0).any()):
        return None
    values, classes = train.attributes[names[0]], len(train.rows.classes)
    known = values >= 0
    counts = torch.zeros(int(values.max()) + 1, classes)
    counts.index_put_((values[known], train.rows.labels[known]), torch.ones(int(known.sum())), accumulate=True)
    stands_for, looks = counts.argmax(1), test.attributes[names[0]]
    if sorted(stands_for.tolist()) != list(range(classes)) or int(looks.max()) >= classes:
        return None
    return torch.where(looks >= 0, stands_for[looks.clamp(min=0)], -1)


def keep_weights(folder: Path, weights: Tensor, groups: Groups | None, epoch: int) -> None:
    """Keep the weights [N] of the training rows, set after an epoch; not if their groups are unknown."""
    if groups is None:
        return
    tensors = {"weights": weights.float(), "members": groups.members}
    header = {"groups": json.dumps(list(groups.names)), "epoch": str(epoch)}
    write_tensors(folder / WEIGHTS, tensors, header)


def kept_weights(folder: Path) -> tuple[Tensor, Groups, int] | None:
    """Weights, groups and epoch of `keep_weights`; None: none were kept."""
    if not (folder / WEIGHTS).is_file():
        return None
    header, tensors = read_tensors(folder / WEIGHTS, AGAIN)
    try:
        groups = Groups(tuple(parsed(header["groups"], "its header")), tensors["members"])
        return tensors["weights"], groups, int(header["epoch"])
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error!r}); {AGAIN}") from error


def _selected(folder: Path, test: Grouped) -> Tensor:
    """Logits of all exits at the selected epoch, [E, N, C], in the order of the rows."""
    header, tensors = read_tensors(folder / PREDICTIONS, AGAIN)
    try:
        place = {id: at for at, id in enumerate(parsed(header["ids"], "its header"))}
        return tensors["selected"][:, [place[id] for id in test.rows.ids]]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / PREDICTIONS} is damaged ({error!r}); {AGAIN}") from error


def _teachers_logits(run: Run, test: Grouped, need: Callable[[Run], Path]) -> Tensor | None:
    """The teacher's last exit on the test rows, [N, C]; None: there is no teacher, or only logits of training rows."""
    if not run.method.needs_teacher or run.teacher is None:
        return None
    if (trained := run.teacher_run()) is not None:
        return _selected(need(trained), test)[-1]
    kind, _, path = run.teacher.partition(":")
    if kind == "logits":
        try:
            return load_logits(Path(path).expanduser(), test.rows)
        except ValueError:
            return None
    classifier = load(Path(path).expanduser())
    rows = rows_for(classifier, test.rows, longest=run.study.teacher.longest)
    return logits_of_all(classifier, rows, run.study.teacher_training.precision)[-1]


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

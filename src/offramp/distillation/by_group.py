"""What a run finds about the groups of its test rows, from its predictions and its teacher's; and its rows' weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.classifiers.loading import load
from offramp.distillation.config import Run
from offramp.distillation.history import AGAIN
from offramp.distillation.networks import rows_for
from offramp.distillation.teacher import load_logits, logits_of_all
from offramp.metrics.group_effects import budgets_by_group, group_changes
from offramp.metrics.groups import Groups, group_report
from offramp.risk.budgets import leave
from offramp.runs.bounded import parsed
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

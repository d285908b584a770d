"""Where a run uses group labels; a method is label-free only if they serve for nothing but the report."""

from __future__ import annotations

import json
from pathlib import Path

from offramp.distillation.config import SCHEMA, Run
from offramp.distillation.results import budget_of
from offramp.metrics.selection import SPLITS, WITH_GROUPS, LabelBudget


def label_budget(run: Run, train: int, select: int, test: int) -> LabelBudget:
    """The account of a run, its teacher included.

    Args:
        run: The run.
        train: Training rows; 0 if their groups are unknown.
        select: Validation rows that epochs are chosen by.
        test: Test rows.

    Returns:
        Counts of labels by use and split; a teacher that was saved by a finished run brings that run's account, and of
        any other that was not trained here nothing is known, None.
    """
    budget = LabelBudget().plus("reporting", "test", test)
    if train:
        budget = budget.plus("reporting", "train", train)
    taught = run.teacher_run()
    if taught is None and run.teacher is not None:
        for split, count in _of_given(run.teacher).items():
            budget = budget.plus("teacher training", split, count)
    elif taught is not None:
        if taught.method.needs_groups:
            budget = budget.plus("teacher training", "train", train)
        if taught.method.refit or taught.study.select in WITH_GROUPS:
            budget = budget.plus("teacher training", "val", select)
    method = run.method
    if method.balanced or method.loss == "group_dro":
        budget = budget.plus("student training", "train", train)
    if method.refit:
        budget = budget.plus("student training", "val", select)
    if method.weights is not None and method.weights.control == "oracle":
        budget = budget.plus("weights", "train", train)
    return budget.plus("selection", "val", select) if run.study.select in WITH_GROUPS else budget


def _of_given(teacher: str) -> dict[str, int | None]:
    """Labels that the run of a teacher used, but for its report.

    Labels of a split that served for several things are the same ones, so the most that one thing used is counted; what
    is known to have been used outweighs what is unknown.

    Args:
        teacher: As in a `Run`.

    Returns:
        Counts by split; {"train": None} where nothing is known.
    """
    kind, _, path = teacher.partition(":")
    folder = Path(path).expanduser()
    try:
        values = json.loads((folder.parent / "result.json").read_text(encoding="utf-8"))
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

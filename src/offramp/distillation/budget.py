"""Where a run uses group labels; a method is label-free only if they serve for nothing but the report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from offramp.distillation.config import SCHEMA, Run
from offramp.distillation.networks import begun_from
from offramp.distillation.results import budget_of
from offramp.metrics.selection import SPLITS, WITH_GROUPS, LabelBudget
from offramp.runs.bounded import read_object


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

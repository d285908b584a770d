"""The rows of a run, divided and prepared for its student."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from offramp.classifiers.batches import Augmentation, Rows
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.distillation.config import Run
from offramp.distillation.data import group_counts, split_validation
from offramp.distillation.networks import rows_for
from offramp.metrics.selection import RULES, WITH_GROUPS
from offramp.tasks.group_sets import Grouped, GroupedSet


@dataclass(frozen=True)
class Parts:
    """The rows of a run, as the student takes them.

    Attributes:
        data: The set.
        train: Training rows, with groups only where the method uses them.
        select: Validation rows that epochs are chosen by.
        tune: Other validation rows.
        test: Test rows.
        kept: `select` and `tune` with their groups; those of `select` are unknown too where one of them has no row.
        device: Where networks are.
        precision: That the student computes in, also where it is judged, see `ClassifierTrainConfig`.
    """

    data: GroupedSet
    train: Rows
    select: Rows
    tune: Rows
    test: Rows
    kept: tuple[Grouped, Grouped]
    device: torch.device
    precision: str | None = None

    @property
    def truncated(self) -> dict[str, int]:
        """Rows of each split whose text the student sees a part of only."""
        splits = {"train": (self.train,), "val": (self.select, self.tune), "test": (self.test,)}
        return {name: sum(rows.settings.get("truncated", 0) for rows in parts) for name, parts in splits.items()}


def parts_of(run: Run, data: GroupedSet, student: EarlyExitClassifier) -> Parts:
    """The rows of a run, as its student takes them; a ValueError if groups that it needs are unknown or empty."""
    study = run.study
    select, tune = split_validation(data.val, study.data.tune, run.seed)
    select = _selectable(run, data.name, select)
    known = data.train if run.method.needs_groups else data.train.without_groups()
    if run.method.needs_groups:
        group_counts(data.train)
    augment = Augmentation(study.pad, study.flip) if study.augments else None
    if augment is not None and isinstance(data.train.rows.inputs, tuple):
        raise ValueError(f"pad and flip change images, but {data.name} holds texts; leave both out")
    longest = study.student.longest
    train = rows_for(student, known.rows, longest=longest, augment=augment)
    others = [rows_for(student, part.rows, longest=longest) for part in (select, tune, data.test)]
    return Parts(data, train, others[0], others[1], others[2], (select, tune), student.device, study.training.precision)


def _selectable(run: Run, name: str, select: Grouped) -> Grouped:
    """Rows to select by, with groups if all of them have rows; without, where nobody needs them."""
    if run.needs_val_groups:
        if select.groups is None:
            rule = f"the rule {run.study.select}{' (teacher_select)' if run.apart else ''}"
            who = rule if run.study.select in WITH_GROUPS else run.name
            free = ", ".join(rule for rule in RULES if rule not in WITH_GROUPS)
            raise ValueError(
                f"{name} has no groups in split 'val', and {who} needs them; give them, or select by one of {free} and "
                "leave out methods that are fitted on validation groups (dfr)"
            )
        select.groups.require_rows(f"val of {name}")
        if run.method.refit and select.rows.groups is None:
            raise ValueError(
                f"{name} has validation rows in several groups or in none, and {run.name} needs each in one; "
                "leave it out"
            )
    elif select.groups is not None and bool((select.groups.counts == 0).any()):
        return replace(select, groups=None)
    return select

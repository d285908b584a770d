"""Where a run uses group labels; a method is label-free only if they serve for nothing but the report."""

from __future__ import annotations

from offramp.distillation.config import Run
from offramp.metrics.selection import WITH_GROUPS, LabelBudget


def label_budget(run: Run, train: int, select: int, test: int) -> LabelBudget:
    """The account of a run, its teacher included.

    Args:
        run: The run.
        train: Training rows; 0 if their groups are unknown.
        select: Validation rows that epochs are chosen by.
        test: Test rows.

    Returns:
        Counts of labels by use and split; None for a teacher that was not trained here, of which nothing is known.
    """
    budget = LabelBudget().plus("reporting", "test", test)
    if train:
        budget = budget.plus("reporting", "train", train)
    taught = run.teacher_run()
    if taught is None and run.teacher is not None:
        budget = budget.plus("teacher training", "train", None)
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

"""Groups of rows, who belongs to which, and how each is served: accuracy with intervals, likelihood, the worst of them.

Groups may overlap, and a row may belong to none: each is judged on its own members, and a row without a group counts in
the average alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offramp.metrics.calibration import grade, reliability
from offramp.metrics.intervals import Share, binomial

UNKNOWN = -1
"""Stands for an attribute or a group that is not known."""


@dataclass(frozen=True)
class Groups:
    """G groups of N rows.

    Attributes:
        names: Of the groups, G.
        members: Whether a row belongs to a group, [N, G], bool.
    """

    names: tuple[str, ...]
    members: Tensor

    def __post_init__(self) -> None:
        if self.members.ndim != 2 or self.members.dtype != torch.bool:
            raise ValueError(
                f"members have shape {list(self.members.shape)} and type {self.members.dtype}; [rows, groups] of bool "
                "is needed"
            )
        if self.members.shape[1] != len(self.names) or not self.names:
            raise ValueError(f"there are {len(self.names)} names for {self.members.shape[1]} groups; give one each")
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"two groups are named {twice!r}; give each its own name")

    @classmethod
    def by_number(cls, numbers: Tensor, names: Sequence[str]) -> Groups:
        """Groups that do not overlap, from the number of each row's, [N], -1 for none; a ValueError for any other."""
        wrong = (numbers < UNKNOWN) | (numbers >= len(names))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"the group of row {row} is {int(numbers[row])}; allowed are 0..{len(names) - 1}, and -1 for none"
            )
        return cls(tuple(names), numbers[:, None] == torch.arange(len(names)))

    @classmethod
    def crossed(cls, labels: Tensor, classes: Sequence[str], attribute: Tensor, values: Sequence[str]) -> Groups:
        """One group for each class and value of an attribute, number = class x A + value, as group_DRO counts.

        Args:
            labels: [N], in 0..C-1.
            classes: Names of the C classes.
            attribute: [N], in 0..A-1; -1: unknown, such a row is in no group.
            values: Names of the A values.

        Returns:
            C x A groups, named "class, value".

        Raises:
            ValueError: A label or a value is out of range.
        """
        for what, numbers, allowed, lowest in (
            ("label", labels, classes, 0), ("attribute", attribute, values, UNKNOWN)
        ):  # fmt: skip
            wrong = (numbers < lowest) | (numbers >= len(allowed))
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise ValueError(
                    f"the {what} of row {row} is {int(numbers[row])}; allowed are {lowest}..{len(allowed) - 1}"
                )
        numbers = torch.where(attribute == UNKNOWN, UNKNOWN, labels * len(values) + attribute)
        return cls.by_number(numbers, [f"{name}, {value}" for name in classes for value in values])

    @classmethod
    def mentioned(cls, labels: Tensor, classes: Sequence[str], attributes: Mapping[str, Tensor]) -> Groups:
        """One group for each attribute that is 1 and each class; a row with several attributes is in several groups.

        The evaluation of CivilComments in WILDS (Koh et al., 2021): rows without any of the attributes are in none.

        Returns:
            A x C groups of labels [N] in 0..C-1 and attributes [N] by name, named "attribute, class".
        """
        names = tuple(f"{attribute}, {name}" for attribute in attributes for name in classes)
        members = [(value == 1) & (labels == c) for value in attributes.values() for c in range(len(classes))]
        return cls(names, torch.stack(members, dim=1))

    @property
    def rows(self) -> int:
        """N."""
        return len(self.members)

    @property
    def counts(self) -> Tensor:
        """Rows of each group, [G], int64."""
        return self.members.sum(dim=0)

    @property
    def overlap(self) -> bool:
        """Whether some row is in several groups."""
        return bool((self.members.sum(dim=1) > 1).any())

    def numbers(self) -> Tensor:
        """The group of each row, [N], int64; -1 for a row without one; a ValueError if groups overlap."""
        if self.overlap:
            row = int((self.members.sum(dim=1) > 1).nonzero()[0])
            several = " and ".join(repr(self.names[int(g)]) for g in self.members[row].nonzero().flatten())
            raise ValueError(f"row {row} is in the groups {several}; what was asked for needs groups without overlap")
        return torch.where(self.members.any(dim=1), self.members.long().argmax(dim=1), UNKNOWN)

    def take(self, rows: Tensor) -> Groups:
        """The same groups of the rows at these places, [n], int64."""
        return Groups(self.names, self.members[rows])

    def require_rows(self, split: str) -> None:
        """Raise a ValueError if a group has no row; `split` is the name of the split, for the message."""
        for name, count in zip(self.names, self.counts.tolist(), strict=True):
            if not count:
                raise ValueError(
                    f"group {name!r} has no row in split {split!r}; use another split, or leave this group out"
                )


# ---------------------------------------------------------------- how each is served

SMALLEST = 100
"""Fewest rows for a group to be called the worst."""
SMALLEST_ECE = 200
"""Fewest rows for an expected calibration error."""


@dataclass(frozen=True)
class GroupNumbers:
    """How one group is served.

    Attributes:
        name: Of the group.
        n: Its rows.
        right: Share of right answers, with its Wilson interval.
        nll: Mean negative log-likelihood, nats.
        ece: Expected calibration error, 15 bins of equal width; None for fewer than 200 rows.
        tpr: Of two classes, share of class 1 found; None: other numbers of classes, or no such row.
        fpr: Of two classes, share of class 0 taken for class 1; None likewise.
        shortcut: Accuracy if the attribute were the label; None: unknown.
        small: Too few rows to be called the worst.
    """

    name: str
    n: int
    right: Share
    nll: float
    ece: float | None
    tpr: float | None
    fpr: float | None
    shortcut: float | None
    small: bool

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right.value


@dataclass(frozen=True)
class GroupReport:
    """How all groups of a split are served.

    Attributes:
        split: Its name.
        n: Its rows.
        groups: Numbers of each.
        average: Accuracy over all rows, as they are mixed in this split.
        adjusted: Mean of the groups' accuracies, weighted by their rows in training (the "adj. average" of WILDS); None
            if these are not known or groups overlap.
    """

    split: str
    n: int
    groups: tuple[GroupNumbers, ...]
    average: float
    adjusted: float | None

    @property
    def judged(self) -> tuple[GroupNumbers, ...]:
        """Groups with rows enough to be compared."""
        return tuple(group for group in self.groups if not group.small)

    @property
    def worst(self) -> GroupNumbers | None:
        """The group of lowest accuracy, the first of several; None if all are too small."""
        return min(self.judged, key=lambda group: group.accuracy, default=None)

    @property
    def best(self) -> GroupNumbers | None:
        """The group of highest accuracy, the first of several; None if all are too small."""
        return max(self.judged, key=lambda group: group.accuracy, default=None)

    @property
    def group_mean(self) -> float:
        """Mean of the accuracies of all groups."""
        return sum(group.accuracy for group in self.groups) / len(self.groups)

    @property
    def gap(self) -> float | None:
        """Average minus worst group."""
        return None if self.worst is None else self.average - self.worst.accuracy

    @property
    def pairwise_gap(self) -> float | None:
        """Best minus worst group."""
        return None if self.worst is None or self.best is None else self.best.accuracy - self.worst.accuracy

    @property
    def pairwise_ratio(self) -> float | None:
        """Worst over best group, 1 if all are equal; None also if all are 0."""
        if self.worst is None or self.best is None or self.best.accuracy == 0:
            return None
        return self.worst.accuracy / self.best.accuracy


def group_report(
    logits: Tensor,
    labels: Tensor,
    groups: Groups,
    *,
    split: str,
    attribute: Tensor | None = None,
    train_counts: Mapping[str, int] | None = None,
    smallest: int = SMALLEST,
    level: float = 0.95,
) -> GroupReport:
    """Judge the answers to one split, group by group.

    Args:
        logits: [N, C].
        labels: [N], in 0..C-1.
        groups: Of the N rows.
        split: Its name, for messages.
        attribute: The class that the shortcut suggests, [N]; -1: unknown.
        train_counts: Rows of each group in training, by name, for the adjusted average.
        smallest: Fewest rows for a group to be called the worst.
        level: Of the intervals, in (0, 1).

    Returns:
        The report.

    Raises:
        ValueError: A group has no row, shapes do not agree, or counts are missing for a group.
    """
    if logits.ndim != 2 or len(logits) != len(labels) or groups.rows != len(labels):
        raise ValueError(
            f"logits have shape {list(logits.shape)}, and there are {len(labels)} labels and {groups.rows} rows of "
            "groups; give one of each per row"
        )
    groups.require_rows(split)
    answers, two = logits.argmax(-1), logits.shape[1] == 2
    numbers = []
    for name, inside in zip(groups.names, groups.members.T, strict=True):
        said, true = answers[inside], labels[inside]
        n, right = len(said), int((said == true).sum())
        grades = grade(logits[inside].double().softmax(-1), true)
        known = None if attribute is None else (attribute[inside] >= 0, attribute[inside])
        numbers.append(
            GroupNumbers(
                name, n, binomial(right, n, level=level, method="wilson"), float(grades.nlpd.mean()),
                reliability(grades).error if n >= SMALLEST_ECE else None,
                mean_of(said[true == 1] == 1) if two else None, mean_of(said[true == 0] == 1) if two else None,
                None if known is None else mean_of((said == known[1])[known[0]]), n < smallest,
            )
        )  # fmt: skip
    adjusted = None if train_counts is None or groups.overlap else adjusted_average(numbers, train_counts)
    return GroupReport(split, len(labels), tuple(numbers), float((answers == labels).double().mean()), adjusted)


def adjusted_average(numbers: list[GroupNumbers], train_counts: Mapping[str, int]) -> float:
    """Mean of accuracies weighted by the groups' rows in training, by name, as WILDS adjusts Waterbirds'.

    Returns:
        The average.

    Raises:
        ValueError: A group has no count, or a group with training rows is not among those judged.
    """
    names = {group.name for group in numbers}
    if different := names.symmetric_difference(name for name, count in train_counts.items() if count or name in names):
        raise ValueError(
            f"group {min(different)!r} is known in only one of the splits; the adjusted average needs the same groups "
            "in both"
        )
    total = sum(train_counts[group.name] for group in numbers)
    if not total:
        raise ValueError("no group has a training row; the adjusted average needs some")
    return sum(train_counts[group.name] * group.accuracy for group in numbers) / total


def flip_rate(answers: Tensor, pairs: Tensor) -> tuple[Share, int]:
    """Share of things (rows of one number, two at least) that get several answers, with Wilson's interval; and N."""
    _, thing, counts = np.unique(pairs.numpy(), return_inverse=True, return_counts=True)
    if not len(counts) or counts.min() < 2:
        raise ValueError("something is shown only once; a flip rate needs every row in two renderings")
    answered = np.unique(np.stack([thing, answers.numpy()]), axis=1)[0]  # a thing, once for each of its answers
    flips, n = int((np.bincount(answered) > 1).sum()), len(counts)
    return binomial(flips, n, method="wilson"), n


def mean_of(hits: Tensor) -> float | None:
    """Of N values; None if there are none."""
    return float(hits.double().mean()) if len(hits) else None

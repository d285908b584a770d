"""How each group of rows is served: accuracy with intervals, likelihood, calibration, and the worst of them.

And what a change of model does to each: from teacher to student, or from one student to another. Groups may overlap;
each is judged on its own members, and a row without a group counts in the average alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.metrics.calibration import grade, reliability
from offramp.metrics.group_members import Groups
from offramp.metrics.intervals import Share, binomial

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


# ---------------------------------------------------------------- what a change of model does


ALL = "all rows"
RESAMPLES = 10_000


@dataclass(frozen=True)
class GroupChange:
    """The change of accuracy of one group.

    Attributes:
        name: Of the group, or `ALL`.
        n: Its rows.
        before: Accuracy of the first model.
        after: Accuracy of the second.
        low: Lower end of the interval of the change.
        high: Upper end.
    """

    name: str
    n: int
    before: float
    after: float
    low: float
    high: float

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0; if not, no difference was shown."""
        return self.low > 0 or self.high < 0


def group_changes(
    before: Tensor, after: Tensor, groups: Groups, *, split: str, seed: int = 0, units: Tensor | None = None
) -> list[GroupChange]:
    """Changes on the same rows, with paired percentile bootstrap intervals at 95 %.

    A resampled mean depends only on how many units of each kind are drawn, so these numbers are drawn, from their
    multinomial distribution; a kind is a sum of differences in {-1, 0, 1} and a number of rows.

    Args:
        before: Whether the first model is right, [N], bool.
        after: Whether the second is, [N], bool.
        groups: Of the N rows.
        split: Its name, for messages.
        seed: Of the draws.
        units: Rows with the same number are drawn together, such as renderings of one thing, [N]; None: each alone.

    Returns:
        The change over all rows, then of each group.

    Raises:
        ValueError: A group has no row, or numbers of rows differ.
    """
    if before.shape != after.shape or before.shape != (groups.rows,):
        raise ValueError(
            f"verdicts have shapes {list(before.shape)} and {list(after.shape)}; one for each of {groups.rows} rows is "
            "needed"
        )
    groups.require_rows(split)
    draw = np.random.default_rng(seed)
    everyone = torch.ones_like(before, dtype=torch.bool)
    found = []
    for name, inside in ((ALL, everyone), *zip(groups.names, groups.members.T, strict=True)):
        one, other = before[inside].double().numpy(), after[inside].double().numpy()
        of = torch.arange(len(one)) if units is None else units[inside]
        low, high = np.quantile(_resampled(other - one, of.numpy(), draw), [0.025, 0.975])
        found.append(GroupChange(name, len(one), float(one.mean()), float(other.mean()), float(low), float(high)))
    return found


def _resampled(
    differences: NDArray[np.float64], units: NDArray[np.int64], draw: np.random.Generator
) -> NDArray[np.float64]:
    """Means of the differences of as many units drawn with replacement, [RESAMPLES]."""
    _, place = np.unique(units, return_inverse=True)
    of_units = np.stack([np.bincount(place, differences), np.bincount(place)], axis=1)  # [units, sum and rows]
    kinds, counts = np.unique(of_units, axis=0, return_counts=True)
    n = len(of_units)
    sums, rows = (draw.multinomial(n, counts / n, size=RESAMPLES) @ kinds).T
    found: NDArray[np.float64] = sums / rows
    return found

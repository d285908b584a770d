"""What a change of model does to each group: from teacher to student, or from one student to another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.metrics.group_members import Groups

ALL = "all rows"


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
    before: Tensor,
    after: Tensor,
    groups: Groups,
    *,
    split: str,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    units: Tensor | None = None,
) -> list[GroupChange]:
    """Changes on the same rows, with paired percentile bootstrap intervals.

    A resampled mean depends only on how many units of each kind are drawn, so these numbers are drawn, from their
    multinomial distribution; a kind is a sum of differences in {-1, 0, 1} and a number of rows.

    Args:
        before: Whether the first model is right, [N], bool.
        after: Whether the second is, [N], bool.
        groups: Of the N rows.
        split: Its name, for messages.
        resamples: Number of draws.
        level: Of the intervals, in (0, 1).
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
        means = _resampled(other - one, of.numpy(), resamples, draw)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        found.append(GroupChange(name, len(one), float(one.mean()), float(other.mean()), float(low), float(high)))
    return found


def _resampled(
    differences: NDArray[np.float64], units: NDArray[np.int64], resamples: int, draw: np.random.Generator
) -> NDArray[np.float64]:
    """Means of the differences of as many units drawn with replacement, [resamples]."""
    _, place = np.unique(units, return_inverse=True)
    of_units = np.stack([np.bincount(place, differences), np.bincount(place)], axis=1)  # [units, sum and rows]
    kinds, counts = np.unique(of_units, axis=0, return_counts=True)
    n = len(of_units)
    sums, rows = (draw.multinomial(n, counts / n, size=resamples) @ kinds).T
    found: NDArray[np.float64] = sums / rows
    return found

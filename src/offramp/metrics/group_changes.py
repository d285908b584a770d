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
) -> list[GroupChange]:
    """Changes on the same rows, with paired percentile bootstrap intervals.

    A resampled mean of differences in {-1, 0, 1} depends only on how many rows of each kind are drawn, so these numbers
    are drawn, from their multinomial distribution.

    Args:
        before: Whether the first model is right, [N], bool.
        after: Whether the second is, [N], bool.
        groups: Of the N rows.
        split: Its name, for messages.
        resamples: Number of draws.
        level: Of the intervals, in (0, 1).
        seed: Of the draws.

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
        means = _resampled(other - one, resamples, draw)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        found.append(GroupChange(name, len(one), float(one.mean()), float(other.mean()), float(low), float(high)))
    return found


def _resampled(differences: NDArray[np.float64], resamples: int, draw: np.random.Generator) -> NDArray[np.float64]:
    """Means of as many differences drawn with replacement, [resamples]."""
    values, counts = np.unique(differences, return_counts=True)
    n = len(differences)
    return draw.multinomial(n, counts / n, size=resamples) @ values / n

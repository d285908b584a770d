"""Intervals: percentiles over resampled groups of examples (the cluster bootstrap), and exact ones of a share.

Examples of one group (questions on one article) are not independent of each other, so whole groups are drawn (Davison
and Hinkley, 1997, section 3.8). All arms are summarised over the same draws, which makes differences and ratios between
them paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.values import check_level

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Sums of columns, [R, K] -> one value per row, [R]."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval; None where there is nothing to resample, or nothing was."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Floats, ends: tuple[float, float] = (0.025, 0.975)) -> Interval:
        """From the estimate and its resamples, [1 + R]."""
        if len(values) == 1:
            return cls(float(values[0]))
        low, high = np.quantile(values[1:], ends)
        return cls(float(values[0]), float(low), float(high))


class Bootstrap:
    """Draws of groups, the same for everything that is estimated.

    Args:
        groups: The group of each of the N examples.
        resamples: Number of draws R.
        seed: Of the draws; numpy's PCG64, the same everywhere.
        level: Share of the draws that an interval holds, in (0, 1).

    Raises:
        ValueError: No examples, no resamples, or a level outside (0, 1).
    """

    def __init__(
        self, groups: Sequence[str], *, resamples: int = 2000, seed: int = 0, level: float = 0.95
    ) -> None:  # fmt: skip
        if not groups:
            raise ValueError("there are no examples to summarise; give at least one")
        if resamples < 1:
            raise ValueError(f"resamples is {resamples}; it must be at least 1 (1000 or more are customary)")
        check_level("level", level)
        names, self.index = np.unique(list(groups), return_inverse=True)
        self.groups, self.resamples, self.seed, self.level = len(names), resamples, seed, level
        draw = np.random.default_rng(seed)
        self.weights = draw.multinomial(self.groups, [1 / self.groups] * self.groups, size=resamples)  # [R, G]

    def estimate(self, columns: Any, statistic: Statistic) -> Interval:
        """A statistic of sums over the examples' columns, [N, K], and the percentiles of its values over the draws."""
        table = np.asarray(columns, dtype=np.float64)
        by_group = np.zeros((self.groups, table.shape[1]))
        np.add.at(by_group, self.index, table)  # [N, K] -> [G, K]
        value = float(statistic(table.sum(axis=0, keepdims=True))[0])
        if self.groups == 1:
            return Interval(value)
        tail = (1 - self.level) / 2
        return Interval.of(np.r_[value, statistic(self.weights @ by_group)], (tail, 1 - tail))  # [R, G] @ [G, K]

    def mean(self, values: Sequence[float]) -> Interval:
        """Mean over the examples."""
        return self.ratio(values, [1.0] * len(values))

    def ratio(self, above: Sequence[float], below: Sequence[float]) -> Interval:
        """Sum over sum, the mean of a quantity per unit of another; 0 / 0 counts as 1, nothing spent of nothing."""
        return self.estimate(np.column_stack([above, below]), lambda sums: quotient(sums[:, 0], sums[:, 1]))


def quotient(above: Floats, below: Floats) -> Floats:
    """Of each pair; 0 / 0 counts as 1, nothing spent of nothing."""
    return np.divide(above, below, out=np.ones_like(above), where=below != 0)

"""Intervals and comparisons: of examples by the bootstrap, of shares, and of runs that differ in their seed.

Examples of one group (questions on one article) are not independent of each other, so whole groups are drawn in the
cluster bootstrap (Davison and Hinkley, 1997, section 3.8). All arms are summarised over the same draws, which makes
differences and ratios between them paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

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


# ---------------------------------------------------------------- of a share

Method: TypeAlias = Literal["exact", "wilson"]


@dataclass(frozen=True)
class Share:
    """A share of rows and the ends of its binomial interval."""

    value: float
    low: float
    high: float

    @property
    def ends(self) -> tuple[float, float]:
        """Low and high."""
        return self.low, self.high


def binomial(count: int, trials: int, *, level: float = 0.95, method: Method = "exact") -> Share:
    """A share, count / trials, with its interval at a level in (0, 1), by the method "exact" or "wilson"."""
    from scipy.stats import binomtest

    ends = binomtest(count, trials).proportion_ci(confidence_level=level, method=method)
    return Share(count / trials, float(ends.low), float(ends.high))


# ---------------------------------------------------------------- over seeds


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds.

    Attributes:
        mean: Over the seeds.
        sd: Standard deviation, with S - 1 below; NaN for one seed.
    """

    mean: float
    sd: float


@dataclass(frozen=True)
class SeedSummary:
    """Accuracies of G groups in S runs that differ in the seed.

    The minimum over groups is biased low, and which group it is changes; so both orders of mean and minimum are given.

    Attributes:
        seeds: S.
        groups: Of each group, by name.
        mean_of_minima: Of the worst group of each run.
        minimum_of_means: The smallest of the groups' means.
        minimum_group: The group of that.
    """

    seeds: int
    groups: dict[str, Spread]
    mean_of_minima: Spread
    minimum_of_means: float
    minimum_group: str


def summarise_seeds(accuracies: ArrayLike, names: Sequence[str]) -> SeedSummary:
    """Summarise runs by accuracies [S, G] and names of the groups, G; a ValueError for another shape, or no run."""
    table = np.asarray(accuracies, dtype=np.float64)
    if table.ndim != 2 or not len(table) or table.shape[1] != len(names):
        raise ValueError(
            f"accuracies have shape {list(table.shape)}; [runs, {len(names)} groups] is needed, one run or more"
        )
    means = table.mean(axis=0)
    at = int(means.argmin())
    return SeedSummary(
        len(table), {name: spread(column) for name, column in zip(names, table.T, strict=True)},
        spread(table.min(axis=1)), float(means[at]), names[at],
    )  # fmt: skip


def spread(values: ArrayLike) -> Spread:
    """Mean and standard deviation, with S - 1 below."""
    array = np.asarray(values, dtype=np.float64)
    return Spread(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan"))


SIGNIFICANT = 0.05
"""P-value below which a difference is called one."""
SHARES, CHANGES = (0.0, 1.0), (-1.0, 1.0)
"""What figures can be: shares, such as accuracies, and differences of two."""


def t_interval(
    values: ArrayLike, level: float = 0.95, bounds: tuple[float, float] | None = None
) -> tuple[float, float]:  # fmt: skip
    """Student's t interval of a mean over seeds; its ends are NaN for one seed.

    Args:
        values: A figure of each run, [S].
        level: Of the interval, in (0, 1).
        bounds: Of the figures, such as `SHARES`, which the interval does not leave; None: there are none.

    Returns:
        Its lower and its upper end.
    """
    from scipy import stats

    found, n = spread(values), np.size(values)
    half = float(stats.t.isf((1 - level) / 2, n - 1)) * found.sd / n**0.5 if n > 1 else float("nan")
    low, high = np.clip([found.mean - half, found.mean + half], *(bounds or (-np.inf, np.inf)))
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """A method against a reference, seed by seed.

    Attributes:
        seeds: S.
        difference: Mean of method minus reference, with the standard deviation of the differences.
        low: Lower end of its t interval.
        high: Upper end.
        t_p: P-value of the paired t test, two-sided; None if all differences are equal but for rounding.
        wilcoxon_p: P-value of Wilcoxon's signed-rank test, two-sided, exact for few seeds; 1 if no difference is not 0.
        holm_p: `t_p` corrected for the other methods compared by `compare`; None likewise, and before.
    """

    seeds: int
    difference: Spread
    low: float
    high: float
    t_p: float | None
    wilcoxon_p: float
    holm_p: float | None = None

    @property
    def verdict(self) -> str:
        """In words: by Holm's p where there is one, by that of the t test of a single comparison.

        An interval that leaves out 0 is no verdict where several methods were compared. Differences that are equal in
        all seeds have no t test.
        """
        p = self.t_p if self.holm_p is None else self.holm_p
        if p is None:
            return "not tested" if abs(self.difference.mean) > 1e-12 else "no difference shown"
        if p >= SIGNIFICANT:
            return "no difference shown"
        return "higher" if self.difference.mean > 0 else "lower"


def paired(
    method: ArrayLike, reference: ArrayLike, level: float = 0.95, bounds: tuple[float, float] | None = None
) -> Paired:  # fmt: skip
    """Compare runs with the same seeds, data order and teacher.

    Args:
        method: A figure of each run, [S].
        reference: The same of the reference, [S], seeds in the same order.
        level: Of the interval, in (0, 1).
        bounds: Of the differences, such as `CHANGES`; None: there are none.

    Returns:
        The difference, its interval and p-values.

    Raises:
        ValueError: Fewer than two seeds, different numbers of them, or a figure is not finite.
    """
    first, second = np.asarray(method, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise ValueError(
            f"figures have shapes {list(first.shape)} and {list(second.shape)}; one per seed of each is needed, for "
            "two seeds or more"
        )
    differences = first - second
    if not np.isfinite(differences).all():
        raise ValueError("a figure is not finite; leave out the seed in both")
    from scipy import stats

    n, found = len(differences), spread(differences)
    low, high = t_interval(differences, level, bounds)
    alike = found.sd <= 1e-12 * max(1.0, abs(found.mean))
    t_p = None if alike else float(2 * stats.t.sf(abs(found.mean) / (found.sd / n**0.5), n - 1))
    signed = differences[np.abs(differences) > 1e-12]  # Wilcoxon: without the zeros
    wilcoxon_p = float(stats.wilcoxon(signed).pvalue) if len(signed) else 1.0
    return Paired(n, found, low, high, t_p, wilcoxon_p)


def compare(
    methods: Mapping[str, ArrayLike], reference: ArrayLike, level: float = 0.95,
    bounds: tuple[float, float] | None = None,
) -> dict[str, Paired]:  # fmt: skip
    """Several methods against one reference, by figures [S] of runs; p-values of t tests corrected as by Holm."""
    found = together([paired(values, reference, level, bounds) for values in methods.values()])
    return dict(zip(methods, found, strict=True))


def together(comparisons: Sequence[Paired]) -> list[Paired]:
    """The same comparisons, p-values of the t tests corrected for their number by Holm's method."""
    corrected = iter(holm([found.t_p for found in comparisons if found.t_p is not None]))
    return [replace(found, holm_p=None if found.t_p is None else next(corrected)) for found in comparisons]


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm, 1979): the k-th smallest times m - k + 1, ascending, at most 1."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected

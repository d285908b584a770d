"""What an evaluation of calibration methods found on a test set: points, curves over cost, figures with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.metrics.intervals import Interval

Floats = NDArray[np.float64]
METRICS = ("top1", "top5", "nlpd", "ece", "aurc", "augrc", "brier")
"""In the order of tables; see `offramp.metrics.calibration`. Those of shares of right answers are better if higher."""
SHARES = (0.25, 0.5, 0.75)
"""Of the full cost, where curves are read off."""


@dataclass(frozen=True)
class Point:
    """One budget.

    Attributes:
        q: Which; None: no budget was asked for, the rows leave at one exit.
        target: Asked FLOPs per row.
        threshold_cost: FLOPs per row on the rows that thresholds come from.
        cost: FLOPs per row on the test set.
        shares: Shares of the test rows that leave at each exit, [E].
        metrics: By name.
    """

    q: float | None
    target: float
    threshold_cost: float
    cost: float
    shares: tuple[float, ...]
    metrics: dict[str, float]

    @property
    def overshoot(self) -> float:
        """Realised over asked cost, minus 1."""
        return self.cost / self.target - 1


@dataclass(frozen=True)
class Fitted:
    """How a method was fitted to a network.

    Attributes:
        temperatures: T of each exit, [E].
        priors: Prior variance ω of each exit, [E]; None: the method has none.
        messages: What to know: settings at the ends of their grids, singular factors, classes without rows.
    """

    temperatures: tuple[float, ...]
    priors: tuple[float, ...] | None
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A method on a test set.

    Attributes:
        name: Name of the method.
        test: Name of the test set.
        full_cost: FLOPs per row of the plain full network, the backbone and the last exit's head: the unit of relative
            costs.
        points: The 39 budgets; one for the full model.
        alone: Each exit taken by all rows, E points.
        mean: Metrics, and "cost" over the full one, averaged over the budgets.
        difference: The same minus the baseline's, on the same resamples; empty for the baseline.
        at: By share of the full cost ("25%") and metric: read off the curve over realised costs, which begins with the
            first exit alone and ends with the last; None where it does not reach.
        area: By metric, mean height of the curve over the costs that all methods of the test set reach; None likewise.
        reliability: For each exit its bins of confidence: lower end, upper end, rows, mean confidence, accuracy.
        clamped: For each exit, how many rows whose right class had a probability below 1e-12, which counts as that in
            the NLPD.
        heads_cost: FLOPs per row of the full network with the heads of all exits; None: written by an earlier version,
            which had these as `full_cost`.
    """

    name: str
    test: str
    full_cost: float
    points: tuple[Point, ...]
    alone: tuple[Point, ...]
    mean: dict[str, Interval]
    difference: dict[str, Interval]
    at: dict[str, dict[str, float | None]]
    area: dict[str, float | None]
    reliability: tuple[tuple[tuple[float, float, float, float, float], ...], ...]
    clamped: tuple[int, ...]
    heads_cost: float | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names in the order of tables."""
        return tuple(name for name in METRICS if name in self.mean)

    @property
    def is_curve(self) -> bool:
        """Whether there are several budgets."""
        return len(self.points) > 1

    def curve(self, metric: str) -> Curve:
        """Realised costs over the full cost and a metric; the ends are the first and the last exit alone."""
        points = [self.alone[0], *self.points, self.alone[-1]]
        return curve([p.cost / self.full_cost for p in points], [p.metrics[metric] for p in points])


# ---------------------------------------------------------------- curves over cost

Curve = tuple[Floats, Floats]
"""Ascending costs, and values."""


def curve(costs: Sequence[float], values: Sequence[float]) -> Curve:
    """Points in the order of their costs; those of equal cost become their mean."""
    unique, place = np.unique(np.asarray(costs, dtype=np.float64), return_inverse=True)
    return unique, np.bincount(place, np.asarray(values, dtype=np.float64)) / np.bincount(place)


def interpolate(points: Curve, cost: float) -> float | None:
    """The value at a cost on straight lines between points; None beyond the ends."""
    costs, values = points  # for means over rows, a line is what drawing one of two settings for each row gives
    return float(np.interp(cost, costs, values)) if costs[0] <= cost <= costs[-1] else None


def area(points: Curve, low: float, high: float) -> float | None:
    """Mean height of the curve between two costs, by the trapezoid rule; None if it does not reach both."""
    costs, values = points
    if not costs[0] <= low < high <= costs[-1]:
        return None
    x = np.r_[low, costs[(costs > low) & (costs < high)], high]
    return float(np.trapezoid(np.interp(x, costs, values), x) / (high - low))

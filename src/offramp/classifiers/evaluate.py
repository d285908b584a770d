"""Calibration methods compared over budgets: the protocol of `offramp.risk.budgets` on test sets, all costs charged.

Meronen et al. (2023), "Fixing Overconfidence in Dynamic Neural Networks". As there, all exits are computed and chosen
afterwards: what is measured is quality and FLOPs, not seconds. Found are points, curves over cost, and figures with
intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.metrics import calibration
from offramp.metrics.calibration import Grades, grade, reliability
from offramp.metrics.intervals import Interval
from offramp.risk import budgets
from offramp.uncertainty.outputs import ExitOutputs, require_disjoint
from offramp.uncertainty.posterior import Posterior

Floats = NDArray[np.float64]
METRICS = ("top1", "top5", "nlpd", "ece", "aurc", "augrc", "brier")
"""In the order of tables; see `offramp.metrics.calibration`. Those of shares of right answers are better if higher."""
SHARES = (0.25, 0.5, 0.75)
"""Of the full cost, where curves are read off."""
Curve = tuple[Floats, Floats]
"""Ascending costs, and values."""
BASELINE = "temperature"
"""What other methods are compared with: Laplace has to show what it adds to it."""
STATIC = ("vanilla", "temperature")
"""Methods of which one exit is also taken for all rows, the best affordable one or the last."""


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


@dataclass(frozen=True)
class Settings:
    """How an evaluation is done.

    Attributes:
        bins: Bins of the calibration error; 10 for the published tables.
        resamples: Bootstrap draws of test rows, for the intervals; 0: none.
        seed: Seed of the draws.
    """

    bins: int = 15
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bins < 1 or self.resamples < 0 or self.seed < 0:
            raise ValueError(
                f"bins is {self.bins}, resamples {self.resamples} and seed {self.seed}; they count from 1, 0 and 0"
            )


def charged(costs: Tensor, posterior: Posterior) -> Tensor:
    """FLOPs of a row up to and including each exit, float64 [E], with what the method adds at all exits so far."""
    return costs.double().cpu() + _added(posterior, len(costs)).cumsum(0)


def _added(posterior: Posterior, exits: int) -> Tensor:
    """FLOPs that the method adds at each exit, float64 [E]."""
    return torch.tensor([float(posterior.overhead(exit).counted) for exit in range(exits)], dtype=torch.float64)


def evaluate(
    posteriors: Mapping[str, Posterior],
    threshold: ExitOutputs,
    tests: Mapping[str, ExitOutputs],
    settings: Settings = Settings(),  # noqa: B008 - frozen
) -> list[Method]:
    """Every method at the 39 budgets on every test set, next to static exits and the full model.

    Thresholds are each method's own, fitted to its confidences (largest probabilities) on the threshold split, and the
    same on all test sets. The static exit of a budget is the most accurate one on the threshold split among those that
    cost no more than asked. It is charged the plain network cut there, without the heads of earlier exits; the full
    model likewise, and to that plain full network all costs are relative.

    Args:
        posteriors: By name, such as `offramp.uncertainty.posterior.METHODS`.
        threshold: Rows that thresholds are fitted to.
        tests: By name, such as "clean" and "noise".
        settings: How.

    Returns:
        Methods of the first test set, then of the next.

    Raises:
        ValueError: There are no methods or tests, the threshold split shares rows with a test set, or they are not of
            the same network.
    """
    if not posteriors or not tests:
        raise ValueError(f"there are {len(posteriors)} methods and {len(tests)} test sets; at least one each is needed")
    for name, test in tests.items():
        require_disjoint(threshold=threshold, **{name: test})
        if (test.exits, test.classes) != (threshold.exits, threshold.classes):
            raise ValueError(
                f"test set {name} has {test.exits} exits and {test.classes} classes, the threshold split "
                f"{threshold.exits} and {threshold.classes}; they must be of one network"
            )
    prepared = {name: _prepare(posterior, threshold) for name, posterior in posteriors.items()}
    found = []
    for name, test in tests.items():
        weights = calibration.resample(test.rows, settings.resamples, settings.seed)
        tried: list[_Tried] = []
        for method, posterior in posteriors.items():
            p = posterior.probabilities(test)
            rows = _Rows(tuple(grade(one, test.labels) for one in p), p.amax(-1), weights, settings.bins)
            tried += _try(method, prepared[method], rows)
        found += _compare(name, tried, threshold)
    return found


# ---------------------------------------------------------------- one method on one test set


@dataclass(frozen=True)
class _Prepared:
    """What a method takes from the threshold split."""

    costs: Tensor
    static: Tensor  # of the plain network cut after each exit, with the overhead of that exit alone
    budgets: tuple[budgets.Budget, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class _Rows:
    """A method's answers at all exits, graded."""

    grades: tuple[Grades, ...]
    confidences: Tensor
    weights: calibration.Weights
    bins: int

    def leaving(self, exits: NDArray[np.int64], once: bool = False) -> dict[str, Floats]:
        """Metrics of rows that leave at these exits, [1 + R], or [1]."""
        rows = np.arange(len(exits))

        def pick(name: str) -> Floats:
            return np.stack([getattr(g, name) for g in self.grades])[exits, rows]

        five = None if self.grades[0].among_five is None else pick("among_five")
        names = ("confidence", "correct", "nlpd", "brier")
        left = Grades(**{name: pick(name) for name in names}, among_five=five, clamped=0)
        found = calibration.resampled_scores(left, self.weights[:1] if once else self.weights, self.bins)
        return {metric: found[metric] for metric in METRICS if metric in found}


@dataclass(frozen=True)
class _Tried:
    """A method with all its resamples, [1 + R]."""

    name: str
    points: tuple[Point, ...]
    alone: tuple[Point, ...]
    mean: dict[str, Floats]
    rows: _Rows


def _prepare(posterior: Posterior, threshold: ExitOutputs) -> _Prepared:
    costs, p = charged(threshold.costs, posterior), posterior.probabilities(threshold)
    static = (threshold.costs if threshold.cut is None else threshold.cut).double().cpu()
    static = static + _added(posterior, len(costs))
    accuracy = tuple(float(grade(one, threshold.labels).correct.mean()) for one in p)
    return _Prepared(costs, static, tuple(budgets.fit(p.amax(-1), costs, q) for q in budgets.QS), accuracy)


def _try(method: str, ready: _Prepared, rows: _Rows) -> list[_Tried]:
    exits = [budgets.leave(rows.confidences, budget.thresholds).numpy() for budget in ready.budgets]
    asked = [(budget.q, budget.target, budget.realised) for budget in ready.budgets]
    found = [_at(method, asked, exits, ready.costs.numpy(), rows)]
    if method not in STATIC:
        return found
    costs, last = ready.static, len(ready.static) - 1
    chosen = [
        max((e for e in range(last + 1) if costs[e] <= target or e == 0), key=lambda e: ready.accuracy[e])
        for _, target, _ in asked
    ]
    alone = [np.full(len(exits[0]), e) for e in range(last + 1)]
    fixed = [(q, target, float(costs[e])) for (q, target, _), e in zip(asked, chosen, strict=True)]
    found.append(_at(f"static exit, {method}", fixed, [alone[e] for e in chosen], costs.numpy(), rows))
    whole = [(None, float(costs[-1]), float(costs[-1]))]
    return [*found, _at(f"full model, {method}", whole, [alone[-1]], costs.numpy(), rows)]


def _at(
    name: str,
    asked: Sequence[tuple[float | None, float, float]],
    exits: Sequence[NDArray[np.int64]],
    costs: Floats,
    rows: _Rows,
) -> _Tried:
    """A method at budgets (q, target, cost on the threshold split) under which rows leave at these exits."""
    seen: dict[bytes, dict[str, Floats]] = {}  # static exits are the same at many budgets
    values = []
    for e in exits:
        if (key := e.tobytes()) not in seen:
            seen[key] = rows.leaving(e)
        values.append(seen[key])
    points = tuple(_point(a, e, costs, v) for a, e, v in zip(asked, exits, values, strict=True))
    everyone = [np.full(len(exits[0]), e) for e in range(len(costs))]
    alone = tuple(
        _point((None, float(c), float(c)), e, costs, rows.leaving(e, once=True))
        for c, e in zip(costs, everyone, strict=True)
    )
    mean = {metric: np.mean([v[metric] for v in values], axis=0) for metric in values[0]}
    mean["cost"] = calibration.resampled_mean(np.mean([costs[e] for e in exits], axis=0)[None], rows.weights)[0]
    return _Tried(name, points, alone, mean, rows)


def _point(
    asked: tuple[float | None, float, float], exits: NDArray[np.int64], costs: Floats, values: dict[str, Floats]
) -> Point:
    shares = np.bincount(exits, minlength=len(costs)) / len(exits)
    return Point(
        *asked, float(costs[exits].mean()), tuple(shares.tolist()), {name: float(v[0]) for name, v in values.items()}
    )


# ---------------------------------------------------------------- the methods of a test set


def _compare(test: str, tried: Sequence[_Tried], threshold: ExitOutputs) -> list[Method]:
    """Figures of all methods, over the same costs and next to the baseline's."""
    full_cost = threshold.full_cost
    for one in tried:
        one.mean["cost"] = one.mean["cost"] / full_cost
    baseline = next((one.mean for one in tried if one.name == BASELINE), None)
    low = max(one.alone[0].cost for one in tried) / full_cost
    high = min(one.alone[-1].cost for one in tried) / full_cost
    made = [_method(test, one, baseline, full_cost, low, high) for one in tried]
    return [replace(method, heads_cost=float(threshold.costs[-1])) for method in made]


def _method(
    test: str, tried: _Tried, baseline: dict[str, Floats] | None, full_cost: float, low: float, high: float
) -> Method:
    against = {} if baseline is None or tried.name == BASELINE else baseline
    method = Method(
        tried.name, test, full_cost, tried.points, tried.alone,
        {metric: Interval.of(values) for metric, values in tried.mean.items()},
        {metric: Interval.of(tried.mean[metric] - values) for metric, values in against.items()},
        {}, {}, tuple(tuple(reliability(g, tried.rows.bins).bins()) for g in tried.rows.grades),
        tuple(g.clamped for g in tried.rows.grades),
    )  # fmt: skip
    if method.is_curve:
        for metric in method.metrics:
            curve = method.curve(metric)
            for share in SHARES:
                method.at.setdefault(f"{share:.0%}", {})[metric] = interpolate(curve, share)
            method.area[metric] = area(curve, low, high)
    return method

"""One temperature per exit, softmax(z / T): the search for the T that predicts the labels best.

Guo et al. (2017), "On Calibration of Modern Neural Networks", section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LOWEST, HIGHEST = 0.05, 20.0
"""Between these the temperature is looked for; their logarithms are opposite, so 1 is in the middle."""
SCAN = tuple(math.exp(i / 4 * math.log(HIGHEST)) for i in range(-4, 5))
MERONEN = (0.3, 0.5, 0.7, 1.0, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0)
"""The published grid (Meronen et al., 2023)."""


@dataclass(frozen=True)
class Search:
    """The best temperature and all that were tried.

    Attributes:
        temperature: The best; between equals, the one with the smallest |ln T|.
        loss: At it.
        tried: (T, loss) of each temperature that was looked at, by T.
        at_edge: Whether the best is the first or the last that is allowed: a better one may lie beyond.
    """

    temperature: float
    loss: float
    tried: tuple[tuple[float, float], ...]
    at_edge: bool


def search(
    loss: Callable[[float], float], grid: Sequence[float] | None = None, precision: float = 1e-6
) -> Search:  # fmt: skip
    """The temperature with the smallest loss.

    Args:
        loss: Of a temperature. For one exit alone it is convex in 1 / T; for ensembles and Monte-Carlo means it need
            not be, hence the scan.
        grid: Temperatures to try; None: any from `LOWEST` to `HIGHEST`, by bounded minimisation over ln T between the
            neighbours of the best of nine.
        precision: Of ln T, without a grid.

    Returns:
        The best, and what was tried.
    """
    tried: dict[float, float] = {}

    def value(temperature: float) -> float:
        return tried.setdefault(temperature, loss(temperature))

    def best() -> float:
        return min(tried, key=lambda t: (tried[t], abs(math.log(t))))

    points = sorted(grid or SCAN)
    for temperature in points:
        value(temperature)
    if grid is None:
        place = points.index(best())
        ends = points[max(place - 1, 0)], points[min(place + 1, len(points) - 1)]
        between(value, *ends, precision)
    found = best()
    at_edge = min(abs(math.log(found / end)) for end in (points[0], points[-1])) < 2 * precision
    return Search(found, tried[found], tuple(sorted(tried.items())), at_edge)


def between(
    loss: Callable[[float], float], low: float = LOWEST, high: float = HIGHEST, precision: float = 2e-3
) -> tuple[float, float]:  # fmt: skip
    """The best temperature between two, by bounded minimisation over ln T to this precision, and the loss at it."""
    from scipy.optimize import minimize_scalar

    bounds = math.log(low), math.log(high)
    found = minimize_scalar(
        lambda at: loss(math.exp(at)), bounds=bounds, method="bounded", options={"xatol": precision}
    )  # fmt: skip
    return math.exp(float(found.x)), float(found.fun)

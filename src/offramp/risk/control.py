"""Which settings of a sequence may be used, so that the promise holds for the one that is chosen.

Settings are counted as they come, from 0 and from safe to aggressive; the order must not depend on the prompts that
certify. "Never exit" is not among them: it needs no certificate, and it is what `index` None stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.risk.losses import TIE, Losses, checked
from offramp.values import check_level

# ---------------------------------------------------------------- one sequence


@dataclass(frozen=True)
class Certified:
    """What a fixed sequence of tests allows: with probability 1 - level, all of `passed` keep the tolerance together.

    Attributes:
        passed: All settings that passed. Any of them may be used, so also the cheapest.
        p_values: Those that were looked at: of `passed`, and of the setting that failed if one did.
        level: Of the tests.
    """

    passed: tuple[int, ...]
    p_values: tuple[float, ...]
    level: float

    @property
    def index(self) -> int | None:
        """The last setting that passed, never one that failed; None: nothing certified, never exit."""
        return self.passed[-1] if self.passed else None


def fixed_sequence(p_values: Iterable[float], failure: float) -> Certified:
    """Test one setting after the other, from safe to aggressive, and stop at the first that fails.

    Angelopoulos et al. (2021), "Learn then Test", fixed-sequence testing. Every test is at the full level: a false one
    can only follow if the first true null was rejected.

    Args:
        p_values: Of each setting in order, computed when asked for: a generator, or `map(p_value, settings)`. After the
            first failure no further one is asked for.
        failure: Probability with which the promise may fail, in (0, 1).

    Returns:
        The settings that passed.

    Raises:
        ValueError: A p-value is NaN or outside [0, 1], or `failure` is outside (0, 1).
    """
    check_level("failure", failure)
    seen: list[float] = []
    passed = 0
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"the p-value of setting {len(seen)} is {p}; allowed are values in [0, 1]")
        seen.append(float(p))
        if p > failure:
            break
        passed += 1
    return Certified(tuple(range(passed)), tuple(seen), failure)


# ---------------------------------------------------------------- an order found on other prompts


def pareto_front(losses: Losses, costs: Losses) -> tuple[int, ...]:
    """Settings that no other one beats in loss without costing more.

    Args:
        losses: Mean loss of each setting, in any order.
        costs: Cost of each setting.

    Returns:
        The settings on the front by increasing loss, so by decreasing cost; of equal ones the first.

    Raises:
        ValueError: There are none, their numbers differ, or a value is not finite.
    """
    loss = checked(losses, -math.inf, math.inf)
    cost = checked(costs, -math.inf, math.inf, "costs")
    if len(loss) != len(cost):
        raise ValueError(f"there are {len(loss)} losses and {len(cost)} costs; each setting has one of both")
    front: list[int] = []
    for setting in np.lexsort((cost, loss)):  # by loss, then by cost; stable
        if not front or cost[setting] < cost[front[-1]]:
            front.append(int(setting))
    return tuple(front)


# ---------------------------------------------------------------- on average


def conformal_risk_control(losses: Iterable[Losses], tolerance: float) -> Certified:
    """The settings whose expected loss on a new prompt is at most `tolerance`, on average over draws.

    Angelopoulos et al. (2024), "Conformal Risk Control", for losses in [0, 1]. Losses that do not grow from setting to
    setting are replaced by their running maximum from the safe side, prompt by prompt, as the paper suggests. What is
    promised if no setting is allowed is the loss of never exiting, which must not exceed the tolerance: consistency
    losses are 0 there. No single calibration comes with a probability.

    Args:
        losses: Of each setting, from safe to aggressive, on the same prompts, S of [N], in [0, 1]; asked for up to the
            first that is not allowed.
        tolerance: Expected loss to stay below, in (0, 1).

    Returns:
        The settings allowed: those with (n·mean + 1) / (n + 1) <= tolerance, which stand in the place of p-values.

    Raises:
        ValueError: A loss is NaN or outside [0, 1], there are none, or the tolerance is outside (0, 1).
    """
    check_level("tolerance", tolerance)

    def risks() -> Iterator[float]:
        worst: NDArray[np.float64] | float = 0.0
        for setting, values in enumerate(losses):
            worst = np.maximum(worst, checked(values, 0, 1, f"losses of setting {setting}"))
            yield float((worst.sum() + 1) / (len(worst) + 1))

    return fixed_sequence(risks(), tolerance + TIE)

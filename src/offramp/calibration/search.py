"""Going through settings in a fixed order, asking for losses only as long as the promise holds; the cheapest is taken.

Why the cheapest may be taken by costs that were measured on the certification prompts themselves: with probability at
least 1 - failure, *all* settings that pass keep the tolerance at once (fixed-sequence testing at level failure / k in
each of k sequences, whose orders the certification prompts have no part in). On that event no choice among them can
break the promise, however it depends on these prompts. "Never exit" joins them at no price where losses are relative to
the full model as it is: it loses nothing, so it may be taken where none of them is cheaper. Relative to another number
format it may lose, so it heads a sequence and has to pass like the others. What may not depend on the certification
prompts are the orders and the number of sequences; leaving settings out beforehand for their cost on other prompts (the
tuning part) only shortens an order. Under conformal risk control losses are made monotone along the one sequence, so
that whatever is chosen among the allowed settings loses at most what the last of them does, whose mean is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.promise import CRC, Promise
from offramp.risk import chains, conformal_risk_control


@dataclass(frozen=True)
class Test:
    """One setting that was looked at.

    Attributes:
        setting: Which, counted from 0.
        chain: In which sequence.
        loss: Mean of its losses.
        p_value: Of "the mean loss of new prompts is above the tolerance"; under conformal risk control, what is
            compared with the tolerance: (n · mean + 1) / (n + 1), of losses made monotone along the sequence.
        passed: Whether the setting is certified.
    """

    __test__ = False  # not one of pytest's

    setting: int
    chain: int
    loss: float
    p_value: float
    passed: bool


@dataclass(frozen=True)
class Outcome:
    """What is certified.

    Attributes:
        selected: The cheapest certified setting, never one that failed; None: nothing is certified, or none of it is
            cheap enough: never exit.
        tests: The settings that were looked at, in their order.
        level: At which each sequence was tested: `failure`, divided among the sequences.
    """

    selected: int | None
    tests: tuple[Test, ...]
    level: float


def search(
    sequences: Sequence[Sequence[int]],
    losses: Callable[[int], NDArray[np.float64]],
    cost: Callable[[int], float],
    promise: Promise,
    *,
    below: float = math.inf,
) -> Outcome:
    """Certify settings.

    Args:
        sequences: Settings from safe to bold, in orders that the losses have no part in; several share `failure`.
        losses: Of a setting, one per independent draw. Asked for up to the first failure of each sequence.
        cost: Of a setting, asked only of certified ones; may have been measured on the same draws.
        promise: What is to hold.
        below: What the cost of the chosen setting must be below.

    Returns:
        The cheapest certified setting, and all that were looked at.

    Raises:
        ValueError: Several sequences for conformal risk control, or a loss outside its range.
    """
    if promise.bound == CRC:
        return _conformal(sequences, losses, cost, promise, below)
    level = promise.failure / len(sequences)
    bound, tests = promise.bound_at(level), list[Test]()

    def p_values(chain: int, sequence: Sequence[int]) -> Iterator[float]:
        for setting in sequence:
            values = losses(setting)
            p = bound(values, promise.tolerance)
            tests.append(Test(setting, chain, float(values.mean()), p, p <= level))
            yield p

    found = chains(
        [p_values(*numbered) for numbered in enumerate(sequences)],
        lambda chain, index: cost(sequences[chain][index]),
        promise.failure,
    )
    if found.chain is None or found.index is None or found.cost is None or found.cost >= below:
        return Outcome(None, tuple(tests), level)
    return Outcome(sequences[found.chain][found.index], tuple(tests), level)


def _conformal(
    sequences: Sequence[Sequence[int]],
    losses: Callable[[int], NDArray[np.float64]],
    cost: Callable[[int], float],
    promise: Promise,
    below: float,
) -> Outcome:
    """Conformal risk control along one sequence, up to the first setting that is not allowed."""
    # Made monotone, losses of later settings are no smaller, so none of those could be allowed. And whatever is chosen
    # among the allowed ones, its losses are at most those of the last one, whose mean is at most the tolerance.
    if len(sequences) > 1:
        raise ValueError("conformal risk control has no failure probability to divide among chains; use path or pareto")
    rows: list[NDArray[np.float64]] = []
    tests: list[Test] = []
    for setting in sequences[0]:
        rows.append(losses(setting))
        controlled = conformal_risk_control(np.stack(rows), promise.tolerance)
        passed = len(controlled.passed) == len(rows)
        tests.append(Test(setting, 0, float(rows[-1].mean()), controlled.risks[-1], passed))
        if not passed:
            break
    allowed = [test.setting for test in tests if test.passed and cost(test.setting) < below]
    return Outcome(min(allowed, key=cost, default=None), tuple(tests), promise.failure)

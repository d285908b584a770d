"""What is promised, and the search for the cheapest setting that keeps it, asking for losses while the promise holds.

Promised is P( mean loss of new draws <= `tolerance` ) >= 1 - `failure`. Settings are tried in a fixed order.

Why the cheapest may be taken by costs that were measured on the certification draws themselves: with probability at
least 1 - failure, *all* settings that pass keep the tolerance at once (fixed-sequence testing at level failure / k in
each of k sequences, whose orders the certification draws have no part in). On that event no choice among them can
break the promise, however it depends on these draws. "Never exit" joins them at no price where losses are relative to
the full model as it is: it loses nothing, so it may be taken where none of them is cheaper. Relative to another number
format, or to another last exit, it may lose, so it heads a sequence and has to pass like the others. What may not
depend on the certification draws are the orders and the number of sequences; leaving settings out beforehand for their
cost on other draws (the tuning part) only shortens an order. Under conformal risk control losses are made monotone
along the one sequence, so that whatever is chosen among the allowed settings loses at most what the last of them does,
whose mean is bounded.

Settings are counted as they come, from 0 and from safe to bold; the order must not depend on the draws that certify.
"Never exit" is no setting of a sequence: it needs no certificate, and `index` None stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from offramp.risk.bounds import BOUNDS, Bound, samples_needed, samples_needed_like, wsr
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


# ---------------------------------------------------------------- what is promised

CRC = "crc"
"""Conformal risk control, in the place of a bound's name: it bounds the mean, and promises no failure probability."""
_BISECTIONS = 40


class Promised:
    """The part of a promise that is the same whatever loses: a base of frozen dataclasses that say what a loss is.

    Attributes:
        tolerance: What the mean loss of new draws is to stay below, in (0, 1).
        failure: Probability with which that may fail, over the draws that certify, in (0, 1); no part of `CRC`.
        bound: A name of `offramp.risk.BOUNDS`, or `CRC`.
    """

    tolerance: float
    failure: float
    bound: str | None

    @property
    def is_signed(self) -> bool:
        """Whether losses are in [-1, 1]."""
        return False

    def check_levels(self) -> None:
        """Raise a ValueError unless both numbers are in (0, 1)."""
        check_level("tolerance", self.tolerance)
        check_level("failure", self.failure)

    def bound_at(self, level: float) -> Bound:
        """The p-value, for a test at `level`. Conformal risk control has none; Hoeffding-Bentkus stands for it."""
        if self.bound == "wsr":
            return partial(wsr, failure=level)
        if self.is_signed:
            return BOUNDS["hoeffding-signed"]
        return BOUNDS["hoeffding-bentkus" if self.bound == CRC else str(self.bound)]

    def needed(self, level: float, mean: float = 0.0) -> int | None:
        """How many draws certify, at a level, a mean loss of `mean` (0: the fewest that can); None: no number does."""
        if self.bound != CRC:
            return samples_needed(self.bound_at(level), self.tolerance, level, mean)
        if mean >= self.tolerance:
            return None
        return math.ceil((1 - self.tolerance) / (self.tolerance - mean) - 1e-9)  # (n · mean + 1) / (n + 1) <= tolerance

    def needed_like(self, level: float, losses: NDArray[np.float64], seed: int) -> int | None:
        """About how many draws certify, at a level, a setting whose losses stay like the ones observed.

        Betting (`wsr`) looks at all of them, see `offramp.risk.samples_needed_like`; other bounds at their mean only.

        Returns:
            The number; None if no number does.
        """
        if self.bound == "wsr":
            return samples_needed_like(self.bound_at(level), losses, self.tolerance, level, seed=seed)
        return self.needed(level, float(losses.mean()))

    def upper_limit(self, losses: NDArray[np.float64]) -> float:
        """The smallest tolerance that losses which had no part in choosing certify by the same bound; 1 if none."""
        bound, low, high = self.bound_at(self.failure), 0.0, 1.0
        for _ in range(_BISECTIONS):  # p-values fall as the tolerance grows
            middle = (low + high) / 2
            low, high = (low, middle) if bound(losses, middle) <= self.failure else (middle, high)
        return high


# ---------------------------------------------------------------- the search


@dataclass(frozen=True)
class Test:
    """One setting that was looked at.

    Attributes:
        setting: Which, counted from 0.
        chain: In which sequence.
        loss: Mean of its losses.
        p_value: Of "the mean loss of new draws is above the tolerance"; under conformal risk control, what is
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
    promise: Promised,
    *,
    below: float = math.inf,
) -> Outcome:
    """Certify settings.

    Angelopoulos et al. (2021), "Learn then Test", fixed-sequence testing, from several starts without passing on the
    share of a sequence that went through. Or Angelopoulos et al. (2024), "Conformal Risk Control".

    Args:
        sequences: Settings from safe to bold, in orders that the losses have no part in; several share `failure`.
        losses: Of a setting, one per independent draw. Asked for up to the first failure of each sequence.
        cost: Of a setting, asked only of certified ones; may have been measured on the same draws. Between equals, the
            earlier sequence and the safer setting is taken.
        promise: What is to hold.
        below: What the cost of the chosen setting must be below.

    Returns:
        The cheapest certified setting, and all that were looked at.

    Raises:
        ValueError: No sequence, several ones for conformal risk control, or a loss or cost outside its range.
    """
    if not sequences:
        raise ValueError("sequences is empty; at least one is needed")
    if promise.bound == CRC and len(sequences) > 1:
        raise ValueError("conformal risk control has no failure probability to divide among chains; use path or pareto")
    level, tests = promise.failure / len(sequences), list[Test]()
    bound = promise.bound_at(level)

    def asked(sequence: Sequence[int], means: list[float]) -> Iterator[NDArray[np.float64]]:
        for setting in sequence:
            values = losses(setting)
            means.append(float(values.mean()))
            yield values

    for chain, sequence in enumerate(sequences):
        means: list[float] = []
        given = asked(sequence, means)
        if promise.bound == CRC:
            found = conformal_risk_control(given, promise.tolerance)
        else:
            found = fixed_sequence((bound(values, promise.tolerance) for values in given), level)
        tests += [
            Test(setting, chain, mean, p, at in found.passed)
            for at, (setting, mean, p) in enumerate(zip(sequence, means, found.p_values, strict=False))
        ]
    return Outcome(_cheapest((test.setting for test in tests if test.passed), cost, below), tuple(tests), level)


def _cheapest(settings: Iterable[int], cost: Callable[[int], float], below: float) -> int | None:
    costs = {setting: float(cost(setting)) for setting in settings}
    if strange := [setting for setting, value in costs.items() if math.isnan(value)]:
        raise ValueError(f"the cost of setting {strange[0]} is nan; it must be a number")
    return min((setting for setting, value in costs.items() if value < below), key=costs.__getitem__, default=None)


# ---------------------------------------------------------------- is a promise kept?

# A calibration repeated on draws from a pool, and what its choices lose. Draws with replacement are independent and
# like the pool: of it, the promise holds. (A part drawn without replacement tells more about the pool than as many
# independent draws would, and the promise is broken too seldom.) Parts that were not drawn judge with their own noise,
# and are unlucky where those drawn were lucky.


Part = TypeVar("Part")
"""What certifies once: whatever its losses and costs are found by, such as places in the pool."""


@dataclass(frozen=True)
class CalibrationCounts:
    """What repeated calibrations came to.

    Attributes:
        above: How many chose a setting whose mean loss, where it is judged, is above the tolerance.
        nothing: How many certified nothing that is cheap enough.
        loss: Mean over all of them of these mean losses.
    """

    above: int
    nothing: int
    loss: float


def recalibrated(
    parts: Iterable[Part],
    sequences: Sequence[Sequence[int]],
    losses: Callable[[int, Part], NDArray[np.float64]],
    cost: Callable[[int, Part], float],
    promise: Promised,
    *,
    below: float = math.inf,
) -> list[int | None]:
    """What a calibration by each of several parts of a pool selects.

    Args:
        parts: What certifies each time.
        sequences: As for `search`.
        losses: Of a setting on a part, [n], in the order that betting goes by.
        cost: Of a setting on a part.
        promise: What each calibration is to certify.
        below: As for `search`.

    Returns:
        The selected setting of each; None: nothing that is cheap enough was certified.
    """

    def by(part: Part) -> int | None:
        return search(
            sequences, lambda s: losses(s, part), lambda s: cost(s, part), promise, below=below
        ).selected  # fmt: skip

    return [by(part) for part in parts]


def judged(selected: Sequence[int | None], losses: Sequence[float], promise: Promised) -> CalibrationCounts:
    """Counts, from what calibrations selected and the mean losses of that (of nothing: of never exiting)."""
    above = sum(loss > promise.tolerance for loss in losses)
    return CalibrationCounts(above, selected.count(None), float(np.mean(losses)))

"""What is promised: P( mean loss of new draws <= `tolerance` ) >= 1 - `failure`, and what its bound makes of losses."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from numpy.typing import NDArray

from offramp.risk.bounds import BOUNDS, Bound, samples_needed, samples_needed_like, wsr
from offramp.values import check_level

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

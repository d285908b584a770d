"""What a calibration minimises: a cost over the full model's on the same prompts, of records made of both.

Per generated token, a cost is what was spent behind the prompt over the tokens generated there, so that neither short
prompts nor short answers save anything: only exits do. All are ratios of sums over prompts, not means of ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.evaluation.record_file import Record
from offramp.evaluation.summary import later_flops, later_seconds, later_tokens, turns

MEASURES = {
    "flops-per-token": "FLOPs per generated token",
    "flops": "FLOPs, prompts included",
    "seconds-per-token": "seconds per generated token",
    "seconds": "seconds, prompts included",
}
"""What can be minimised, in words."""
PER_TOKEN = "flops-per-token"
NO_LESS = 1.0
"""The cost of never leaving early: a policy at this cost or above does not pay."""


@dataclass(frozen=True)
class Spent:
    """What each prompt cost under a setting, and what the sums of that are divided by.

    Attributes:
        amounts: FLOPs or seconds, [N].
        counts: Tokens that amounts are per, [N]; ones where they are per prompt.
    """

    amounts: NDArray[np.float64]
    counts: NDArray[np.float64]

    def over(self, full: Spent, rows: NDArray[np.intp] | slice = slice(None)) -> float:
        """This over the full model's cost of these rows, each as often as named; 1 if one has no token of its own."""
        mine, theirs = ((s.amounts[rows].sum(), s.counts[rows].sum()) for s in (self, full))
        if not (mine[1] and theirs[0] and theirs[1]):
            return NO_LESS
        return float(mine[0] * theirs[1] / (mine[1] * theirs[0]))


def is_timed(measure: str) -> bool:
    """Whether a measure is of seconds, which compare only between arms that took turns."""
    return measure.startswith("seconds")


def spent(records: Sequence[Record], measure: str) -> Spent:
    """Amounts and counts that records of one setting have of a measure, one of `MEASURES`."""
    counts = np.ones(len(records))
    if measure == "flops":
        return Spent(np.array([float(r.flops) for r in records]), counts)
    if measure == "seconds":
        return Spent(np.array([r.seconds for r in records]), counts)
    later = later_flops if measure == PER_TOKEN else later_seconds
    return Spent(np.array([later(r) for r in records]), np.array([float(later_tokens(r)) for r in records]))


def cost(records: Sequence[Record], full: Sequence[Record], measure: str) -> float:
    """What a setting costs over the full model's; a ValueError for seconds that were not measured in turns."""
    rows: NDArray[np.intp] | slice = slice(None)
    if is_timed(measure):
        used = turns(records, full)
        if used is None:
            raise ValueError(
                f"the seconds of {records[0].arm} were not measured in turns with the full model's, so that they do "
                "not compare (answers of another calibration are in the folder); give another folder"
            )
        rows = np.flatnonzero(used)
    return spent(records, measure).over(spent(full, measure), rows)

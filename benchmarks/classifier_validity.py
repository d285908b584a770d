"""Is the promise of a certificate kept? Calibrations repeated on rows drawn from a pool, and judged on the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.classifiers.certify import RowPromise, Trials
from offramp.metrics.intervals import binomial
from offramp.risk.search import judged, recalibrated
from offramp.runs.results import Result
from offramp.values import check_level


@dataclass(frozen=True)
class Validity(Result):
    """Counts over calibrations repeated on rows drawn from a pool.

    Attributes:
        promise: What was promised each time.
        repeats: Calibrations R.
        rows: The pool.
        certifying: How many of them calibrated each time.
        above_pool: Calibrations whose threshold loses more than the tolerance over the whole pool: what the promise is
            about, if the pool is all there is.
        above_held_out: The same on the rows that were not drawn: with their noise, and worse where those drawn were
            better than the pool, so that it may be more than the promise allows.
        never: Calibrations after which rows never leave early.
        loss: Mean of the held-out mean losses.
        saving: Mean of the held-out savings.
    """

    schema = "offramp/classifier-validity/1"

    promise: RowPromise
    repeats: int
    rows: int
    certifying: int
    above_pool: int
    above_held_out: int
    never: int
    loss: float
    saving: float

    def __repr__(self) -> str:
        return f"Validity({self.repeats} calibrations by {self.certifying} rows from a pool of {self.rows})"

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with exact intervals of both counts."""
        intervals = {
            f"{name}_interval": binomial(getattr(self, name), self.repeats).ends
            for name in ("above_pool", "above_held_out")
        }
        return {**super().to_dict(), **intervals}


def validate(
    trials: Trials, promise: RowPromise, *, share: float = 0.5, repeats: int = 200, seed: int = 0
) -> Validity:  # fmt: skip
    """Repeat a calibration on rows drawn from a pool, with replacement, and judge it on the pool.

    Drawn so, calibration rows are independent, and their distribution is the pool: of it the promise holds exactly.
    (A part of the pool that is drawn without replacement tells more about the pool than as many independent rows would,
    and the promise is broken too seldom.) Also judged on the rows that were not drawn.

    Args:
        trials: Settings on the pool: calibrate and test rows together.
        promise: What each calibration is to certify.
        share: Share of the pool's number of rows that calibrate, in (0, 1).
        repeats: How often; 100 or more tell something.
        seed: Seed of the draws.

    Returns:
        The counts.

    Raises:
        ValueError: No repeats, fewer than two rows, or a share outside (0, 1).
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; ask for at least 1 (100 or more tell something)")
    pool = trials.losses.double().mean(dim=1)
    check_level("share", share)
    if (rows := trials.losses.shape[1]) < 2:
        raise ValueError(f"there are {rows} rows; at least 2 are needed, to calibrate and to judge by")
    certifying = min(max(round(share * rows), 1), rows - 1)
    losses, _ = promise.losses(trials)
    draws = [(seed + r, np.random.default_rng(seed + r).integers(0, rows, certifying)) for r in range(repeats)]
    selected = recalibrated(
        (part[np.random.default_rng(order).permutation(certifying)] for order, part in draws), [range(len(losses))],
        lambda setting, part: losses[setting, part], lambda setting, part: -setting, promise,
    )  # fmt: skip
    found = [setting or 0 for setting in selected]
    rests = (trials.take(np.setdiff1d(np.arange(rows), part)) for _, part in draws)
    seen = [(float(rest.losses[s].double().mean()), 1 - rest.cost(s)) for s, rest in zip(found, rests, strict=True)]
    held_out, savings = zip(*seen, strict=True)
    in_pool, elsewhere = judged(selected, pool[found].tolist(), promise), judged(selected, held_out, promise)
    return Validity(
        promise, repeats, rows, certifying, in_pool.above, elsewhere.above, found.count(0), elsewhere.loss,
        float(np.mean(savings)),
    )  # fmt: skip

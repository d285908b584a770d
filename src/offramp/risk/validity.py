"""Is a promise kept? A calibration repeated on draws from a pool, and what its choices lose.

Draws with replacement are independent and like the pool: of it, the promise holds. (A part that is drawn without
replacement tells more about the pool than as many independent draws would, and the promise is broken too seldom.)
Parts that were not drawn judge with their own noise, and are unlucky where those drawn were lucky.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from offramp.risk.promise import Promised
from offramp.risk.search import search

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

"""How large prediction sets are, how often they hold the truth, and how nested they are, exit by exit.

Jazbec et al. (2024), "Early-Exit Neural Networks with Nested Prediction Sets", with empty sets counted as such: they
hold nothing, and have a size of 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.metrics.intervals import Share, binomial
from offramp.uncertainty.sets import Sets


@dataclass(frozen=True)
class ExitSets:
    """The sets of one exit.

    Attributes:
        size: Mean size over all rows, empty sets counted as 0; infinite if a set is unbounded.
        size_not_empty: Mean size over the rows whose set is not empty; NaN if there are none.
        coverage: Share of rows whose set holds the truth.
        simultaneous: Share of rows whose sets hold the truth at this and all earlier exits.
        nestedness: Mean size of the running intersection relative to the set's; 1 if both are empty, 0 if only the
            intersection is, or only the set is unbounded.
        empty: Share of rows whose set is empty.
        unbounded: Share of rows whose set has no end.
        small: Share of rows whose *running intersection* is not empty and at most as large as the limit.
    """

    size: float
    size_not_empty: float
    coverage: Share
    simultaneous: Share
    nestedness: float
    empty: Share
    unbounded: float
    small: float


@dataclass(frozen=True)
class SetSummary:
    """Sets of all exits.

    Attributes:
        exits: Shallow to deep.
        rows: N.
        time_to_small: Mean number of the first exit, counted from 1, at which the running intersection is not empty and
            at most as large as the limit (for a limit of 1 class: the time to a singleton), over the rows that get
            there; NaN if none does.
        reached: Share of rows that get there.
    """

    exits: tuple[ExitSets, ...]
    rows: int
    time_to_small: float
    reached: Share


def summarise(sets: Sets, truth: Tensor, *, limit: float = 1.0) -> SetSummary:
    """Judge sets.

    Args:
        sets: Of E exits for N rows: those of single exits, or their running intersection.
        truth: True labels or numbers, [N].
        limit: Size of a set that is small enough to leave with.

    Returns:
        The figures per exit; intervals are those of Clopper and Pearson (1934) at 95 %.

    Raises:
        ValueError: There are no rows, or not as many true values as rows.
    """
    if not len(truth) or sets.empty.shape[1:] != truth.shape:
        raise ValueError(
            f"{sets.empty.shape[1]} rows have {list(truth.shape)} true values; one each is needed, and a row"
        )
    nested = sets.running()
    size, empty, holds, together = sets.size, sets.empty, sets.contains(truth), nested.contains(truth)
    small = ~nested.empty & (nested.size <= limit)
    ratio = nestedness(size, nested.size, empty, nested.empty)

    def share(these: Tensor) -> Share:
        return binomial(int(these.sum()), len(truth))

    exits = [
        ExitSets(
            float(size[e].mean()), float(size[e][~empty[e]].mean()), share(holds[e]), share(together[e]),
            float(ratio[e].mean()), share(empty[e]), float(size[e].isinf().double().mean()),
            float(small[e].double().mean()),
        )
        for e in range(len(size))
    ]  # fmt: skip
    reached = small.any(dim=0)
    first = small.byte().argmax(dim=0)[reached].double() + 1
    return SetSummary(tuple(exits), len(truth), float(first.mean()) if len(first) else math.nan, share(reached))


def nestedness(size: Tensor, shared: Tensor, empty: Tensor, shared_empty: Tensor) -> Tensor:
    """How much of a set is left in the running intersection.

    Args:
        size: Of the sets, [E, N].
        shared: Of their running intersections, [E, N].
        empty: Whether the set is empty, [E, N], bool.
        shared_empty: Whether the intersection is.

    Returns:
        Shares in [0, 1], [E, N]: 1 if the sizes are equal, also if both are 0 or infinite.
    """
    ratio = torch.where(shared == size, 1.0, (shared / size).nan_to_num(nan=1.0))
    return torch.where(shared_empty, empty.double(), ratio)

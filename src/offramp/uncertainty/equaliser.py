"""Scores of all exits on one scale: the share of true labels that score lower there.

Of raw scores the weakest exit dominates the maximum over exits, and the sets of the others gain nothing. The map of
each exit is its empirical distribution function on the *tune* split, so it is fixed before calibration and leaves the
guarantee of conformal sets as it is. Deviates in joining the steps by lines and continuing them beyond the ends at the
mean slope: the map then increases strictly, has an inverse, and tells apart scores larger than any that was seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Equaliser:
    """The map of every exit.

    Attributes:
        scores: Distinct scores, ascending, E tensors [k_e], float64.
        levels: Share of the tune rows up to each, r/(n + 1), E tensors [k_e], float64.
    """

    scores: tuple[Tensor, ...]
    levels: tuple[Tensor, ...]


def fit(scores: Tensor) -> Equaliser:
    """Learn the maps from scores of true labels of a tune split, [E, n]; a ValueError unless there are finite ones."""
    if scores.ndim != 2 or not scores.shape[1] or not bool(scores.isfinite().all()):
        raise ValueError(f"finite scores of true labels are needed, exits x rows; shape {list(scores.shape)} was given")
    knots, levels = [], []
    for row in scores.double():
        values, counts = torch.unique(row, return_counts=True)
        knots.append(values)
        levels.append(counts.cumsum(0).double() / (len(row) + 1))
    return Equaliser(tuple(knots), tuple(levels))


def apply(state: Equaliser, scores: Tensor) -> Tensor:
    """Levels of scores, [E, ...] -> [E, ...]."""
    maps = zip(state.scores, state.levels, scores.double(), strict=True)
    return torch.stack([_joined(knots, levels, some) for knots, levels, some in maps])


def inverse(state: Equaliser, levels: Tensor) -> Tensor:
    """The score of each exit that has a level, [...] -> [E, ...]."""
    maps = zip(state.scores, state.levels, strict=True)
    return torch.stack([_joined(ends, knots, levels.double()) for knots, ends in maps])


def _joined(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """The line through the points (x, y), both ascending, and beyond them on at the mean slope."""
    slope = (y[-1] - y[0]) / (x[-1] - x[0]) if len(x) > 1 else y.new_ones(())
    beyond = torch.where(at < x[0], y[0] + slope * (at - x[0]), y[-1] + slope * (at - x[-1]))
    if len(x) == 1:
        return beyond
    right = torch.searchsorted(x, at.contiguous(), right=True).clamp(1, len(x) - 1)
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    inner = y[right - 1] + share * (y[right] - y[right - 1])
    return torch.where((at < x[0]) | (at > x[-1]), beyond, inner)

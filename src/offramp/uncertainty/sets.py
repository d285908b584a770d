"""Prediction sets of every exit: intervals of a number, sets of classes, and their running intersection.

An empty set is a state of its own: no interval has ends that stand for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Sets(Protocol):
    """What metrics and exit rules need of sets of E exits for N rows."""

    @property
    def empty(self) -> Tensor:
        """Whether nothing is in the set, [E, N], bool."""
        ...

    @property
    def size(self) -> Tensor:
        """Length or number of classes, [E, N], float64; 0 if empty, infinite if unbounded."""
        ...

    def contains(self, truth: Tensor) -> Tensor:
        """Whether the set holds the row's true value or label, [N] -> [E, N], bool; an empty set holds nothing."""
        ...

    def running(self) -> Sets:
        """At each exit what all sets up to it share; nested, and empty for good once empty."""
        ...


@dataclass(frozen=True)
class Intervals:
    """Closed intervals of E exits for N rows.

    Attributes:
        low: Lower ends, [E, N], float64; -inf where there is none, NaN where the interval is empty.
        high: Upper ends, likewise.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def between(cls, low: Tensor, high: Tensor) -> Intervals:
        """The numbers from `low` to `high`, [E, N]; inverted or NaN ends mean that there are none."""
        empty = ~(low <= high)
        return cls(low.double().masked_fill(empty, torch.nan), high.double().masked_fill(empty, torch.nan))

    @property
    def empty(self) -> Tensor:
        """Whether no number is in the interval, [E, N], bool."""
        return self.low.isnan()

    @property
    def unbounded(self) -> Tensor:
        """Whether an end is missing: half-lines and the whole line, [E, N], bool."""
        return self.low.isinf() | self.high.isinf()

    @property
    def size(self) -> Tensor:
        """Length, [E, N], float64; 0 if empty, infinite if unbounded."""
        return (self.high - self.low).masked_fill(self.empty, 0.0)

    def contains(self, truth: Tensor) -> Tensor:
        """Whether the interval holds the true value, [N] -> [E, N], bool."""
        return (self.low <= truth) & (truth <= self.high)

    def running(self) -> Intervals:
        """At each exit what all intervals up to it share."""
        low = self.low.masked_fill(self.empty, torch.inf).cummax(dim=0).values
        high = self.high.masked_fill(self.empty, -torch.inf).cummin(dim=0).values
        return Intervals.between(low, high)


@dataclass(frozen=True)
class ClassSets:
    """Sets of classes of E exits for N rows.

    Attributes:
        members: Whether a class is in the set, [E, N, C], bool.
    """

    members: Tensor

    @property
    def empty(self) -> Tensor:
        """Whether no class is in the set, [E, N], bool."""
        return ~self.members.any(dim=-1)

    @property
    def size(self) -> Tensor:
        """Number of classes, [E, N], float64."""
        return self.members.sum(dim=-1).double()

    def contains(self, truth: Tensor) -> Tensor:
        """Whether the set holds the true label, [N] -> [E, N], bool."""
        return self.members.gather(-1, truth.expand(len(self.members), -1).unsqueeze(-1)).squeeze(-1)

    def running(self) -> ClassSets:
        """At each exit the classes that are in all sets up to it."""
        return ClassSets(self.members.byte().cummin(dim=0).values.bool())

"""Prediction sets of every exit: intervals, sets of classes, their running intersection, and leaving by its size.

An empty set is a state of its own: no interval has ends that stand for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from offramp.values import choice


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


# ---------------------------------------------------------------- leaving by the size of sets


@dataclass(frozen=True)
class SetExitConfig:
    """When to leave.

    Attributes:
        limit: Leave when the set is not empty and its size at most this: 1 class, or a length.
        empty: What a set that has become empty means. "continue": run to full depth and report no set. "abstain": leave
            there without an answer. "stop": leave there with that exit's answer and no set.
        first_exit: No row leaves before this exit, counted from 0.
    """

    limit: float = 1.0
    empty: Literal["continue", "abstain", "stop"] = "continue"
    first_exit: int = 0

    def __post_init__(self) -> None:
        choice("empty", self.empty, ("continue", "abstain", "stop"))
        if not self.limit >= 0 or self.first_exit < 0:
            raise ValueError(f"limit is {self.limit}, first_exit {self.first_exit}; both must be at least 0")


@dataclass(frozen=True)
class SetExits:
    """Where rows leave.

    Attributes:
        exits: Taken by each row, counted from 0, [N], int64; the last one if no set was small enough.
        reported: Whether the set at that exit is reported: it is not empty, [N], bool.
        answered: Whether the row gets that exit's answer, [N], bool; False only for "abstain".
        small: Whether the row left because its set was small enough, [N], bool.
    """

    exits: Tensor
    reported: Tensor
    answered: Tensor
    small: Tensor


def exits_by_size(sets: Sets, config: SetExitConfig | None = None) -> SetExits:
    """The exit of every row of sets [E, N], which are intersected first, so that those of single exits may be given."""
    config = config or SetExitConfig()
    nested = sets.running()
    empty, count = nested.empty, len(nested.empty)
    if config.first_exit >= count:
        raise ValueError(f"first_exit is {config.first_exit}; there are exits 0..{count - 1}")
    small = ~empty & (nested.size <= config.limit)
    leave = small if config.empty == "continue" else small | empty
    leave = leave & (torch.arange(count) >= config.first_exit).unsqueeze(-1)
    last = torch.ones_like(leave[:1])
    exits = torch.cat([leave[:-1], last]).byte().argmax(dim=0)
    at = exits.unsqueeze(0)
    gone = empty.gather(0, at).squeeze(0)
    return SetExits(exits, ~gone, ~gone if config.empty == "abstain" else torch.ones_like(gone), small.gather(0, at)[0])

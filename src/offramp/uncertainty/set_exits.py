"""Exits by the size of nested sets: leave when the running intersection is small enough; what to do if it empties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from offramp.uncertainty.sets import Sets
from offramp.values import choice


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


def apply(sets: Sets, config: SetExitConfig | None = None) -> SetExits:
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

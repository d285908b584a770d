"""Drafts from before the first block: what a drafter needs to know of the positions behind it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offramp.core.batch import Read
from offramp.core.drafter import DRAFTER
from offramp.core.readout import Exit
from offramp.core.verifying import VerifyingBatch
from offramp.families.state import Frame, State


class DraftingBatch(VerifyingBatch):
    """A batch whose tokens are drafted by a drafter; arguments as for `Batch`.

    The drafter goes over every position that the full model has been at, with what the full model's readout read there:
    so its own keys and values of drafts, made with what its own readout read, are replaced.

    Attributes:
        before: By row, the readout inputs one position before each of the row's last n tokens, which the drafter goes
            over next, [n, D].
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.model.is_encoder_decoder:
            raise ValueError(
                "min_layer is 0, but there are no drafters for encoder-decoders; draft after one of their layers"
            )
        self.before: dict[int, Tensor] = {}

    def first(self, **inputs: Any) -> Read:
        """As in `Batch`."""
        read = super().first(**inputs)
        for rows, state in self.way.states:
            known = self._known(state.hidden)
            if (padding := state.context.padding) is not None:
                known = known * padding[state.frame.rows, : state.frame.queries, None]
            for row, one in zip(rows, known, strict=True):
                self.before[row] = torch.cat([torch.zeros_like(one[:1]), one])
        return read

    def _entering(self, rows: list[int]) -> list[tuple[list[int], State]]:
        """As in `Batch`, with what the drafter's blocks make of them."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row in rows:
            groups.setdefault((self.lengths[row], len(self.before[row])), []).append(row)
        states = [self._start(some, length - count, length) for (length, count), some in groups.items()]
        pairs = list(zip(groups.values(), states, strict=True))
        made = self.way.branched([self._mixed(*pair) for pair in pairs]) if pairs else []
        return [(some, _last(state, now)) for (some, state), now in zip(pairs, made, strict=True)]

    def _mixed(self, rows: list[int], state: State) -> State:
        """What goes into the drafter's blocks."""
        before = torch.stack([self.before[row] for row in rows])
        self.ledger.mix(len(before) * before.shape[1])
        with self.ledger.time("blocks"):
            return replace(state, hidden=self.model.mixed(state.hidden, before))

    def _known(self, hidden: Tensor) -> Tensor:
        """Readout inputs of states after the last layer."""
        with self.ledger.time("readout"):
            return self.model.readout_input(hidden)

    def _take(self, read: Read, rows: list[int], layer: int, exit: Exit, index: list[int]) -> None:
        super()._take(read, rows, layer, exit, index)
        if layer == DRAFTER and not all(map(self._will_be_full, rows)):
            inputs = exit.input if len(index) == len(exit.hidden) else exit.input[index]
            self.before |= dict(zip(rows, inputs[:, None], strict=True))

    def _will_be_full(self, row: int) -> bool:
        return len(self.drafts[row]) + 1 >= self.plan.policy.draft_length

    def _check(self, rows: list[int], hidden: Tensor) -> None:
        first = {row: self.lengths[row] - len(self.drafts[row]) for row in rows}
        super()._check(rows, hidden)
        for row, states in zip(rows, self._known(hidden), strict=True):
            self.before[row] = states[: self.lengths[row] - first[row]]


def _last(state: State, branched: State) -> State:
    """The last position of states before the first block, with what the drafter's blocks make of it."""
    frame = Frame(state.frame.rows, state.frame.start + state.frame.queries - 1, 1)
    assert branched.branch is not None
    return replace(state, frame=frame, hidden=state.hidden[:, -1:], branch=branched.branch[:, -1:])

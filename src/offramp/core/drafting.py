"""Drafts from before the first block: what a drafter needs to know of the positions behind it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offramp.core.batch import Read, Step
from offramp.core.policy import DRAFTER
from offramp.core.readout import Exit
from offramp.core.verifying import Draft, VerifyingBatch
from offramp.families.readouts import Best
from offramp.families.state import Frame, State

_OF_BEST = {
    "static": lambda best: 1.0,
    "max": lambda best: float(best.probabilities[0, 0]),
    "softmax": lambda best: float(best.gap[0]),
}  # fmt: skip
"""Confidences that are read off the two best tokens."""

_MOST = 4  # cycles of a call: what is generated is shown, and Ctrl-C is heard, behind them


class DraftingBatch(VerifyingBatch):
    """A batch whose tokens are drafted by a drafter; arguments as for `Batch`.

    The drafter goes over every position that the full model has been at, with what the full model's readout read there:
    so its own keys and values of drafts, made with what its own readout read, are replaced.

    A row that is alone drafts in a loop of its own, without what tests of several rows and layers need, where the
    engine gives the best tokens in one call and these are all that is wanted: draft by draft, or, where the engine can,
    together with the checks in a call.

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
        self.cycles = 1
        self._ahead: deque[Any] = deque()  # cycles of the row that is alone, made but not yet taken
        self.unvisited: set[int] = set()  # rows whose tokens now go deep without the drafter

    def first(self, **inputs: Any) -> Read:
        """As in `Batch`."""
        read = super().first(**inputs)
        self.learn()
        return read

    def learn(self) -> None:
        """Note what the full model's readout reads of a prompt, or of another piece of it."""
        for rows, state in self.way.states:
            known = self._known(state.hidden)
            if (padding := state.context.padding) is not None:
                known = known * padding[state.frame.rows, : state.frame.queries, None]
            for row, one in zip(rows, known, strict=True):
                self.before[row] = torch.cat([self.before.get(row, torch.zeros_like(one[:1])), one])

    def recall(self, row: int, known: Tensor) -> None:
        """Note what the full model's readout reads of a prompt's first tokens, [n, D]."""
        self.before[row] = torch.cat([torch.zeros_like(known[:1]), known])

    def restart(self, row: int) -> None:
        """As in `VerifyingBatch`."""
        super().restart(row)
        self.before.pop(row, None)
        self.unvisited.discard(row)

    def read(self, rows: list[int] | None = None) -> Read:
        """As in `Batch`; what a row makes that is alone, `check` sees to."""
        if not self._alone:
            rows = self.drafting if rows is None else rows
            self.unvisited |= {row for row in rows if not self.most[row] and not self.drafts[row]}
            return super().read(rows)
        self.prefill = self.way.prompt = False
        return self.unread()

    def check(self, read: Read) -> None:
        """As in `VerifyingBatch`; alone, a row drafts here."""
        if not self._alone:
            super().check(read)
            return
        (row,) = self.rows
        if self._in_one_call(row):
            return
        begin = self.lengths[row] - 1
        self._draft_alone(row)
        self.way.begin([self.start([row], begin, begin + len(self.drafts[row]))], [row])
        self._deep()

    def verified(self, read: Read) -> Iterator[Step]:
        """As in `VerifyingBatch`; a row that is alone gets more and more of its tokens in a call."""
        yield from super().verified(read)
        if not self.prefill and self.samplers[0].stopping is None:  # else what is made ahead may be in vain
            self.cycles = min(2 * self.cycles, _MOST)

    @property
    def _alone(self) -> bool:
        named = self.plan.policy.confidence in _OF_BEST
        alone = len(self.rows) == 1 and not any(self.way.waiting.values())
        return named and alone and self.best_only and self.model.fused and self.most[self.rows[0]] > 0

    def _draft_alone(self, row: int) -> None:
        """Append drafts to a row, and the token that goes deep behind them unless the last one would end it."""
        plan, drafts = self.plan, self.drafts[row]
        left: list[tuple[int, float, int]] = []
        confidence = math.nan
        while len(drafts) < self.most[row]:
            best = self._next_draft(row)
            confidence, token = _OF_BEST[str(plan.policy.confidence)](best), int(best.tokens[0, 0])
            tests = [] if plan.policy.confidence == "static" else [(DRAFTER, confidence, token)]
            if self.paces[row] is not None:
                leaves = self._paced(row, DRAFTER, confidence)
            else:
                leaves = confidence > self.threshold(DRAFTER, row)
            if not leaves:
                left = tests
                break
            assert best.inputs is not None
            self._append(row, token, confidence, float(best.normaliser), tests)
            self.before[row] = best.inputs
            confidence = math.nan
            if self._ends(row):
                return
        self._go_deep(row, confidence, left)

    def _append(
        self, row: int, token: int, confidence: float, normaliser: float, tests: list[tuple[int, float, int]]
    ) -> None:
        """Note a draft."""
        if not math.isfinite(normaliser):
            raise self.not_sound()
        self.drafts[row].append(Draft(token, DRAFTER, confidence, tests=tests))
        self.buffer[row, self.lengths[row]] = token
        self.lengths[row] += 1

    def _go_deep(self, row: int, confidence: float, tests: list[tuple[int, float, int]]) -> None:
        """Note the token that is not drafted."""
        self.drafts[row].append(Draft(self.pad, self.plan.num_layers, confidence, tests=tests))
        self.lengths[row] += 1

    def _in_one_call(self, row: int) -> bool:
        """Draft and check in a call of the engine, where it can; of what a call made, each step takes one cycle."""
        if not self._ahead:
            self._ahead.extend(self._made_ahead(row))
        if not self._ahead:
            return False
        cycle, length, last = self._ahead.popleft(), self.lengths[row], self.plan.num_layers
        for index in range(cycle.made):
            self._bill_draft(cycle.known if index == 0 else 1, length + index)
        if cycle.rows:
            self.ledger.blocks(0, last, rows=1, queries=cycle.rows, start=length - 1)
            self.ledger.readout(cycle.rows)
        for place, (token, logprob) in enumerate(zip(cycle.tokens, cycle.logprobs, strict=True)):
            confidence = cycle.confidences[place] if place < cycle.made else math.nan
            stands = Draft(token, DRAFTER if place < cycle.stand else last, confidence, logprob=logprob)
            if self._is_certain(row, stands, stands, True):
                break
        if not cycle.sound:
            raise self.not_sound()
        return True

    def _made_ahead(self, row: int) -> list[Any]:
        """Cycles of a row; none where they have to be made draft by draft."""
        model: Any = self.model
        policy, frequent, length, count = self.plan.policy, self.frequent, self.lengths[row], len(self.before[row])
        if self.paces[row] is not None or policy.decay is not None:
            return []
        with self.ledger.time("blocks"):
            made = model.cycles(
                self.context, row, self.buffer[row, length - count : length].tolist(), length - count, self.before[row],
                most=self.most[row], room=self.limits[row] - self.made(row), count=self.cycles,
                confidence=policy.confidence, threshold=self.threshold(DRAFTER, row), accept=policy.accept,
                rows=None if frequent is None else frequent.rows, ends=self.samplers[row].eos,
            )  # fmt: skip
        if made is None:
            return []
        self.before[row] = made.before
        parts = self.ledger.costs.parts
        parts["blocks"].seconds -= made.seconds[1]
        parts["readout"].seconds += made.seconds[1]
        return made.cycles  # type: ignore[no-any-return]

    def _bill_draft(self, count: int, length: int) -> None:
        """Write down a draft for which the drafter went over `count` tokens, `length` being known."""
        ledger, own = self.ledger, self.model.branches[DRAFTER]
        ledger.mix(count)
        ledger.blocks(own.start, own.stop, rows=1, queries=count, start=length - count)
        self._bill_readout()

    def _bill_readout(self) -> None:
        ledger, kept = self.ledger, None if self.frequent is None else len(self.frequent.tokens)
        ledger.lens(DRAFTER, 1)
        scored = None if self.plan.policy.confidence == "static" else kept or self.plan.vocabulary
        ledger.test(1, scored, pruned=False)
        if kept is None:
            ledger.readout(1)
        else:
            ledger.pruned_readout(1, kept, shared=True)

    def _next_draft(self, row: int) -> Best:
        """What the drafter says behind a row's last token."""
        model: Any = self.model
        count, length = len(self.before[row]), self.lengths[row]
        (ran,) = self.way.branched([self._mixed([row], self.start([row], length - count, length))])
        self._bill_readout()
        hidden = ran.read[:, -1]
        if self.frequent is None:
            with self.ledger.time("readout"):
                return model.best(hidden, DRAFTER, inputs=True)  # type: ignore[no-any-return]
        with self.ledger.time("pruned_readout"):
            return model.best(hidden, DRAFTER, self.frequent.rows, inputs=True)  # type: ignore[no-any-return]

    def _entering(self, rows: list[int]) -> list[tuple[list[int], State]]:
        """As in `Batch`, with what the drafter's blocks make of them."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row in rows:
            groups.setdefault((self.lengths[row], len(self.before[row])), []).append(row)
        states = [self.start(some, length - count, length) for (length, count), some in groups.items()]
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
        return len(self.drafts[row]) + 1 >= self.most[row]

    def _check(self, rows: list[int], hidden: Tensor) -> None:
        first = {row: self.lengths[row] - len(self.drafts[row]) for row in rows}
        super()._check(rows, hidden)
        for row, states in zip(rows, self._known(hidden), strict=True):
            known = states[: self.lengths[row] - first[row]]
            self.before[row] = torch.cat([self.before[row], known]) if row in self.unvisited else known
            self.unvisited.discard(row)


def _last(state: State, branched: State) -> State:
    """The last position of states before the first block, with what the drafter's blocks make of it."""
    frame = Frame(state.frame.rows, state.frame.start + state.frame.queries - 1, 1)
    assert branched.branch is not None
    return replace(state, frame=frame, hidden=state.hidden[:, -1:], branch=branched.branch[:, -1:])

"""Keys and values of skipped layers: the two ways through the blocks.

`Propagate` freezes a row's state where it leaves and projects the keys and values of deeper layers from it. `Defer`
lets positions wait at their depth and takes them through the deep layers together with the row's next token that goes
there (FREE's synchronized parallel decoding, arXiv 2310.05424, for any number of exits). Both are lazy: a layer is
caught up with only when a token visits it, so layers nobody visits again cost nothing, and one product serves all
positions due. In both, the rows of a batch leave one by one; in `Defer` they may stand at different positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from offramp.core.costs import Ledger
from offramp.families import SplitModel
from offramp.families.state import Frame, Skipped, State, as_rows


class Way(ABC):
    """Rows on their way through the blocks; those that stand at the same position, with as much behind, as one state.

    Args:
        model: The model.
        ledger: Where the work is written down.
        branches: Layers with exits whose own blocks are to run.
    """

    def __init__(self, model: SplitModel, ledger: Ledger, branches: Collection[int] = ()) -> None:
        self.model, self.ledger, self.branches = model, ledger, branches
        self.rows: list[int] = []
        self.states: list[tuple[list[int], State]] = []  # of the rows still in, and which rows each has
        self.prompt = False

    def begin(self, states: list[State], rows: list[int], *, prompt: bool = False) -> None:
        """Start a token step; `rows` are those of the states, one after another."""
        self.rows, self.prompt, self.states, first = rows, prompt, [], 0
        for state in states:
            self.states.append((rows[first : first + len(state.hidden)], state))
            first += len(state.hidden)

    @property
    def read(self) -> Tensor:
        """What is read out of the rows still in, at the last position, [A, D]."""
        if len(self.states) == 1 and self.states[0][0] == self.rows:
            return self.states[0][1].read[:, -1]
        found = {row: state.read[i, -1] for rows, state in self.states for i, row in enumerate(rows)}
        return torch.stack([found[row] for row in self.rows])

    @abstractmethod
    def advance(self, depth: int) -> None:
        """Run the rows still in up to `depth`."""

    def leave(self, gone: list[int], kept: list[int]) -> None:
        """The rows at index `gone` of those still in leave; go on with those at index `kept`."""
        left, staying = {self.rows[i] for i in gone}, []
        self._left(left)
        for rows, state in self.states:
            if still := [index for index, row in enumerate(rows) if row not in left]:
                these = [rows[index] for index in still]
                whole = len(still) == len(rows)
                part = state if whole else state.select(still, as_rows(these, state.hidden.device))
                staying.append((these, part))
        self.states, self.rows = staying, [self.rows[i] for i in kept]

    @abstractmethod
    def _left(self, rows: set[int]) -> None:
        """Keep what later tokens need of rows that leave here."""

    @abstractmethod
    def forget(self, row: int) -> None:
        """A row is finished, or what waits of it was wrong."""


class Propagate(Way):
    """Rows leave one by one; each layer owes them keys and values from their frozen states. Arguments as for `Way`."""

    def __init__(self, model: SplitModel, ledger: Ledger, branches: Collection[int] = ()) -> None:
        super().__init__(model, ledger, branches)
        self.left: list[tuple[int, Skipped]] = []  # (depth, tokens), in the order they left
        self.done = [0] * len(model.blocks)  # how many of `left` each block has dealt with
        self._last: tuple[tuple[int, ...], Skipped] | None = None  # the last merged set of tokens
        self._seen = 0

    def begin(self, states: list[State], rows: list[int], *, prompt: bool = False) -> None:
        """As in `Way`."""
        super().begin(states, rows, prompt=prompt)
        self._seen = len(self.left)  # tokens that leave in this step are not needed in this step

    def advance(self, depth: int) -> None:
        """As in `Way`."""
        while self.states and (at := self.states[0][1].depth) < depth:
            stop = min([depth, *(layer for layer in self.branches if layer > at)])
            self._catch_up(range(at, stop))
            ran = _run(self, [state for _, state in self.states], stop)
            if stop in self.branches:
                self._catch_up(self.model.branches[stop], stop)
                ran = _branched(self, ran)
            self.states = [(rows, state) for (rows, _), state in zip(self.states, ran, strict=True)]

    def _left(self, rows: set[int]) -> None:
        for some, state in self.states:
            if gone := [i for i, row in enumerate(some) if row in rows]:
                hidden = state.hidden[:, -1] if len(gone) == len(some) else state.hidden[gone, -1]
                at, stop = [some[i] for i in gone], state.frame.start + state.frame.queries
                places = torch.tensor([at, [stop - 1] * len(at)], device=hidden.device)
                self.left.append((state.depth, Skipped(hidden, places[0], places[1], stop)))

    def forget(self, row: int) -> None:
        """As in `Way`: nothing is owed to it any more."""
        kept = [index for index, (_, tokens) in enumerate(self.left) if bool((tokens.rows != row).any())]
        self.done = [sum(index < done for index in kept) for done in self.done]
        self.left = [(self.left[i][0], _without(row, self.left[i][1])) for i in kept]
        self._last = None

    def settle(self) -> None:
        """Forget the tokens that all blocks have dealt with: only a batch that never ends has a need of it."""
        if paid := min(self.done):
            self.left, self.done, self._last = self.left[paid:], [done - paid for done in self.done], None

    def _catch_up(self, layers: range, branch: int | None = None) -> None:
        """Fill the keys and values of tokens that skipped these layers, or the blocks of the exit after `branch`."""
        if self._seen:
            for due, some in groupby(layers, lambda layer: self._due(layer, layer if branch is None else branch - 1)):
                if due:
                    self._fill(list(some), due)

    def _due(self, layer: int, deepest: int) -> tuple[int, ...]:
        """Which of `left`, at `deepest` or before, a layer owes keys and values to; asked once per step and layer."""
        done, self.done[layer] = self.done[layer], self._seen
        return tuple(i for i in range(done, self._seen) if self.left[i][0] <= deepest)

    def _fill(self, layers: list[int], due: tuple[int, ...]) -> None:
        with self.ledger.time("fill"):
            if self._last is None or self._last[0] != due:
                self._last = (due, _merged([self.left[i][1] for i in due]))
            self.model.fill(self.states[0][1].context, layers[0], layers[-1] + 1, self._last[1])
        self.ledger.fill(layers, len(self._last[1].rows))


class Defer(Way):
    """Positions wait where their row left; a row's next token that goes deeper takes them along.

    A row's depth never grows along its positions, so what a layer lacks is always a suffix of its sequence. Rows that
    stand at the same position, with the same positions waiting, run as one state. Branches run on every position that
    comes by. Arguments as for `Way`.
    """

    def __init__(self, model: SplitModel, ledger: Ledger, branches: Collection[int] = ()) -> None:
        super().__init__(model, ledger, branches)
        self.waiting: dict[int, list[State]] = {}  # by row, each of one row; by position, the last is the shallowest

    def advance(self, depth: int) -> None:
        """Run the rows still in up to `depth`, taking along whatever of theirs waits on the way."""
        while (lowest := min(state.depth for _, state in self.states)) < depth:
            ready = self._joined([pair for pair in self.states if pair[1].depth == lowest])
            later = [pair for pair in self.states if pair[1].depth > lowest]
            met = [self.waiting[row][-1].depth for rows, _ in ready for row in rows if self.waiting.get(row)]
            branches = [layer for layer in self.branches if layer > lowest]
            stop = min([depth, *met, *(state.depth for _, state in later), *branches])
            ran = _run(self, [state for _, state in ready], stop)
            ran = self.branched(ran) if stop in self.branches else ran
            self.states = [*zip([rows for rows, _ in ready], ran, strict=True), *later]

    def branched(self, states: list[State]) -> list[State]:
        """Run the own blocks of the exit at whose layer some states are, and write it down."""
        return _branched(self, states)

    def _joined(self, pairs: list[tuple[list[int], State]]) -> list[tuple[list[int], State]]:
        """States of equal depth, each row's with what of it waits there, as few as can be."""
        if not any(self._waits(row, state) for rows, state in pairs for row in rows):
            if len({(state.frame.start, state.frame.queries) for _, state in pairs}) == len(pairs):
                return pairs
        alike: dict[tuple[int, int], list[tuple[int, State]]] = {}
        for rows, whole in pairs:
            for index, row in enumerate(rows):
                state = whole if len(rows) == 1 else _row(whole, index, row)
                while self._waits(row, state):
                    state = _longer(self.waiting[row].pop(), state)
                alike.setdefault((state.frame.start, state.frame.queries), []).append((row, state))
        return [_stacked(sorted(group, key=lambda pair: pair[0])) for group in alike.values()]

    def _waits(self, row: int, state: State) -> bool:
        """Whether the position before a row's state waits at its depth."""
        chain = self.waiting.get(row)
        return bool(chain) and chain[-1].depth == state.depth  # type: ignore[index]

    def _left(self, rows: set[int]) -> None:
        for some, state in self.states:
            self.wait(some, state, rows)

    def wait(self, rows: list[int], state: State, some: Collection[int] | None = None) -> None:
        """Let rows of a state, or only some of them, wait where they are."""
        for index, row in enumerate(rows):
            if some is None or row in some:
                own = state if len(rows) == 1 else _row(state, index, row)
                self.waiting.setdefault(row, []).append(own)

    def recall(self, rows: list[int]) -> None:
        """Let rows that have left go on from where their last position waits."""
        for row in rows:
            self.states.append(([row], self.waiting[row].pop()))
        self.rows = [*self.rows, *rows]

    def forget(self, row: int) -> None:
        """As in `Way`."""
        self.waiting.pop(row, None)


def freeze_prompt(way: Way, depth: int, last: int) -> None:
    """Take a prompt up to `depth`; from there on only its last position goes.

    The other positions stay frozen, and deeper layers get keys and values projected from their states: one product per
    layer for all of them (the idea of SwiftKV, Qiao et al., 2024, arXiv 2410.03960, without its training).

    Args:
        way: At the start of a prompt's step; stands at its last position afterwards.
        depth: Layers the whole prompt goes through, 1..last.
        last: The deepest layer any token needs; what lies behind it gets no keys and values.
    """
    way.advance(depth)
    ((rows, state),) = way.states
    if state.frame.queries == 1 or depth == last:
        return
    frozen, state = parted(state, state.frame.queries - 1)
    for skips in (range(depth, last), *(way.model.branches[layer] for layer in way.branches if layer > depth)):
        with way.ledger.time("fill"):
            way.model.fill(state.context, skips.start, skips.stop, frozen)
        way.ledger.fill(skips, len(frozen.rows))
    way.states = [(rows, state)]


def parted(state: State, count: int) -> tuple[Skipped, State]:
    """The first `count` positions of every row as tokens that skip what follows, and the state of the others."""
    (batch, queries, _), start, device = state.hidden.shape, state.frame.start, state.hidden.device
    stop = start + count
    every = torch.arange(len(state.context.positions), device=device)
    rows = every[state.frame.rows].repeat_interleave(count)
    slots = torch.arange(start, stop, device=device).repeat(batch)
    frozen = Skipped(state.hidden[:, :count].flatten(0, 1), rows, slots, stop)
    return frozen, replace(state, hidden=state.hidden[:, count:], frame=Frame(state.frame.rows, stop, queries - count))


def _run(way: Way, states: list[State], depth: int) -> list[State]:
    """Run states of equal depth up to `depth` and write it down."""
    lo = states[0].depth
    if depth == lo:
        return states
    return _billed(way, states, range(lo, depth), lambda: way.model.run_each(states, lo, depth))


def _branched(way: Way, states: list[State]) -> list[State]:
    """Run an exit's own blocks on states that have just come to its layer, and write it down."""
    return _billed(way, states, way.model.branches[states[0].depth], lambda: way.model.branched(states))


def _billed(
    way: Way, states: list[State], blocks: range, run: Callable[[], list[State]]
) -> list[State]:  # fmt: skip
    """Run some blocks on states and write it down."""
    context = states[0].context
    memory = 0 if context.memory is None else context.memory.shape[1]
    crossed = len(context.crossed)
    with way.ledger.time("blocks"):
        ran = run()
    for state in states:
        way.ledger.blocks(
            blocks.start, blocks.stop, rows=len(state.hidden), queries=state.frame.queries, start=state.frame.start,
            memory=memory, prompt=way.prompt,
        )  # fmt: skip
    for layer in context.crossed[crossed:]:
        way.ledger.cross(layer, len(context.positions), memory)
    return ran


def _without(row: int, tokens: Skipped) -> Skipped:
    """The tokens of the other rows."""
    if not bool((others := tokens.rows != row).all()):
        return Skipped(tokens.hidden[others], tokens.rows[others], tokens.slots[others], tokens.stop)
    return tokens


def _merged(tokens: list[Skipped]) -> Skipped:
    """Several sets of tokens as one."""
    if len(tokens) == 1:
        return replace(tokens[0], memo={})
    return Skipped(
        torch.cat([t.hidden for t in tokens]),
        torch.cat([t.rows for t in tokens]),
        torch.cat([t.slots for t in tokens]),
        max(t.stop for t in tokens),
    )


def _row(state: State, index: int, row: int) -> State:
    """The state of one row alone."""
    return state.select(slice(index, index + 1), slice(row, row + 1))


def _longer(before: State, after: State) -> State:
    """Two states of a row, of adjacent positions and equal depth, as one."""
    frame = Frame(before.frame.rows, before.frame.start, before.frame.queries + after.frame.queries)
    hidden = torch.cat([before.hidden, after.hidden], dim=1)
    return State(before.context, frame, hidden, before.depth)  # branches, if any, have run on all of it


def _stacked(pairs: list[tuple[int, State]]) -> tuple[list[int], State]:
    """States of single rows at the same positions as one, and which rows it has."""
    rows, first = [row for row, _ in pairs], pairs[0][1]
    if len(pairs) == 1:
        return rows, first
    hidden = torch.cat([state.hidden for _, state in pairs])
    frame = Frame(as_rows(rows, hidden.device), first.frame.start, first.frame.queries)
    return rows, State(first.context, frame, hidden, first.depth)

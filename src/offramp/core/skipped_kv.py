"""Keys and values of skipped layers: the two ways through the blocks, one layer at a time.

`Propagate` freezes a row's state where it leaves and projects the keys and values of deeper layers from it. `Defer`
lets positions wait at their depth and takes them through the deep layers together with the next token that goes there
(FREE's synchronized parallel decoding, arXiv 2310.05424, for any number of exits). Both are lazy: a layer is caught up
with only when a token visits it, so layers nobody visits again cost nothing, and one product serves all positions due.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from offramp.core.costs import Ledger
from offramp.families import SplitModel
from offramp.families.cache import as_rows
from offramp.families.state import Frame, Skipped, State


class Propagate:
    """Rows leave one by one; each layer owes them keys and values from their frozen states.

    Args:
        model: The model.
        ledger: Where the work is written down.
    """

    def __init__(self, model: SplitModel, ledger: Ledger) -> None:
        self.model, self.ledger = model, ledger
        self.left: list[tuple[int, Skipped]] = []  # (depth, tokens), in the order they left
        self.done = [0] * model.num_layers  # how many of `left` each layer has dealt with
        self.rows: list[int] = []
        self._last: tuple[tuple[int, ...], Skipped] | None = None  # the last merged set of tokens
        self._seen = 0

    def begin(self, state: State, rows: list[int], *, prompt: bool = False) -> None:
        """Start a token step for the given rows; `state` holds all rows of the batch."""
        self._seen = len(self.left)  # tokens that leave in this step are not needed in this step
        self.rows, self.prompt = rows, prompt
        if len(rows) < len(state.hidden):
            kept = as_rows(rows, state.hidden.device)
            state = state.select(kept, kept)
        self.state = state

    @property
    def hidden(self) -> Tensor:
        """States of the rows still in, at the last position, [A, D]."""
        return self.state.hidden[:, -1]

    def advance(self, depth: int) -> None:
        """Run the rows still in up to `depth`."""
        for layer in range(self.state.depth, depth):
            if due := self._due(layer):
                _run(self, layer)
                self._catch_up(layer, due)
        _run(self, depth)

    def leave(self, gone: list[int], kept: list[int]) -> None:
        """Freeze the rows at index `gone` of those still in; go on with those at index `kept`."""
        state, device = self.state, self.state.hidden.device
        rows = torch.tensor([self.rows[i] for i in gone], device=device)
        hidden = self.hidden if len(gone) == len(self.rows) else self.hidden[gone]
        slots = torch.full_like(rows, state.frame.start + state.frame.queries - 1)
        self.left.append((state.depth, Skipped(hidden, rows, slots, state.frame.start + state.frame.queries)))
        self.rows = [self.rows[i] for i in kept]
        if kept:
            self.state = state.select(kept, as_rows(self.rows, device))

    def _due(self, layer: int) -> tuple[int, ...]:
        """Which of `left` this layer owes keys and values to, of earlier steps; asked once per step and layer."""
        due = tuple(i for i in range(self.done[layer], self._seen) if self.left[i][0] <= layer)
        self.done[layer] = self._seen
        return due

    def _catch_up(self, layer: int, due: tuple[int, ...]) -> None:
        """Fill the keys and values of tokens that skipped this layer."""
        with self.ledger.time("fill"):
            if self._last is None or self._last[0] != due:
                self._last = (due, _merged([self.left[i][1] for i in due]))
            self.model.fill(self.state.context, layer, self._last[1])
        self.ledger.fill(layer, len(self._last[1].rows))


class Defer:
    """All rows advance in lock-step; positions wait at the depth where every row had left.

    Depth never grows along the positions, so what a layer lacks is always a suffix of the sequence.

    Args:
        model: The model.
        ledger: Where the work is written down.
    """

    def __init__(self, model: SplitModel, ledger: Ledger) -> None:
        self.model, self.ledger = model, ledger
        self.waiting: list[State] = []  # by position; the last is the shallowest
        self.rows: list[int] = []

    def begin(self, state: State, rows: list[int], *, prompt: bool = False) -> None:
        """Start a token step; `rows` are those not finished, `state` holds all rows of the batch."""
        self.state, self.rows, self.prompt = state, rows, prompt

    @property
    def hidden(self) -> Tensor:
        """States of the rows still in, at the last position, [A, D]."""
        last = self.state.hidden[:, -1]
        return last if len(self.rows) == len(last) else last[self.rows]

    def advance(self, depth: int) -> None:
        """Run the current position up to `depth`, taking along whatever waits on the way."""
        while self.state.depth < depth:
            while self.waiting and self.waiting[-1].depth == self.state.depth:
                self.state = _joined(self.waiting.pop(), self.state)
            _run(self, min(depth, self.waiting[-1].depth) if self.waiting else depth)

    def leave(self, gone: list[int], kept: list[int]) -> None:
        """Note that the rows at index `gone` have left; the position waits once all have."""
        self.rows = [self.rows[i] for i in kept]
        if not kept:
            self.waiting.append(self.state)

    def flush(self) -> None:
        """Take everything that waits through all layers; `state` then holds those positions."""
        self.state = self.waiting.pop()
        self.advance(self.model.num_layers)


def freeze_prompt(way: Propagate | Defer, depth: int, last: int) -> None:
    """Take a prompt up to `depth`; from there on only its last position goes.

    The other positions stay frozen, and deeper layers get keys and values projected from their states: one product per
    layer for all of them (the idea of SwiftKV, Qiao et al., 2024, arXiv 2410.03960, without its training).

    Args:
        way: At the start of a prompt's step; stands at its last position afterwards.
        depth: Layers the whole prompt goes through, 1..last.
        last: The deepest layer any token needs; what lies behind it gets no keys and values.
    """
    way.advance(depth)
    state = way.state
    if state.frame.queries == 1 or depth == last:
        return
    frozen, way.state = parted(state, state.frame.queries - 1)
    for layer in range(depth, last):
        with way.ledger.time("fill"):
            way.model.fill(state.context, layer, frozen)
        way.ledger.fill(layer, len(frozen.rows))


def parted(state: State, count: int) -> tuple[Skipped, State]:
    """The first `count` positions of every row as tokens that skip what follows, and the state of the others."""
    (batch, queries, _), start, device = state.hidden.shape, state.frame.start, state.hidden.device
    stop = start + count
    rows = torch.arange(batch, device=device).repeat_interleave(count)
    slots = torch.arange(start, stop, device=device).repeat(batch)
    frozen = Skipped(state.hidden[:, :count].flatten(0, 1), rows, slots, stop)
    return frozen, replace(state, hidden=state.hidden[:, count:], frame=Frame(state.frame.rows, stop, queries - count))


def _run(way: Propagate | Defer, depth: int) -> None:
    """Run the way's state up to `depth` and write it down."""
    state, frame = way.state, way.state.frame
    if depth == state.depth:
        return
    memory = 0 if state.context.memory is None else state.context.memory.shape[1]
    crossed = len(state.context.crossed)
    with way.ledger.time("blocks"):
        way.state = way.model.run(state, state.depth, depth)
    way.ledger.blocks(
        state.depth, depth, rows=len(state.hidden), queries=frame.queries, start=frame.start, memory=memory,
        prompt=way.prompt,
    )  # fmt: skip
    for layer in state.context.crossed[crossed:]:
        way.ledger.cross(layer, len(state.context.positions), memory)


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


def _joined(before: State, after: State) -> State:
    """Two states of adjacent positions and equal depth as one."""
    frame = Frame(before.frame.rows, before.frame.start, before.frame.queries + after.frame.queries)
    return replace(before, hidden=torch.cat([before.hidden, after.hidden], dim=1), frame=frame)

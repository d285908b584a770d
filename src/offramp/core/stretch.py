"""Several tokens of one row in one call of the engine, where that can be: greedy ones, tested by what kernels know.

A token of a small model takes a few milliseconds, of which a loop in Python would take a tenth, and as much again for
each few tests. What the tokens are and where they leave is the same either way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from offramp.core.batch import Batch, Step
from offramp.core.confidence import max_probability, softmax_gap
from offramp.core.skipped_kv import Propagate
from offramp.core.vocabulary import kept_sizes

_MEASURES = ((max_probability, "max"), (softmax_gap, "softmax"))
_MOST = 8  # tokens of a call: what is generated is shown, and Ctrl-C is heard, behind them


class Stretch:
    """The rest of a generation, several tokens in a call; made by `stretch_of`."""

    def __init__(self, batch: Batch, engine: Any, script: Any) -> None:
        self.batch, self.engine, self.script = batch, engine, script
        plan = batch.plan
        self.exits, self.last = tuple(plan.thresholds), plan.last
        frequent = batch.frequent
        first = None if frequent is None else (len(frequent.tokens), True)
        later = first if engine.kept is None else (len(engine.kept), False)
        self.scored = [first, *[later] * len(self.exits)]  # by test: how many tokens, the same for all; None: all V

    def steps(self) -> Iterator[Step]:
        """One step per token, until the row is finished."""
        batch, count = self.batch, 1
        while batch.rows:
            made = self._run(min(count, batch.limits[0] - batch.made(0)))
            yield from self._steps(made)
            count = min(2 * count, _MOST)

    def _run(self, count: int) -> Any:
        batch, length = self.batch, self.batch.lengths[0]
        begin = batch.made(0)
        above = [[self._threshold(layer, begin + i) for layer in self.exits] for i in range(count)]
        with batch.ledger.time("blocks"):
            made = self.engine.run(int(batch.buffer[0, length - 1]), length - 1, above)
        costs = batch.ledger.costs.parts
        for part, seconds in zip(("fill", "readout", "pruned_readout", "select"), made.seconds[1:], strict=True):
            if seconds:
                costs[part].seconds += seconds
                costs["blocks"].seconds -= seconds
        return made

    def _threshold(self, layer: int, position: int) -> float:
        tau = self.batch.plan.threshold(layer, position, self.batch.limits[0])
        if self.script is None:
            return tau
        return -math.inf if self.script.answer(0, position, layer) > tau else math.inf

    def _steps(self, made: Any) -> Iterator[Step]:
        batch = self.batch
        batch.prefill = False
        if self.script is not None:
            begin = batch.made(0)
            made = made._replace(confidences=[
                self.script.answer(0, begin + i, self.exits[tests - 1]) if tests else math.nan
                for i, tests in enumerate(made.tests)
            ])  # fmt: skip
        device, sound = batch.buffer.device, [math.isfinite(n) for n in made.normalisers]
        tokens, layers = torch.tensor([made.tokens, made.layers], device=device)
        confidences = torch.tensor(made.confidences, device=device)
        active = torch.ones(1, dtype=torch.bool, device=device)
        for i, token in enumerate(made.tokens):
            self._bill(i, made)
            if not sound[i]:
                raise batch.not_sound()
            length = batch.lengths[0]
            batch.lengths[0] = length + 1
            ended, spent = batch.append([0], [token], length), batch.count([made.layers[i]])
            batch.end(ended)
            at = slice(i, i + 1)
            yield Step(tokens[at], layers[at], confidences[at], active, False, spent)

    def _bill(self, index: int, made: Any) -> None:
        """Write down one token of a call, as it would be made alone."""
        batch, ledger, plan = self.batch, self.batch.ledger, self.batch.plan
        context, tests, pruned = batch.context, made.tests[index], plan.pruning is not None
        memory = 0 if context.memory is None else context.memory.shape[1]
        ledger.blocks(0, made.layers[index], rows=1, queries=1, start=batch.lengths[0] - 1, memory=memory)
        for at, lo, hi, count in made.fills:
            if at == index:
                ledger.fill(range(lo, hi), count)
        for layer, scored in zip(self.exits[:tests], self.scored, strict=False):
            ledger.lens(layer, 1)
            if scored is None:
                ledger.readout(1)
            else:
                ledger.pruned_readout(1, scored[0], shared=scored[1])
            ledger.test(1, plan.vocabulary if scored is None else scored[0], pruned=pruned)
        if made.layers[index] == self.last:
            ledger.lens(self.last, 1)
            ledger.readout(1)


def stretch_of(batch: Batch) -> Stretch | None:
    """What generates the rest of a batch in calls of several tokens.

    Args:
        batch: Between two steps.

    Returns:
        It. None where tokens have to be made one by one: several rows, draws, processors, stops other than tokens and
        length, drafts, other measures than the largest probability and its lead, sizes of a pruned vocabulary that
        change from test to test, exits with blocks of their own, or an engine that has no such call.
    """
    model: Any = batch.model
    plan, way = batch.plan, batch.way
    measure: Any = batch.measure
    script = None
    if not (batch.best_only and len(batch.buffer) == 1 and isinstance(way, Propagate)):
        return None
    if batch.samplers[0].stopping is not None or batch.adaptive is not None or way.branches or plan.candidates:
        return None
    if measure is not None and hasattr(measure, "script"):
        measure, script = getattr(measure, "measure", None), measure.script
    named = next((name for known, name in _MEASURES if measure is known), None)
    if plan.thresholds and named is None:
        return None
    if plan.pruning is not None and plan.pruning.kind != "fixed":
        return None
    if batch.context.memory is not None and not set(range(plan.last)) <= set(batch.context.crossed):
        return None  # blocks that are visited for the first time see to the encoder's output
    frequent, protected, keep = batch.frequent, batch.protected, None
    skip, scored = (protected, plan.vocabulary) if frequent is None else (frequent.places, len(frequent.tokens))
    if plan.pruning is not None:
        (keep,) = kept_sizes([plan.pruning.first_size()], scored, skip)
    engine = model.stretch(
        batch.context,
        exits=tuple(plan.thresholds),
        last=plan.last,
        confidence=named or "max",
        tokens=None if frequent is None else frequent.tokens,
        keep=keep,
        skip=skip,
        always=protected if frequent is None else frequent.tokens[frequent.places],
        left=way.left,
        filled=way.done[: model.num_layers],
        room=batch.limits[0] - batch.made(0),
        ends=batch.samplers[0].eos,
    )
    return None if engine is None else Stretch(batch, engine, script)

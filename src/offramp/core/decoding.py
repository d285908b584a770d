"""The one generation loop: it knows token ids, no text, and yields one `Step` per generated position.

Where an engine can, it makes several tokens of one greedy row in a call (`Stretch`): a token of a small model takes a
few milliseconds, of which a loop in Python would take a tenth, and as much again for each few tests. What the tokens
are and where they leave is the same either way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offramp.core.adaptive_threshold import AdaptiveThreshold
from offramp.core.batch import Batch
from offramp.core.batch import Step as Step
from offramp.core.confidence import max_probability, softmax_gap
from offramp.core.costs import Ledger
from offramp.core.plan import resolve
from offramp.core.policy import DRAFTER, ExitPolicy
from offramp.core.sampling import NoProbabilitiesError, Sampler
from offramp.core.skipped_kv import Propagate
from offramp.core.verifying import VerifyingBatch
from offramp.core.vocabulary import kept_sizes
from offramp.families import SplitModel

_MEASURES = ((max_probability, "max"), (softmax_gap, "softmax"))
_MOST = 8  # tokens of a call: what is generated is shown, and Ctrl-C is heard, behind them


@torch.no_grad()
def decode(
    model: SplitModel,
    ids: Tensor,
    policy: ExitPolicy | None,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
    ledger: Ledger | None = None,
    adaptive: AdaptiveThreshold | None = None,
) -> Iterator[Step]:
    """Generate, leaving the network where the policy says so.

    A prompt runs at full depth (a static policy: at its own depth; with `prompt_layer`, only its last position goes
    deeper) and its token is marked `prefill`; the single start token of an encoder-decoder is an ordinary step. Rows
    stop at EOS, by `sampler.stopping` or at the length limit.

    Args:
        model: The model.
        ids: Prompt, or decoder start tokens, [B, T].
        policy: The exit policy; None: the full model.
        max_new_tokens: Most tokens generated per row.
        sampler: Processors, draws and stopping; None: plain greedy without EOS.
        mask: 1 for tokens, 0 for left padding, [B, T]; None without padding.
        positions: Positions of the prompt's tokens, [B, T]; new ones go on from its last. None: counted from the mask.
        memory: Encoder output, [B, X, D], for encoder-decoders.
        memory_mask: Mask of the encoder's input, [B, X].
        ledger: Where costs are written down.
        adaptive: What an adaptive policy has learnt so far, refitted here and learning on; None: nothing yet.

    Yields:
        One `Step` per position, in order. Nothing unverified is yielded under "verify".

    Raises:
        ValueError: The policy does not fit the model.
        NotFiniteError: The model computes NaN or infinity for a token, or for one it was to be drawn from.
    """
    batch = batch_of(model, ids, policy, sampler or Sampler(), max_new_tokens, ledger, adaptive)
    verifying = isinstance(batch, VerifyingBatch)
    read = batch.first(mask=mask, positions=positions, memory=memory, memory_mask=memory_mask)
    while True:
        try:
            if isinstance(batch, VerifyingBatch):
                yield from batch.verified(read)
            else:
                yield batch.settle(read)
        except NoProbabilitiesError as error:
            raise batch.broken() or error from None
        if not batch.rows:
            return
        if model.fused and not verifying and (stretch := stretch_of(batch)) is not None:
            yield from stretch.steps()
            return
        read = batch.read()


def batch_of(
    model: SplitModel,
    ids: Tensor,
    policy: ExitPolicy | None,
    sampler: Sampler,
    max_new_tokens: int,
    ledger: Ledger | None = None,
    adaptive: AdaptiveThreshold | None = None,
) -> Batch:
    """The batch that a policy is for; arguments as for `decode`."""
    plan = resolve(policy or ExitPolicy(threshold=None), model.num_layers, model.shape.vocabulary, model.exit_layers)
    adaptive = (adaptive or AdaptiveThreshold.of(plan.policy)) if plan.policy.adaptive else None
    if adaptive is not None:
        plan = replace(plan, thresholds=dict.fromkeys(plan.thresholds, adaptive.refit()))
    ledger = ledger or Ledger(model.shape, ids.device)
    ledger.costs.engine = model.engine
    kind: type[Batch] = VerifyingBatch if plan.policy.skipped == "verify" and plan.thresholds else Batch
    if DRAFTER in plan.thresholds:
        from offramp.core.drafting import DraftingBatch  # only models with a drafter have a use for it

        kind = DraftingBatch
    return kind(model, ids, plan, sampler, max_new_tokens, ledger, adaptive)


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

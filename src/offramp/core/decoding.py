"""The one generation loop: it knows token ids, no text, and yields one `Step` per generated position."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.core.adaptive_threshold import AdaptiveThreshold
from offramp.core.costs import Ledger
from offramp.core.plan import Plan, resolve
from offramp.core.policy import ExitPolicy
from offramp.core.readout import Reader, measure_of
from offramp.core.sampling import NoProbabilitiesError, Sampler
from offramp.core.skipped_kv import Defer, Propagate, freeze_prompt
from offramp.families import SplitModel
from offramp.families.finite import NotFiniteError, broken_at, name_of, not_finite


class Step(NamedTuple):
    """One generated position of a batch.

    Attributes:
        token: Token ids, [B]; the pad id in rows that were finished before.
        exit_layer: Layer after which each token left, 1..L, [B]; 0 in finished rows. Under "verify", the layer it was
            drafted at if the full model agreed, else L.
        confidence: Confidence of the last test made for the token, [B], float32; NaN where none was made.
        active: Rows for which the token counts, bool [B].
        prefill: Whether the token was read off the prompt's own pass.
        flops: FLOPs spent since the previous step, over all rows.
    """

    token: Tensor
    exit_layer: Tensor
    confidence: Tensor
    active: Tensor
    prefill: bool
    flops: int


@dataclass
class _Read:
    """What one token step read: scores [B, V] and, per row, the exit layer (0: none) and the confidence."""

    scores: Tensor
    layers: list[int]
    confidences: list[float]
    states: Tensor | None = None  # readout inputs [B, D] of rows that left with some tokens excluded
    processed: Tensor = field(default_factory=lambda: torch.empty(0))
    token: Tensor = field(default_factory=lambda: torch.empty(0))
    sound: Tensor | None = None  # rows whose token was chosen by a number, bool [B]; None: none was chosen


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
        sampler: Processors, sampling and stopping; None: plain greedy without EOS.
        mask: 1 for tokens, 0 for left padding, [B, T]; None without padding.
        positions: Positions of the prompt's tokens, [B, T]; new ones go on from its last. None: counted from the mask.
        memory: Encoder output, [B, X, D], for encoder-decoders.
        memory_mask: Mask of the encoder's input, [B, X].
        ledger: Where costs are written down.
        adaptive: What an adaptive policy has learnt so far, refitted here and learning on; None: nothing yet.

    Yields:
        One `Step` per position. Nothing unverified is yielded under "verify".

    Raises:
        ValueError: The policy does not fit the model.
        NotFiniteError: The model computes NaN or infinity for a token, or for one it was to be drawn from.
    """
    plan = resolve(policy or ExitPolicy(threshold=None), model.num_layers, model.shape.vocabulary, model.exit_layers)
    adaptive = (adaptive or AdaptiveThreshold.of(plan.policy)) if plan.policy.adaptive else None
    if adaptive is not None:
        plan = replace(plan, thresholds=dict.fromkeys(plan.thresholds, adaptive.refit()))
    ledger = ledger or Ledger(model.shape, ids.device)
    generation = _Generation(model, ids, plan, sampler or Sampler(), max_new_tokens, ledger, adaptive)
    read = generation.first(mask=mask, positions=positions, memory=memory, memory_mask=memory_mask)
    while True:
        try:
            yield from generation.verified(read) if generation.verifying else generation.settled(read)
        except NoProbabilitiesError as error:
            raise generation.broken() or error from None
        if generation.done:
            return
        read = generation.read()


class _Generation:
    """The state of one batch between steps."""

    def __init__(
        self,
        model: SplitModel,
        ids: Tensor,
        plan: Plan,
        sampler: Sampler,
        max_new_tokens: int,
        ledger: Ledger,
        adaptive: AdaptiveThreshold | None,
    ) -> None:
        self.model, self.plan, self.sampler, self.ledger, self.adaptive = model, plan, sampler, ledger, adaptive
        self.measure = measure_of(model, plan)
        if plan.policy.prompt_layer is not None and model.is_encoder_decoder:
            raise ValueError(
                f"prompt_layer is {plan.policy.prompt_layer}, but the decoder of an encoder-decoder has no prompt to "
                "shorten; leave prompt_layer away"
            )
        self.limit, self.prompt = max_new_tokens, ids.shape[1]
        self.buffer = torch.cat([ids, ids.new_full((len(ids), max_new_tokens), sampler.pad)], dim=1)
        self.length = ids.shape[1]  # tokens known, drafts included
        self.live = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.rows = list(range(len(ids)))  # live rows
        self.way: Propagate | Defer = (Propagate if plan.policy.skipped == "propagate" else Defer)(model, ledger)
        self.protected = torch.tensor(sorted(set(sampler.eos)), dtype=torch.long, device=ids.device)
        self.verifying = plan.policy.skipped == "verify" and bool(plan.thresholds)
        if self.verifying:
            self.sampler.require_repeatable()
        self.drafts: list[_Read] = []
        self.shallow: list[tuple[list[float], Tensor]] = []  # confidences, choices [B] of positions not yet compared
        self.billed = 0

    @property
    def done(self) -> bool:
        """Whether no row needs another token."""
        return not self.rows or (self.length - self.prompt >= self.limit and not self.drafts)

    # ------------------------------------------------------------ reading one position

    def first(self, **inputs: Any) -> _Read:
        """The prompt's pass, or the start token's step; `inputs` are those of `SplitModel.start`."""
        state = self.model.start(self.buffer[:, : self.length], **inputs)
        self.context = state.context
        self.prefill = not self.model.is_encoder_decoder or self.length > 1
        self.way.begin(state, self.rows, prompt=self.prefill)
        return self._full_depth() if self.prefill else self._with_tests()

    def read(self) -> _Read:
        """One step from the last known token."""
        self.prefill = False
        ids = self.buffer[:, self.length - 1 : self.length]
        self.way.begin(self.model.start(ids, context=self.context), self.rows)
        return self._with_tests()

    def _full_depth(self) -> _Read:
        batch = len(self.buffer)
        read = _Read(self._scores(), [0] * batch, [math.nan] * batch)
        if self.plan.policy.prompt_layer is not None:
            freeze_prompt(self.way, self.plan.policy.prompt_layer, self.plan.last)
        self._finish(read)
        return read

    def _with_tests(self) -> _Read:
        plan, way, batch = self.plan, self.way, len(self.buffer)
        read = _Read(self._scores(), [0] * batch, [math.nan] * batch)
        reader = Reader(self.model, plan, self.measure, self.ledger, self.protected, self.length - self.prompt)
        exits = tuple(plan.thresholds)
        for layer in plan.stops:
            way.advance(layer)
            if layer in plan.candidates:
                reader.capture(layer, way.hidden)
            if layer not in plan.thresholds:
                continue
            exit = reader.at(layer, way.hidden)
            confidences = exit.confidence()
            for row, confidence in zip(way.rows, confidences, strict=True):
                read.confidences[row] = confidence
            if self.adaptive is not None:
                choices = torch.full_like(self.buffer[:, 0], -1)
                choices[way.rows] = exit.logits.argmax(-1)
                self.shallow.append((read.confidences, choices))
            tau = plan.threshold(layer, self.length - self.prompt, self.limit)
            gone = [i for i, confidence in enumerate(confidences) if confidence > tau]
            if self.plan.policy.batch == "all" and len(gone) < len(confidences):
                gone = []
            if gone:
                kept = [i for i in range(len(confidences)) if i not in set(gone)]
                self._put(read, [way.rows[i] for i in gone], exit.emission(gone), layer)
                if exit.restricted:
                    self._remember(read, [way.rows[i] for i in gone], exit.input[gone])
                way.leave(gone, kept)
                if not kept:
                    return read
                reader.select(kept)
                confidences = [confidences[i] for i in kept]
                exit = exit.selected(kept)
            later = [e for e in exits if e > layer]
            reader.after(exit, confidences, later[0] if later else None)
        self._finish(read, reader)
        return read

    def _finish(self, read: _Read, reader: Reader | None = None) -> None:
        """Take the rows still in to the last layer and read them out there."""
        way, plan = self.way, self.plan
        way.advance(plan.last)
        if self.verifying and not self.prefill:  # `_check` reads these rows together with the drafts
            for row in way.rows:
                read.layers[row] = plan.last
            return
        if reader is not None and plan.policy.decode_from == "contrastive" and plan.policy.contrast.full:
            reader.kept = None
            scores = reader.at(plan.last, way.hidden).emission(list(range(len(way.rows))))
        elif len(self.shallow) > 1 or (self.shallow and len(way.rows) < len(self.rows)):  # a token left before
            scores = self._compared()
        else:
            with self.ledger.time("readout"):
                scores = self.model.readout(way.hidden, plan.last).float()
            self.ledger.lens(plan.last, len(scores))
            self.ledger.readout(len(scores))
            self.shallow.clear()
        self._put(read, way.rows, scores, plan.last)

    def _compared(self) -> Tensor:
        """Read all positions out that just went deep, and learn where the last layer's choices are the exit's.

        Returns:
            Scores of the rows still in, at the last position, [A, V].
        """
        way, last = self.way, self.plan.last
        hidden = way.state.hidden[self.rows]  # rows that are not finished, [R, n, D]
        with self.ledger.time("readout"):
            logits = self.model.readout(hidden, last)
        self.ledger.lens(last, hidden.shape[0] * hidden.shape[1])
        self.ledger.readout(hidden.shape[0] * hidden.shape[1])
        choices = torch.stack([choices[self.rows] for _, choices in self.shallow], dim=1)
        agreed = (choices == logits.argmax(-1)).tolist()
        assert self.adaptive is not None
        for row, same in zip(self.rows, agreed, strict=True):
            self.adaptive.add([confidences[row] for confidences, _ in self.shallow], same)
        self.shallow.clear()
        return logits[[self.rows.index(row) for row in way.rows], -1].float()

    def _scores(self) -> Tensor:
        return torch.empty(0, self.plan.vocabulary, device=self.buffer.device)

    def _put(self, read: _Read, rows: list[int], scores: Tensor, layer: int) -> None:
        """Enter the scores [len(rows), V] of rows that leave after `layer`."""
        for row in rows:
            read.layers[row] = layer
        if len(rows) == len(self.buffer):
            read.scores = scores
        else:
            if not len(read.scores):
                read.scores = scores.new_zeros(len(self.buffer), scores.shape[1])
            read.scores[rows] = scores

    def _remember(self, read: _Read, rows: list[int], inputs: Tensor) -> None:
        """Keep the readout inputs of rows that leave with tokens excluded, by pruning or by a set."""
        if read.states is None:
            read.states = inputs.new_zeros(len(self.buffer), inputs.shape[1])
        read.states[rows] = inputs

    # ------------------------------------------------------------ sampler tokens

    def _process(self, read: _Read) -> None:
        """Processed scores of a read, and its tokens.

        Where the processors left no kept token (they forbade all, or demand one that was pruned), the full vocabulary
        is read at the same exit.
        """
        ids = self.buffer[:, : self.length]
        read.processed = self.sampler.process(ids, read.scores)
        if read.states is not None and self.sampler.processors is not None:
            empty = (read.processed.amax(-1) == -torch.inf) & self.live
            if bool(empty.any()):
                with self.ledger.time("readout"):
                    full = self.model.project(read.states).float()
                self.ledger.readout(len(full))
                read.processed = self.sampler.process(ids, torch.where(empty[:, None], full, read.scores))
        read.token = self.sampler.pick(read.processed)
        read.sound = self._sound(read.scores, read.token)

    def _sound(self, scores: Tensor, token: Tensor) -> Tensor:
        """Rows whose token has a number for a score, bool [B]."""
        chosen = scores.gather(1, token[:, None])[:, 0]  # where scores hold NaN or +inf, such a one is the largest
        if self.sampler.processors is None:
            return chosen.isfinite()
        return chosen < torch.inf  # one that they force may have -inf of the model, or of its pruned readout

    def broken(self) -> NotFiniteError | None:
        """The error, with the place where the model first computes NaN or infinity on what is known so far, if any."""
        context, length = self.context, self.length
        return broken_at(
            self.model, self.buffer[:, :length], None if context.padding is None else context.padding[:, :length],
            positions=context.positions[:, :length], memory=context.memory, memory_mask=context.memory_mask,
        )  # fmt: skip

    def _append(self, token: Tensor) -> None:
        self.buffer[:, self.length] = token
        self.length += 1

    def _step(self, token: Tensor, layers: list[int], confidences: list[float], sound: Tensor) -> Step:
        """Append the tokens of one position, which count, and update which rows go on."""
        device, active, rows = self.buffer.device, self.live, self.rows
        token = torch.where(active, token, self.sampler.pad)
        self._append(token)
        self.live = active & ~self.sampler.ends(self.buffer[:, : self.length])
        live, sound_or_ended = torch.stack([self.live, sound | ~active]).tolist()
        if not all(sound_or_ended):
            self.length -= 1  # what was chosen by no number is no text
            raise self.broken() or not_finite(name_of(self.model), "in the readout of an exit", self.model.model.dtype)
        self.rows = [row for row, goes_on in enumerate(live) if goes_on]
        costs = self.ledger.costs
        costs.tokens += len(rows)
        costs.exit_layers += sum(layers[row] for row in rows)
        spent, self.billed = costs.flops - self.billed, costs.flops
        counted = set(rows)
        exit_layer = torch.tensor([layer if row in counted else 0 for row, layer in enumerate(layers)], device=device)
        confidence = torch.tensor(confidences, dtype=torch.float32, device=device)
        return Step(token, exit_layer, confidence, active, self.prefill, spent)

    def settled(self, read: _Read) -> Iterator[Step]:
        """The step of a read whose tokens stand."""
        self._process(read)
        assert read.sound is not None
        yield self._step(read.token, read.layers, read.confidences, read.sound)

    # ------------------------------------------------------------ verifying drafts

    def verified(self, read: _Read) -> Iterator[Step]:
        """The steps that a read makes certain: none while its tokens are only drafted, several after a deep pass."""
        if self.prefill:
            yield from self.settled(read)
            return
        deep = bool(self.way.rows)
        if len(read.scores):
            self._process(read)
        else:  # every row went to full depth: no drafts
            read.token = torch.zeros_like(self.buffer[:, 0])
        self._append(torch.where(self.live, read.token, self.sampler.pad))
        self.drafts.append(read)
        if not deep:
            ended = (self.sampler.is_eos(self.buffer[:, : self.length]) & self.live).any()
            full = len(self.drafts) >= self.plan.policy.draft_length or self.length - self.prompt >= self.limit
            if not full and not bool(ended):
                return
        yield from self._check(deep)

    def _check(self, deep: bool) -> Iterator[Step]:
        """Compare drafts with the full model; take back what follows the first that is wrong.

        In lock-step: the first position at which any live row disagrees is corrected, and everything behind it, in all
        rows, is taken back. Dropping a row's later drafts for another row's sake does not depend on what they are, so
        each row's distribution stays that of the full model.

        Yields:
            The steps up to and including the first correction.
        """
        way, depth = self.way, self.plan.num_layers
        assert isinstance(way, Defer)
        if not deep:
            way.flush()
        state = way.state
        with self.ledger.time("readout"):
            logits = self.model.readout(state.hidden).float()  # [B, n, V]
        self.ledger.readout(logits.shape[0] * logits.shape[1])
        drafts, self.drafts = self.drafts, []
        self.length -= len(drafts)
        for index, draft in enumerate(drafts):
            target = self.sampler.process(self.buffer[:, : self.length], logits[:, index])
            drafted = torch.tensor([layer < depth for layer in draft.layers], device=state.hidden.device)
            token, agreed = self.sampler.accept_drafts(draft.token, draft.processed, target, drafted)
            layers = [layer if same else depth for layer, same in zip(draft.layers, agreed.tolist(), strict=True)]
            wrong = bool((~agreed & self.live).any())
            sound = self._sound(logits[:, index], token)
            sound = sound if draft.sound is None else sound & draft.sound
            yield self._step(token, layers, draft.confidences, sound)
            if not self.rows:
                return
            if wrong:
                self.context.crop(state.frame.start + index + 1)
                return

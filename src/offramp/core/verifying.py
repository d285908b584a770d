"""Drafts and their check: tokens that left early stand once the full model has confirmed them, and how far drafts go.

Each row drafts on its own, waits with its drafts where they left, and is due when a token does not leave, behind as
many drafts as are allowed, or when one would end it; so rows of a batch stand at different positions. Once all rows are
due they go deep together: the deep layers' weights are then read once for all of them. What is emitted
is what the full model's scores would have given (speculative decoding, Leviathan et al. 2022, arXiv 2211.17192, with
the model's own shallow layers as the draft model), unless the policy accepts its second choice, too.

How far a row drafts is a fixed number of tokens, or up to a `Pace`: until one more draft would cost more than it is
likely to bring, by the acceptance seen so far. A cycle drafts tokens at s (the layers and readouts up to the exit) each
and ends with a deep pass, which costs m more for every draft it checks. One more draft adds a token with the
probability P·p that all pending ones and this one are right, and s + m to the cost. So a token leaves while
P·p / (s + m) is above the rate of tokens per cost reached so far (the marginal value theorem); otherwise it goes
deeper, or deep. p is the share of agreement seen at this exit and this confidence. Costs are weights read, in passes of
the full model: a decoder waits for its weights. No text depends on any of this, only how long it takes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offramp.core.batch import Batch, Read, Step
from offramp.core.confidence import HEADLESS
from offramp.core.plan import Plan
from offramp.core.readout import Exit
from offramp.core.sampling import Sampler
from offramp.core.skipped_kv import Defer
from offramp.families.readouts import Best, best_of
from offramp.families.sizes import ModelShape

EDGES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 0.99, 0.999)
"""Confidences between these agree equally often, it is assumed."""
MORE = 0.05
"""Cost of one more row in a pass, as a share of the pass (measured on CPUs: 0.03 to 0.08)."""
_WEIGHT = 2.0  # of what is believed before anything is seen, in tokens
_ANYWHERE = 0  # the sum over all exits
_FADE = 0.99  # of what was seen at an exit, each time that a token does not leave there: it is tried again some day


@dataclass
class Pace:
    """What was seen of the drafts of one generation.

    Attributes:
        thresholds: Of the policy, by exit: the confidences above which drafts are believed in at first.
        spent: Cost of one token up to an exit, tests included, by exit.
        seen: Tokens right and tokens in all, by exit (0: all of them) and place between `EDGES`.
        tokens: Tokens that became certain.
        cost: What they cost.
    """

    thresholds: dict[int, float]
    spent: dict[int, float]
    seen: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    tokens: float = 8.0
    cost: float = 8.0

    @classmethod
    def of(cls, plan: Plan, shape: ModelShape, frequent: int | None = None) -> Pace | None:
        """One that has seen nothing yet; None for drafts of a fixed length.

        Args:
            plan: When tokens leave.
            shape: The model.
            frequent: How many tokens the first test scores; None: all V.

        Returns:
            The pace.
        """
        if plan.policy.draft != "adaptive":
            return None
        blocks = [block.weights for block in shape.blocks]
        full, spent, read = sum(blocks) + shape.readout_weights(), {}, 0
        kept = plan.scored_later(frequent)
        headless = plan.policy.confidence in ("static", *HEADLESS)  # a token is read out once, where it leaves
        last = shape.readout_weights(frequent) if headless else 0
        for index, layer in enumerate(plan.thresholds):
            read += shape.adapter_weights(layer)
            read += 0 if headless else shape.readout_weights(kept if index else frequent)
            spent[layer] = (sum(blocks[:layer]) + read + last) / full
        return cls(dict(plan.thresholds), spent)

    def agreement(self, layer: int, confidence: float) -> float:
        """How often a token with this confidence is right, by what was seen."""
        place = bisect_right(EDGES, confidence)
        believed = 0.9 if confidence > self.thresholds[layer] else 0.4
        for here in (_ANYWHERE, layer):  # what all exits have seen is believed of one that has seen little
            right, all_ = self.seen.get((here, place), (0.0, 0.0))
            believed = (right + _WEIGHT * believed) / (all_ + _WEIGHT)
        return believed

    def leaves(self, layer: int, confidence: float, pending: list[tuple[int, float]]) -> bool:
        """Whether a token is drafted at an exit, behind the pending drafts (layer, confidence) of its row."""
        if confidence != confidence:
            return False
        chance = self.agreement(layer, confidence)
        for at, sure in pending:
            chance *= self.agreement(at, sure)
        if chance / (self.spent[layer] + MORE) > self.tokens / self.cost:
            return True
        for here in (_ANYWHERE, layer):
            place = here, bisect_right(EDGES, confidence)
            if place in self.seen:
                right, all_ = self.seen[place]
                self.seen[place] = right * _FADE, all_ * _FADE
        return False

    def observe(self, layer: int, confidence: float, agreed: bool) -> None:
        """Note whether an exit's best token was the full model's."""
        for here in (_ANYWHERE, layer):
            place = here, bisect_right(EDGES, confidence)
            right, all_ = self.seen.get(place, (0.0, 0.0))
            self.seen[place] = right + agreed, all_ + 1

    def checked(self, layers: list[int], certain: int) -> None:
        """Note a deep pass over a row's tokens, which left after `layers`, and how many tokens it made certain."""
        drafted = [self.spent[layer] for layer in layers if layer in self.spent]
        rest = 1.0 if len(drafted) < len(layers) else max(0.0, 1.0 - min(drafted))  # of a token that did not leave
        self.tokens += certain
        self.cost += sum(drafted) + rest + MORE * (len(layers) - 1)


@dataclass
class Draft:
    """A token of a row that is not yet certain.

    Attributes:
        token: The token; of no meaning if none was drafted.
        layer: Where it left, 1..L-1; L if it was not drafted: the row went deep with it.
        confidence: Of the last test.
        processed: The processed scores it was drawn from, [V]; None where tokens are the best ones.
        tests: What its tests said: layer, confidence and best token of each.
        logprob: Of a token that stands, by the full model; NaN where scores were processed (`processed` has them then).
    """

    token: int
    layer: int
    confidence: float
    processed: Tensor | None = None
    tests: list[tuple[int, float, int]] = field(default_factory=list)
    logprob: float = math.nan


class VerifyingBatch(Batch):
    """A batch whose tokens are drafted, and checked by the full model; arguments as for `Batch`.

    Attributes:
        due: Rows that wait for the others to go deep.
        most: Drafts before a row goes deep, by row; 0: it goes deep with every token.
    """

    way: Defer

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.require(self.samplers[0])
        every = range(len(self.buffer))
        self.due: set[int] = set()
        self.most = [self.plan.policy.draft_length for _ in every]
        self.drafts: dict[int, list[Draft]] = {row: [] for row in every}
        self.certain: dict[int, deque[Draft]] = {row: deque() for row in every}
        self.paces = [self._pace() for _ in every]
        self.tests: dict[int, list[tuple[int, float, int]]] = {row: [] for row in every}

    def require(self, sampler: Sampler) -> None:
        """Raise a ValueError if what a sampler does cannot be checked."""
        sampler.require_repeatable()
        if self.plan.policy.accept < 1 and sampler.sample:
            raise ValueError(
                f"accept is {self.plan.policy.accept}, for best tokens, but tokens are drawn; leave out one of them"
            )

    def restart(self, row: int) -> None:
        """A row begins anew."""
        self.drafts[row], self.tests[row], self.paces[row] = [], [], self._pace()
        self.certain[row].clear()
        self.due.discard(row)

    def _pace(self) -> Pace | None:
        frequent = None if self.frequent is None else len(self.frequent.tokens)
        return Pace.of(self.plan, self.model.shape, frequent)

    @property
    def drafting(self) -> list[int]:
        """Rows that are not due yet."""
        return [row for row in self.rows if row not in self.due]

    def read(self, rows: list[int] | None = None) -> Read:
        """As in `Batch`; a row with as many drafts as are allowed waits with its next token for the deep pass."""
        rows = self.drafting if rows is None else rows
        drafting = [row for row in rows if len(self.drafts[row]) < self.most[row]]
        full = [row for row in rows if row not in drafting]
        for some, state in Batch._entering(self, full):
            self.way.wait(some, state)
        read = super().read(drafting)
        for row in full:
            read.layers[row] = self.plan.num_layers
        return read

    def verified(self, read: Read) -> Iterator[Step]:
        """The steps that a read makes certain: none while its tokens are only drafted, several after a deep pass."""
        if self.prefill:
            yield self.settle(read)
        else:
            self.check(read)
            yield from self._complete()

    def check(self, read: Read) -> None:
        """Note what was drafted; once all rows are due, take them deep, and note which of their tokens stand."""
        rows = self.drafting
        deep = {row for row in rows if read.layers[row] == self.plan.num_layers}
        self._draft(read, rows, deep)
        self.due |= {row for row in rows if row in deep or self._ends(row)}
        if self.drafting:
            for some, state in self.way.states:
                self.way.wait(some, state)
            return
        self.way.recall([row for row in self.rows if row not in self.way.rows])
        self._deep()

    def _deep(self) -> None:
        """The deep pass of the rows that are in."""
        self.due.clear()
        self.way.advance(self.plan.num_layers)
        for rows, state in self.way.states:
            self._check(rows, state.hidden)

    def _leaving(self, layer: int, exit: Exit, confidences: list[float]) -> list[int]:
        rows = self.way.rows
        if self.paces[0] is None:
            return super()._leaving(layer, exit, confidences)
        if exit.judged:
            for row, c, token in zip(rows, confidences, exit.top.tokens[:, 0].tolist(), strict=True):
                self.tests[row].append((layer, c, token))
        return [
            i for i, (row, c) in enumerate(zip(rows, confidences, strict=True))
            if self._paced(row, layer, c)
        ]  # fmt: skip

    def _paced(self, row: int, layer: int, confidence: float) -> bool:
        """Whether a row's pace lets its next token be drafted after `layer`."""
        pace = self.paces[row]
        assert pace is not None
        if self.taus.get(row) == math.inf:
            return False
        return pace.leaves(layer, confidence, [(d.layer, d.confidence) for d in self.drafts[row]])

    def read_last(self, read: Read) -> None:
        """The rows still in are read together with their drafts, in `_check`; only the prompt's last position now."""
        if self.prefill:
            super().read_last(read)
        for row in self.way.rows:
            read.layers[row] = self.plan.num_layers

    def _draft(self, read: Read, rows: list[int], deep: set[int]) -> None:
        """Note the tokens of a read as drafts, at the ends of the rows that were read."""
        for length, some in self.by_length([row for row in rows if row not in deep]).items():
            self.choose(read, length, some)
        tokens = read.token
        if not all(read.sound[row] for row in rows if row not in deep):
            raise self.not_sound()
        for row in rows:
            processed = read.processed[row] if len(read.processed) and row not in deep else None
            tests, self.tests[row] = self.tests[row], []
            self.drafts[row].append(Draft(tokens[row], read.layers[row], read.confidences[row], processed, tests))
            if row not in deep:
                self.buffer[row, self.lengths[row]] = tokens[row]
            self.lengths[row] += 1

    def _ends(self, row: int) -> bool:
        """Whether a row's last draft would be its last token."""
        return self.samplers[row].is_end(self.drafts[row][-1].token) or self.made(row) >= self.limits[row]

    def _check(self, rows: list[int], hidden: Tensor) -> None:
        """Compare rows' drafts with the full model, whose states after the last layer are `hidden`, [len(rows), n, D].

        A row's first draft that is wrong is corrected, and those behind it are forgotten: that does not depend on what
        they are, so each row's distribution stays that of the full model.
        """
        flat = hidden.flatten(0, 1)
        self.ledger.readout(len(flat))
        with self.ledger.time("readout"):
            if self.best_only:
                best = self.model.best(flat)
                logits: Tensor | None = None
                found, sound = self._acceptable(best), best.sound.view(len(rows), -1).tolist()
                logprobs = (best.values - best.normaliser[:, None]).tolist()
            else:
                logits = self.model.readout(flat).float().view(*hidden.shape[:2], -1)
                found = sound = []
        for index, row in enumerate(rows):
            drafts, self.drafts[row] = self.drafts[row], []
            self.lengths[row] -= len(drafts)
            length = self.lengths[row]
            for place, draft in enumerate(drafts):
                if logits is None:
                    at = index * len(drafts) + place
                    token, agreed = self._settled(draft, found[at])
                    right, stands = sound[index][place], Draft(token, draft.layer, draft.confidence)
                    stands.logprob = logprobs[at][found[at].index(token)]
                else:
                    stands, agreed, right = self._judged(row, draft, logits[index, place])
                if not right:
                    raise self.not_sound()
                if self._is_certain(row, draft, stands, agreed):
                    break
            if (pace := self.paces[row]) is not None:
                pace.checked([draft.layer for draft in drafts], self.lengths[row] - length)

    def _acceptable(self, best: Best) -> list[list[int]]:
        """The tokens that a draft may be at each of N positions, the full model's choice first."""
        tokens, accept = best.tokens.tolist(), self.plan.policy.accept
        if accept == 1:
            return [pair[:1] for pair in tokens]
        share = (best.values[:, 1] - best.values[:, 0]).exp().tolist()
        return [pair if s >= accept else pair[:1] for pair, s in zip(tokens, share, strict=True)]

    def _settled(self, draft: Draft, choices: list[int]) -> tuple[int, bool]:
        """The token to emit, and whether the drafts behind it count."""
        if draft.layer == self.plan.num_layers:  # none was drafted
            return choices[0], True
        return (draft.token, True) if draft.token in choices else (choices[0], False)

    def _judged(self, row: int, draft: Draft, scores: Tensor) -> tuple[Draft, bool, bool]:
        """What stands for a draft, with processed scores, whether it is the draft, and whether a number chose it."""
        sampler, target = self.samplers[row], scores[None]
        if self.together:  # its processors go by the number of a row, maybe
            target = scores.new_zeros(len(self.buffer), len(scores))
            target[row] = scores
        ids = self.buffer[:, : self.lengths[row]]
        target = sampler.process(ids if self.together else ids[row : row + 1], target)
        target = target[row : row + 1] if self.together else target
        drafted = torch.tensor([draft.layer < self.plan.num_layers], device=scores.device)
        processed = torch.empty(0) if draft.processed is None else draft.processed[None]
        token = torch.tensor([draft.token], device=scores.device)
        if self.plan.policy.accept < 1:
            (choices,) = self._acceptable(best_of(target))
            chosen, agreed = self._settled(draft, choices)
            right = bool(best_of(scores[None]).sound)
        else:
            token, same = sampler.accept_drafts(token, processed, target, drafted)
            chosen, agreed, right = int(token), bool(same), bool(sampler.sound(scores[None], token))
        return Draft(chosen, draft.layer, draft.confidence, target[0]), agreed, right

    def _is_certain(self, row: int, draft: Draft, stands: Draft, agreed: bool) -> bool:
        """Note what stands; whether later drafts do not count: this one was wrong, or ends the row."""
        stands.layer = draft.layer if agreed else self.plan.num_layers
        self.certain[row].append(stands)
        if (pace := self.paces[row]) is not None:
            self._observe(pace, draft, stands.token, agreed)
        tokens = [stands.token if other == row else 0 for other in range(len(self.buffer))]
        ended = bool(self.append([row], tokens, self.lengths[row]))
        self.lengths[row] += 1
        if ended:
            self.end([row])
        return ended or not agreed

    def _observe(self, pace: Pace, draft: Draft, token: int, agreed: bool) -> None:
        for layer, confidence, best in draft.tests:
            pace.observe(layer, confidence, best == token)
        if not draft.tests and draft.layer < self.plan.num_layers:
            pace.observe(draft.layer, draft.confidence, agreed)

    def _complete(self) -> Iterator[Step]:
        """Steps of the positions that are certain in all rows."""
        while any(self.certain.values()) and all(self.certain[row] for row in self.rows):
            rows = [row for row, queue in self.certain.items() if queue]
            blank = Draft(self.pad, 0, math.nan)
            found = [self.certain[row].popleft() if row in rows else blank for row in self.certain]
            yield self.step([d.token for d in found], [d.layer for d in found], [d.confidence for d in found], rows)

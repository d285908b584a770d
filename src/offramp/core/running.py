"""A batch that never ends: rows join it and leave it while the others go on.

That is continuous batching, as in Orca (Yu et al., OSDI 2022). Each row stands at its own position, with options of its
own, and its tokens leave the network where they are sure.

A prompt is read in pieces between the others' tokens, so that a long one does not make them wait. Of several that wait
comes first which would have been read first, had each been alone (fair queueing: Demers, Keshav and Shenker, SIGCOMM
1989): short ones overtake long ones, but none that has waited for as many steps as it takes to read.

What a prompt begins with may be known from another's: then its keys and values are copied, not computed (see
`offramp.core.prefixes`). Of an answer they are kept, too, as far as its tokens went to full depth.

A row's tokens are those it would get alone: on the native engine bit for bit, on torch up to the rounding of larger
products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from offramp.core.batch import Batch, Read
from offramp.core.costs import Ledger
from offramp.core.decoding import batch_of
from offramp.core.drafting import DraftingBatch
from offramp.core.policy import DRAFTER, ExitPolicy
from offramp.core.prefixes import Prefixes
from offramp.core.sampling import Sampler
from offramp.core.skipped_kv import Propagate, freeze_prompt
from offramp.core.verifying import VerifyingBatch
from offramp.families import SplitModel

OWN = "of the policy"
"""The threshold of a row that goes by the policy."""


@dataclass(frozen=True)
class Asked:
    """What one row is asked for.

    Attributes:
        ids: The prompt's tokens.
        max_new_tokens: Most tokens generated.
        sampler: How its scores become tokens, and which ones end it; its `stopping` is not used.
        threshold: Instead of the policy's, at all exits alike; None: full depth.
        top: Log-probabilities of so many tokens come with each one.
        recall: Whether what is kept of its beginning is used; all of the prompt is computed else.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampler: Sampler = field(default_factory=Sampler)
    threshold: float | str | None = OWN
    top: int = 0
    recall: bool = True

    @property
    def plain(self) -> bool:
        """Whether its tokens are simply the best ones."""
        return self.sampler.processors is None and not self.sampler.sample and not self.top


class Emitted(NamedTuple):
    """One token of one row, which stands.

    Attributes:
        row: Of the batch.
        token: Its id.
        exit_layer: Layer after which it left, as in `Step`.
        confidence: Of the last test made for it; NaN: none was made.
        logprob: Its log-probability, in nats, among the (processed) scores it was chosen by.
        top: The most probable tokens there and their log-probabilities, if asked for.
        ended: Whether it is the row's last one, by its kind or by the number of tokens.
        prefill: Whether it was read off the prompt's own pass.
        cached: Tokens of the prompt that were not computed, since their keys and values were kept.
    """

    row: int
    token: int
    exit_layer: int
    confidence: float
    logprob: float
    top: list[tuple[int, float]]
    ended: bool
    prefill: bool
    cached: int = 0


class RunningBatch:
    """Rows that come and go. Not for several threads at once.

    Args:
        model: Decoder-only.
        policy: The exit policy of all rows; None: the full model.
        rows: Most rows at once.
        longest: Most tokens of a prompt and its answer together.
        chunk: Tokens of waiting prompts that are read in a step, 1 or more; a prompt under `prompt_layer` is read as a
            whole.
        eos: Tokens that pruning never drops: those that end rows.
        draft_rows: Under "verify" rows draft while at most so many are active: with more, a pass has enough to do, and
            what is thrown away costs time. No text depends on it: with `accept` below 1, where one would, rows always
            draft, and rows that are drawn never do (their tokens are the full model's by the same draws).
        keep: Most tokens of earlier prompts and answers whose keys and values are kept; 0: none. Where the model is not
            `exact`, what is computed with them is theirs up to rounding.

    Attributes:
        free: Rows that nobody has.
        ledger: The costs of all rows so far.
        prefixes: What is kept.

    Raises:
        ValueError: The policy does not fit the model, its tokens would depend on the other rows, or the model is an
            encoder-decoder or has no so many positions.
    """

    def __init__(
        self,
        model: SplitModel,
        policy: ExitPolicy | None,
        *,
        rows: int,
        longest: int,
        chunk: int = 64,
        eos: tuple[int, ...] = (),
        draft_rows: int = 1,
        keep: int = 0,
    ) -> None:
        if model.is_encoder_decoder:
            raise ValueError("encoder-decoders cannot run as a batch that rows join; use generate")
        if policy is not None and (policy.adaptive or policy.batch == "all"):
            what = "an adaptive threshold" if policy.adaptive else "batch='all'"
            raise ValueError(f"with {what} a row's tokens depend on the others; give a policy without")
        if min(rows, longest - 1, chunk, keep + 1) < 1:
            raise ValueError(f"rows is {rows}, longest {longest}, chunk {chunk}, keep {keep}; at least 1, 2, 1 and 0")
        if model.max_positions is not None and longest > model.max_positions:
            raise ValueError(f"longest is {longest}, but the model's context holds {model.max_positions}")
        self.model, self.longest, self.chunk, self.draft_rows = model, longest, chunk, draft_rows
        self.ledger = Ledger(model.shape, model.device)
        ids = torch.zeros(rows, 0, dtype=torch.long, device=model.device)
        self._batch: Batch = batch_of(model, ids, policy, Sampler(eos=eos), longest, self.ledger)
        self._batch.context, self._batch.together = model.room(rows), False
        self._batch.end(list(range(rows)))
        self._plain = self._batch.best_only
        self._asked: dict[int, Asked] = {}
        self._reading: dict[int, int] = {}  # rows whose prompts are being read: how far
        self._due: dict[int, int] = {}  # the same rows: when each would have been read alone, in tokens
        self._clock = 0  # tokens that could have been read of prompts so far
        self._sure: dict[int, int] = {}  # how many tokens have keys and values as reading a prompt gives them
        self._cached: dict[int, int] = {}  # how many of the prompt's were not computed
        way, last = self._batch.way, self._batch.plan.last
        own = [index for layer in way.branches if layer != DRAFTER for index in model.branches[layer]]
        self.prefixes = Prefixes(model, self._batch.context, [*range(last), *own], keep)
        self.free = list(range(rows))

    @property
    def active(self) -> list[int]:
        """Rows that somebody has."""
        return sorted(self._asked)

    @property
    def reading(self) -> set[int]:
        """Rows whose prompts are not read yet, or not to their ends."""
        return set(self._reading)

    def admit(self, asked: Asked) -> int:
        """Give a request a row; its prompt is read in the next steps.

        Returns:
            The row.

        Raises:
            ValueError: No row is free, the prompt is empty or too long, or the policy cannot do what is asked.
        """
        batch, length, most = self._batch, len(asked.ids), asked.max_new_tokens
        if not self.free:
            raise ValueError(f"all {len(self._asked)} rows are taken; wait until one is free")
        if length < 1 or most < 1 or length + most > self.longest:
            raise ValueError(
                f"the prompt has {length} tokens and {most} new ones are asked for; give at least 1 of each, and at "
                f"most {self.longest} together"
            )
        if isinstance(batch, VerifyingBatch):
            batch.require(asked.sampler)
        tau = self._threshold(asked)
        row = self.free.pop(0)
        batch.buffer[row, :length] = torch.tensor(asked.ids, device=batch.buffer.device)
        batch.samplers[row], batch.prompts[row], batch.limits[row] = asked.sampler, length, most
        batch.lengths[row], batch.active[row] = length, True
        batch.taus.pop(row, None)
        if tau is not None:
            batch.taus[row] = tau
        if isinstance(batch, VerifyingBatch):
            batch.restart(row)
        self._asked[row], self._reading[row], self._due[row] = asked, 0, self._clock + length
        self._sure[row] = self._cached[row] = 0
        self._recall(row)
        return row

    def _threshold(self, asked: Asked) -> float | None:
        """A row's own threshold; None: it has none."""
        plan, tau = self._batch.plan, asked.threshold
        if isinstance(tau, str):
            return None
        if plan.last < plan.num_layers:
            raise ValueError(f"all tokens leave after layer {plan.last}; there is no threshold to change")
        if tau is not None and plan.policy.skipped == "verify":
            raise ValueError(f"threshold is {tau}, but drafts are checked: no token depends on it; leave it out")
        if tau is not None and not plan.thresholds:
            raise ValueError(f"threshold is {tau}, but the policy never leaves early; leave it out")
        return math.inf if tau is None else float(tau)

    def release(self, row: int) -> None:
        """Take a row back, wherever it stands; its place is free at once.

        Raises:
            ValueError: Nobody has it.
        """
        if row not in self._asked:
            raise ValueError(f"row {row} is free; those that are not: {self.active}")
        if row in self._reading:
            del self._reading[row], self._due[row]
        elif row in self._batch.rows:
            self._batch.end([row])
        self._keep(row)
        del self._asked[row], self._sure[row], self._cached[row]
        self.free.append(row)

    def step(self) -> list[Emitted]:
        """Read a piece of the waiting prompts, and one position of each row.

        Returns:
            The tokens that stand; none while they are only drafted.

        Raises:
            NotFiniteError: The model computes NaN or infinity.
            NoProbabilitiesError: The processors of a row that is drawn forbid all tokens.
        """
        made = []
        with torch.no_grad():
            if self._batch.rows:
                made += self._tokens()
            if self._reading:
                before, costs = self.ledger.costs.flops, self.ledger.costs
                made += (first := self._prompts())
                costs.prompt_flops += costs.flops - before
                costs.prompt_tokens += len(first)
        if self.model.device.type == "cuda":
            self.ledger.settle()
        for token in made:
            if token.ended and token.row in self._asked:
                self.release(token.row)
        return made

    # ------------------------------------------------------------ prompts

    def pieces(self) -> list[tuple[int, int, int]]:
        """What the next step reads of the prompts that wait.

        Returns:
            Rows, with the first token of each and one behind the last: at most `chunk` tokens in all, or one prompt as
            a whole.
        """
        whole, budget, pieces = self._batch.plan.policy.prompt_layer is not None, self.chunk, []
        for row in sorted(self._reading, key=lambda row: self._due[row]):  # of equal ones, the oldest
            begin, end = self._reading[row], self._batch.prompts[row]
            pieces.append((row, begin, end if whole else min(end, begin + budget)))
            budget -= end - begin
            if budget <= 0 or whole:
                break
        return pieces

    def _prompts(self) -> list[Emitted]:
        """Read a piece of the prompts that wait."""
        batch, plan, pieces = self._batch, self._batch.plan, self.pieces()
        self._clock += self.chunk
        rows = [row for row, _, _ in pieces]
        batch.prefill = True
        batch.way.begin([batch.start([row], *piece) for row, *piece in pieces], rows, prompt=True)
        if plan.policy.prompt_layer is not None:
            freeze_prompt(batch.way, plan.policy.prompt_layer, plan.last)
        batch.way.advance(plan.last)
        if isinstance(batch, DraftingBatch):
            batch.learn()
        for row, _, end in pieces:
            frozen = plan.policy.prompt_layer is not None and end == batch.prompts[row]  # the last one went deeper
            self._reading[row], self._sure[row] = end, end - frozen
            self._keep(row)
        done = sorted(row for row, _, end in pieces if end == batch.prompts[row])
        batch.way.states = sorted((p for p in batch.way.states if p[0][0] in done), key=lambda p: p[0])
        batch.way.rows = done
        if not done:
            self._recall(*self._reading)
            return []
        read = batch.unread()
        self._set_plain(done)
        batch.read_last(read)
        for row in done:
            del self._reading[row], self._due[row]
        batch.rows = sorted([*batch.rows, *done])
        self._recall(*self._reading)
        return self._chosen(read, done)

    # ------------------------------------------------------------ what prompts begin with

    def _recall(self, *rows: int) -> None:
        """Let rows whose prompts wait have what is kept of these, if it is more than they have read."""
        for row in rows:
            ids, have = self._asked[row].ids[: self._batch.prompts[row] - 1], self._reading[row]  # the last one is read
            if not self._asked[row].recall or self.prefixes.known(ids) <= have:
                continue
            count, beside = self.prefixes.load(row, ids)
            if beside is not None and isinstance(self._batch, DraftingBatch):
                self._batch.recall(row, beside)
            self._reading[row] = self._sure[row] = count
            self._cached[row] += count - have
            self._due[row] -= count - have

    def _keep(self, row: int) -> None:
        """Keep keys and values of a row, as far as they are those of a prompt."""
        if not self.prefixes.room:
            return  # before anything is fetched from the device
        batch, sure, beside = self._batch, self._sure[row], None
        if isinstance(batch, DraftingBatch):
            if row not in self._reading:
                return  # what its drafter needs to know of an answer's tokens is forgotten by now
            beside = batch.before[row][1 : sure + 1]
        self.prefixes.save(row, batch.buffer[row, :sure].tolist(), beside)

    def _set_plain(self, rows: list[int]) -> None:
        self._batch.best_only = self._plain and all(self._asked[row].plain for row in rows)

    # ------------------------------------------------------------ tokens

    def _tokens(self) -> list[Emitted]:
        batch = self._batch
        self._set_plain(batch.rows)
        if isinstance(batch, VerifyingBatch):
            policy = batch.plan.policy
            time = policy.accept < 1 or len(batch.rows) <= self.draft_rows
            for row in batch.rows:
                batch.most[row] = policy.draft_length if time and not self._asked[row].sampler.sample else 0
            batch.check(batch.read())
            return self._standing(batch)
        if isinstance(batch.way, Propagate):
            batch.way.settle()
        rows = list(batch.rows)
        return self._chosen(batch.read(), rows)

    def _chosen(self, read: Read, rows: list[int]) -> list[Emitted]:
        """Choose the tokens of rows that were read, and put them behind their texts."""
        batch, made = self._batch, []
        for length, some in batch.by_length(rows).items():
            batch.choose(read, length, some)
            if not all(read.sound[row] for row in some):
                raise batch.not_sound()
            ended = batch.append(some, read.token, length)
            for row in some:
                if not batch.prefill and self._sure[row] == length - 1 and read.layers[row] == batch.plan.last:
                    self._sure[row] = length
                batch.lengths[row] += 1
                made.append(self._emitted(
                    row, read.token[row], read.layers[row], read.confidences[row], read.logprob[row],
                    None if read.scores is None else read.processed[row], ended=row in ended,
                ))  # fmt: skip
            batch.end(ended)
        return made

    def _standing(self, batch: VerifyingBatch) -> list[Emitted]:
        """What the deep pass made certain."""
        made = []
        for row, queue in batch.certain.items():
            if queue:
                self._sure[row] = batch.lengths[row] - 1
            while queue:
                draft = queue.popleft()
                ended = row not in batch.rows and not queue
                made.append(self._emitted(
                    row, draft.token, draft.layer, draft.confidence, draft.logprob, draft.processed, ended=ended
                ))  # fmt: skip
        return made

    def _emitted(
        self, row: int, token: int, layer: int, confidence: float, logprob: float, scores: Tensor | None, *, ended: bool
    ) -> Emitted:
        top: list[tuple[int, float]] = []
        self.ledger.costs.tokens += 1
        self.ledger.costs.exit_layers += layer
        if scores is not None:
            logs = scores.log_softmax(-1)
            logprob = float(logs[token])
            if count := self._asked[row].top:
                best = logs.topk(count)
                top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        cached = self._cached[row]
        return Emitted(row, token, layer, confidence, logprob, top, ended, self._batch.prefill, cached)

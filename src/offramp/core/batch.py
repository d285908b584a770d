"""A batch between two steps: one position of every row is read, and tokens come of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.core.adaptive_threshold import AdaptiveThreshold
from offramp.core.confidence import begun
from offramp.core.costs import Ledger
from offramp.core.plan import Plan
from offramp.core.readout import Exit, Reader, measure_of
from offramp.core.sampling import Sampler
from offramp.core.skipped_kv import Defer, Propagate, freeze_prompt
from offramp.core.vocabulary import Frequent
from offramp.families import SplitModel
from offramp.families.best import Best
from offramp.families.cache import as_rows
from offramp.families.finite import NotFiniteError, broken_at, name_of, not_finite
from offramp.families.state import State


class Step(NamedTuple):
    """One generated position of a batch.

    Attributes:
        token: Token ids, [B]; the pad id in rows that were finished before.
        exit_layer: Layer after which each token left, 1..L, [B]; 0 in finished rows. Under "verify", the layer it was
            drafted at if the full model agreed (0: by a drafter), else L.
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
class Read:
    """What one position of each row was read as.

    Where tokens are simply the best ones, `token` and `sound` are all that is kept of the logits. Where processors or
    draws need scores, these stand in `scores`, and tokens come of them in `Batch.choose`.

    Attributes:
        layers: Exit layer by row, 0 for none, [B].
        confidences: Confidence of the last test by row, [B].
        token: The token by row, [B].
        sound: Whether it was chosen by a number, by row, [B].
        scores: Of all tokens, [B, V]; None until a row is read.
        states: Readout inputs, [B, D], of rows that left with some tokens excluded; None if there are none.
        processed: Scores after the processors, [B, V].
    """

    layers: list[int]
    confidences: list[float]
    token: list[int]
    sound: list[bool]
    scores: Tensor | None = None
    states: Tensor | None = None
    processed: Tensor = field(default_factory=lambda: torch.empty(0))


class Batch:
    """The state of one batch between steps.

    Args:
        model: The model.
        ids: Prompt, or decoder start tokens, [B, T].
        plan: Where to look, and when to leave.
        sampler: How scores become tokens.
        max_new_tokens: Most tokens generated per row.
        ledger: Where the work is written down.
        adaptive: What an adaptive policy has learnt.

    Raises:
        ValueError: The plan does not fit the model.
    """

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
        restricts = self.measure is not None and begun(self.measure).restricts
        plain = plan.policy.decode_from == "logits" and not restricts
        self.best_only = plain and sampler.processors is None and not sampler.sample
        self.limit, self.prompt = max_new_tokens, ids.shape[1]
        self.buffer = torch.cat([ids, ids.new_full((len(ids), max_new_tokens), sampler.pad)], dim=1)
        self.lengths = [ids.shape[1]] * len(ids)  # tokens known by row, drafts included
        self.rows = list(range(len(ids)))  # that are not finished
        self.active = torch.ones(len(ids), dtype=torch.bool, device=ids.device)  # the same
        used = [layer for layer in model.branches if layer in plan.thresholds or layer == plan.last]
        self.way: Propagate | Defer = (Propagate if plan.policy.skipped == "propagate" else Defer)(model, ledger, used)
        self.protected = torch.tensor(sorted(set(sampler.eos)), dtype=torch.long, device=ids.device)
        self.frequent = self._frequent()
        self.shallow: dict[int, list[tuple[float, int]]] = {row: [] for row in self.rows}  # (c, token), not compared
        self.prefill = False
        self.billed = 0

    def _frequent(self) -> Frequent | None:
        """The tokens that tests score where the policy says so, their rows gathered once for all steps."""
        if not self.plan.frequent or not self.plan.thresholds:
            return None
        with self.ledger.time("select"):
            found = Frequent.of(self.model, self.protected, str(self.plan.policy.vocabulary))
        if not self.model.fused:
            self.ledger.gather(1, len(found.tokens))
        return found

    # ------------------------------------------------------------ reading one position

    def first(self, **inputs: Any) -> Read:
        """The prompt's pass, or the start token's step; `inputs` are those of `SplitModel.start`."""
        state = self.model.start(self.buffer[:, : self.prompt], **inputs)
        self.context = state.context
        self.prefill = not self.model.is_encoder_decoder or self.prompt > 1
        self.way.begin([state], self.rows, prompt=self.prefill)
        if not self.prefill:
            self.ledger.costs.prompt_flops = self.ledger.costs.flops  # the encoder's
            return self._with_tests()
        read = self._unread()
        if self.plan.policy.prompt_layer is not None:
            freeze_prompt(self.way, self.plan.policy.prompt_layer, self.plan.last)
        self._read_last(read)
        return read

    def read(self, rows: list[int] | None = None) -> Read:
        """One step from the last known token of some rows; None: of all."""
        self.prefill, rows = False, self.rows if rows is None else rows
        pairs = self._entering(rows)
        self.way.begin([state for _, state in pairs], [row for group, _ in pairs for row in group])
        return self._with_tests() if rows else self._unread()

    def _entering(self, rows: list[int]) -> list[tuple[list[int], State]]:
        """Their last known tokens before the first block, those at the same position together."""
        return [(some, self._start(some, length - 1, length)) for length, some in self._by_length(rows).items()]

    def _start(self, rows: list[int], begin: int, end: int) -> State:
        chosen = as_rows(rows, self.buffer.device)
        return self.model.start(self.buffer[chosen, begin:end], context=self.context, rows=chosen, slot=begin)

    def _by_length(self, rows: list[int]) -> dict[int, list[int]]:
        """Rows that stand at the same position, by how many of their tokens are known."""
        found: dict[int, list[int]] = {}
        for row in rows:
            found.setdefault(self.lengths[row], []).append(row)
        return found

    def _unread(self) -> Read:
        batch = len(self.buffer)
        return Read([0] * batch, [math.nan] * batch, [self.sampler.pad] * batch, [True] * batch)

    def _position(self, rows: list[int]) -> int | Tensor:
        """Positions of rows' next tokens, counted from the first generated one: one for all if they are the same."""
        places = [self.lengths[row] - self.prompt for row in rows]
        return places[0] if len(set(places)) == 1 else torch.tensor(places, device=self.buffer.device)

    def _with_tests(self) -> Read:
        plan, way, read = self.plan, self.way, self._unread()
        if not plan.thresholds:
            self._finish(read, None)
            return read
        reader = Reader(
            self.model, plan, self.measure, self.ledger, self.protected, way.rows, self._position(way.rows),
            scores=not self.best_only, frequent=self.frequent,
        )  # fmt: skip
        exits = tuple(plan.thresholds)
        for layer in plan.stops:
            way.advance(layer)
            if layer in plan.candidates:
                reader.capture(layer, way.read)
            if layer not in plan.thresholds:
                continue
            exit = reader.at(layer, way.read)
            confidences = exit.confidence()
            for row, confidence in zip(way.rows, confidences, strict=True):
                read.confidences[row] = confidence
            if self.adaptive is not None:
                for row, c, token in zip(way.rows, confidences, exit.top.tokens[:, 0].tolist(), strict=True):
                    self.shallow[row].append((c, token))
            if gone := self._leaving(layer, exit, confidences):
                kept = [i for i in range(len(confidences)) if i not in set(gone)]
                self._take(read, [way.rows[i] for i in gone], layer, exit, gone)
                way.leave(gone, kept)
                if not kept:
                    return read
                reader.select(kept)
                confidences = [confidences[i] for i in kept]
                exit = exit.selected(kept)
            later = next((e for e in exits if e > layer), None)
            reader.after(exit, confidences, later)
        self._finish(read, reader)
        return read

    def _leaving(self, layer: int, exit: Exit, confidences: list[float]) -> list[int]:
        """Which of the rows still in leave after `layer`."""
        rows, plan = self.way.rows, self.plan
        taus = [plan.threshold(layer, self.lengths[row] - self.prompt, self.limit) for row in rows]
        gone = [i for i, (c, tau) in enumerate(zip(confidences, taus, strict=True)) if c > tau]
        return [] if plan.policy.batch == "all" and len(gone) < len(confidences) else gone

    def _take(self, read: Read, rows: list[int], layer: int, exit: Exit, index: list[int]) -> None:
        """Enter what rows that leave at an exit are read as."""
        for row in rows:
            read.layers[row] = layer
        if self.best_only:
            self._take_best(read, rows, exit.best(index))
            return
        self._take_scores(read, rows, exit.emission(index))
        if exit.restricted:
            if read.states is None:
                read.states = exit.input.new_zeros(len(self.buffer), exit.input.shape[1])
            read.states[rows] = exit.input[index]

    def _take_best(self, read: Read, rows: list[int], best: Best) -> None:
        tokens, normalisers = best.tokens.tolist(), best.normaliser.tolist()
        for row, (token, _), normaliser in zip(rows, tokens, normalisers, strict=True):
            read.token[row], read.sound[row] = token, math.isfinite(normaliser)

    def _take_scores(self, read: Read, rows: list[int], scores: Tensor) -> None:
        if rows == list(range(len(self.buffer))):
            read.scores = scores
        else:
            if read.scores is None:
                read.scores = scores.new_zeros(len(self.buffer), scores.shape[1])
            read.scores[rows] = scores

    def _finish(self, read: Read, reader: Reader | None) -> None:
        """Take the rows still in to the last layer and read them out there."""
        way, plan = self.way, self.plan
        if reader is not None and plan.policy.decode_from == "contrastive" and plan.policy.contrast.full:
            way.advance(plan.last)
            reader.whole()
            exit = reader.at(plan.last, way.read)
            self._take(read, way.rows, plan.last, exit, list(range(len(way.rows))))
        else:
            self._read_last(read)

    def _read_last(self, read: Read) -> None:
        way, last, rows = self.way, self.plan.last, self.way.rows
        way.advance(last)
        for row in rows:
            read.layers[row] = last
        if isinstance(way, Defer) and self.adaptive is not None and not self.prefill:
            for some, state in way.states:
                self._read_states(read, some, state.read.flatten(0, 1))
        else:
            self._read_states(read, rows, way.read)

    def _read_states(self, read: Read, rows: list[int], hidden: Tensor) -> None:
        """Read states [len(rows) * n, D] after the last layer; the tokens are those of each row's last one."""
        last, n = self.plan.last, len(hidden) // len(rows)
        self.ledger.lens(last, len(hidden))
        self.ledger.readout(len(hidden))
        with self.ledger.time("readout"):
            if self.best_only:
                best = self.model.best(hidden, last)
                choices = best.tokens[:, 0]
                self._take_best(read, rows, Best(*(part[n - 1 :: n] for part in best[:3])))
            else:
                logits = self.model.readout(hidden, last).float()
                choices = logits.argmax(-1) if n > 1 else torch.empty(0)
                self._take_scores(read, rows, logits[n - 1 :: n])
        if n > 1:
            self._learn(rows, choices.view(len(rows), n).tolist())
        for row in rows:
            self.shallow[row].clear()

    def _learn(self, rows: list[int], choices: list[list[int]]) -> None:
        """Tell the adaptive threshold at which confidence the exit's choices were the last layer's, [len(rows), n]."""
        assert self.adaptive is not None
        for row, deep in zip(rows, choices, strict=True):
            pairs = self.shallow[row]
            self.adaptive.add([c for c, _ in pairs], [token == d for (_, token), d in zip(pairs, deep, strict=True)])

    # ------------------------------------------------------------ choosing tokens

    def choose(self, read: Read, length: int, rows: list[int] | None = None) -> None:
        """The tokens of rows whose first `length` tokens are known; None: of all rows.

        Where the processors left no kept token (they forbade all, or demand one that was pruned), the full vocabulary
        is read at the same exit. Processors always see the whole batch: some go by the number of a row.
        """
        if read.scores is None:  # they are the best ones, or none was drafted
            return
        ids = self.buffer[:, :length]
        processed = self.sampler.process(ids, read.scores)
        if read.states is not None and self.sampler.processors is not None:
            empty = (processed.amax(-1) == -torch.inf) & self.active
            if bool(empty.any()):
                with self.ledger.time("readout"):
                    full = self.model.project(read.states).float()
                self.ledger.readout(len(full))
                processed = self.sampler.process(ids, torch.where(empty[:, None], full, read.scores))
        some = rows or list(range(len(self.buffer)))
        every = rows is None or len(some) == len(self.buffer)
        if every:
            read.processed = processed
        else:
            read.processed = torch.zeros_like(read.scores) if not len(read.processed) else read.processed
            read.processed[some] = processed[some]
            processed = processed[some]
        picked = self.sampler.pick(processed)
        sound = self.sampler.sound(read.scores if every else read.scores[some], picked)
        for row, token, right in zip(some, picked.tolist(), sound.tolist(), strict=True):
            read.token[row], read.sound[row] = token, right

    def broken(self) -> NotFiniteError | None:
        """The error, with the place where the model first computes NaN or infinity on what is known so far, if any."""
        context, length = self.context, min(self.lengths)
        context.reach(length)
        return broken_at(
            self.model, self.buffer[:, :length], None if context.padding is None else context.padding[:, :length],
            positions=context.positions[:, :length], memory=context.memory, memory_mask=context.memory_mask,
        )  # fmt: skip

    def not_sound(self) -> NotFiniteError:
        """The error for a token that was chosen by no number."""
        return self.broken() or not_finite(name_of(self.model), "in the readout of an exit", self.model.model.dtype)

    def step(self, tokens: list[int], layers: list[int], confidences: list[float], rows: list[int]) -> Step:
        """The record of one position, whose tokens count in `rows`."""
        device, counted, spent = self.buffer.device, set(rows), self.count([layers[row] for row in rows])
        every = len(rows) == len(tokens)
        tokens = tokens if every else [t if row in counted else self.sampler.pad for row, t in enumerate(tokens)]
        layers = layers if every else [layer if row in counted else 0 for row, layer in enumerate(layers)]
        active = torch.tensor([row in counted for row in range(len(tokens))], device=device)
        return Step(
            torch.tensor(tokens, device=device), torch.tensor(layers, device=device),
            torch.tensor(confidences, dtype=torch.float32, device=device), active, self.prefill, spent,
        )  # fmt: skip

    def count(self, layers: list[int]) -> int:
        """Write down tokens that left after these layers; FLOPs since the last ones."""
        costs = self.ledger.costs
        costs.tokens += len(layers)
        costs.exit_layers += sum(layers)
        if self.prefill:
            costs.prompt_flops, costs.prompt_tokens = costs.flops, len(layers)
        spent, self.billed = costs.flops - self.billed, costs.flops
        return spent

    def settle(self, read: Read) -> Step:
        """The step of a read of rows that all stand at the same position, and whose tokens stand."""
        length, rows = self.lengths[self.rows[0]], self.rows
        self.choose(read, length)
        if not all(read.sound[row] for row in rows):
            raise self.not_sound()
        self.lengths = [length + 1] * len(self.lengths)
        ended = self.append(rows, read.token, length)
        step = self.step(read.token, read.layers, read.confidences, rows)
        self.end(ended)
        return step

    def append(self, rows: list[int], tokens: list[int], length: int) -> list[int]:
        """Put rows' tokens, by row of the batch, behind their first `length` ones; which of the rows end with them."""
        if len(rows) == 1:
            self.buffer[rows[0], length] = tokens[rows[0]]
        else:
            self.buffer[rows, length] = torch.tensor([tokens[row] for row in rows], device=self.buffer.device)
        ended = [row for row in rows if self.sampler.is_end(tokens[row])]
        if self.sampler.stopping is not None:
            stops = self.sampler.stopping(self.buffer[:, : length + 1]).tolist()
            ended += [row for row in rows if stops[row] and row not in ended]
        if length + 1 - self.prompt >= self.limit:
            return list(rows)
        return ended

    def end(self, rows: list[int]) -> None:
        """These rows are finished."""
        if not rows:
            return
        self.rows = [row for row in self.rows if row not in rows]
        self.active[rows] = False
        if isinstance(self.way, Defer):
            for row in rows:
                self.way.forget(row)

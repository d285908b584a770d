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
from offramp.core.readout import Exit, Reader, check_prompt, measure_of
from offramp.core.sampling import Sampler
from offramp.core.skipped_kv import Defer, Propagate, Way, freeze_prompt
from offramp.core.vocabulary import Frequent
from offramp.families import SplitModel
from offramp.families.finite import NotFiniteError, broken_at, name_of, not_finite
from offramp.families.readouts import Best
from offramp.families.state import State, as_rows


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
    """What one position of each row was read as; where scores are wanted, tokens come of them in `Batch.choose`.

    Attributes:
        layers: Exit layer by row, 0 for none, [B].
        confidences: Confidence of the last test by row, [B].
        token: The token by row, [B].
        sound: Whether it was chosen by a number, by row, [B].
        logprob: The token's log-probability where it is simply the best one, by row, [B]; else NaN.
        scores: Of all tokens, [B, V]; None: they are not wanted, or no row was read yet.
        states: Readout inputs, [B, D], of rows that left with some tokens excluded; None if there are none.
        processed: Scores after the processors, [B, V].
    """

    layers: list[int]
    confidences: list[float]
    token: list[int]
    sound: list[bool]
    logprob: list[float]
    scores: Tensor | None = None
    states: Tensor | None = None
    processed: Tensor = field(default_factory=lambda: torch.empty(0))


class Batch:
    """The state of one batch between steps; arguments as for `offramp.core.decoding.batch_of`, the policy resolved.

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
        self.model, self.plan, self.ledger, self.adaptive = model, plan, ledger, adaptive
        self.samplers, self.pad, self.together = [sampler] * len(ids), sampler.pad, True  # one sampler sees all rows
        self.measure = measure_of(model, plan)
        check_prompt(model, plan.policy)
        restricts = self.measure is not None and begun(self.measure).restricts
        plain = plan.policy.decode_from == "logits" and not restricts
        self.best_only = plain and sampler.processors is None and not sampler.sample
        self.prompts, self.limits = [ids.shape[1]] * len(ids), [max_new_tokens] * len(ids)
        self.buffer = torch.cat([ids, ids.new_full((len(ids), max_new_tokens), sampler.pad)], dim=1)
        self.lengths = [ids.shape[1]] * len(ids)  # tokens known by row, drafts included
        self.rows = list(range(len(ids)))  # that are not finished
        self.active = torch.ones(len(ids), dtype=torch.bool, device=ids.device)  # the same
        used = [layer for layer in model.branches if layer in plan.thresholds or layer == plan.last]
        self.way: Way = (Propagate if plan.policy.skipped == "propagate" else Defer)(model, ledger, used)
        self.protected = torch.tensor(sorted(set(sampler.eos)), dtype=torch.long, device=ids.device)
        self.frequent = self._frequent()
        self.taus: dict[int, float] = {}  # of rows with a threshold of their own
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

    def first(self, **inputs: Any) -> Read:
        """The prompt's pass, or the start token's step; `inputs` are those of `SplitModel.start`."""
        prompt = self.prompts[0]
        state = self.model.start(self.buffer[:, :prompt], **inputs)
        self.context = state.context
        self.prefill = not self.model.is_encoder_decoder or prompt > 1
        self.way.begin([state], self.rows, prompt=self.prefill)
        if not self.prefill:
            self.ledger.costs.prompt_flops = self.ledger.costs.flops  # the encoder's
            return self._with_tests()
        read = self.unread()
        if self.plan.policy.prompt_layer is not None:
            freeze_prompt(self.way, self.plan.policy.prompt_layer, self.plan.last)
        self.read_last(read)
        return read

    def read(self, rows: list[int] | None = None) -> Read:
        """One step from the last known token of some rows; None: of all."""
        self.prefill, rows = False, self.rows if rows is None else rows
        pairs = self._entering(rows)
        self.way.begin([state for _, state in pairs], [row for group, _ in pairs for row in group])
        return self._with_tests() if rows else self.unread()

    def _entering(self, rows: list[int]) -> list[tuple[list[int], State]]:
        """Their last known tokens before the first block, those at the same position together."""
        groups = self.by_length(rows)
        if self.model.fused and 1 < len(groups) == len(rows) and self.context.padding is None:
            slots = [length - 1 for length in groups]
            states = self.model.start_each(self.buffer[rows, slots][:, None], self.context, rows, slots)
            return [([row], state) for row, state in zip(rows, states, strict=True)]
        return [(some, self.start(some, length - 1, length)) for length, some in groups.items()]

    def start(self, rows: list[int], begin: int, end: int) -> State:
        """Some of the known tokens of rows before the first block."""
        chosen = as_rows(rows, self.buffer.device)
        return self.model.start(self.buffer[chosen, begin:end], context=self.context, rows=chosen, slot=begin)

    def by_length(self, rows: list[int]) -> dict[int, list[int]]:
        """Rows that stand at the same position, by how many of their tokens are known."""
        lengths = dict.fromkeys(self.lengths[row] for row in rows)
        return {length: [row for row in rows if self.lengths[row] == length] for length in lengths}

    def unread(self) -> Read:
        """What a step begins with."""
        batch = len(self.buffer)
        return Read([0] * batch, [math.nan] * batch, [self.pad] * batch, [True] * batch, [math.nan] * batch)

    def made(self, row: int) -> int:
        """How many tokens of a row are known behind its prompt."""
        return self.lengths[row] - self.prompts[row]

    def threshold(self, layer: int, row: int) -> float:
        """What the confidence of a row's next token has to lie above to leave after `layer`."""
        if row in self.taus:
            return self.taus[row]
        return self.plan.threshold(layer, self.made(row), self.limits[row])

    def _position(self, rows: list[int]) -> int | Tensor:
        """Positions of rows' next tokens, counted from the first generated one: one for all if they are the same."""
        places = [self.made(row) for row in rows]
        return places[0] if len(set(places)) == 1 else torch.tensor(places, device=self.buffer.device)

    def _with_tests(self) -> Read:
        plan, way, read = self.plan, self.way, self.unread()
        if not plan.thresholds:
            self._finish(read, None)
            return read
        reader = Reader(
            self.model, plan, self.measure, self.ledger, self.protected, way.rows, self._position(way.rows),
            scores=not self.best_only, frequent=self.frequent,
        )  # fmt: skip
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
            later = next((e for e in plan.thresholds if e > layer), None)
            reader.after(exit, confidences, later)
        self._finish(read, reader)
        return read

    def _leaving(self, layer: int, exit: Exit, confidences: list[float]) -> list[int]:
        """Which of the rows still in leave after `layer`."""
        gone = [
            i for i, (row, c) in enumerate(zip(self.way.rows, confidences, strict=True))
            if c > self.threshold(layer, row)
        ]  # fmt: skip
        return [] if self.plan.policy.batch == "all" and len(gone) < len(confidences) else gone

    def _take(self, read: Read, rows: list[int], layer: int, exit: Exit, index: list[int]) -> None:
        """Enter what rows that leave at an exit are read as."""
        for row in rows:
            read.layers[row] = layer
        if self.best_only:
            return self._take_best(read, rows, exit.best(index))
        self._take_scores(read, rows, exit.emission(index))
        if exit.restricted:
            if read.states is None:
                read.states = exit.input.new_zeros(len(self.buffer), exit.input.shape[1])
            read.states[rows] = exit.input[index]

    def _take_best(self, read: Read, rows: list[int], best: Best) -> None:
        lists = best.tokens.tolist(), best.values.tolist(), best.normaliser.tolist()
        for row, (token, _), (value, _), normaliser in zip(rows, *lists, strict=True):
            read.token[row], read.sound[row] = token, math.isfinite(normaliser)
            read.logprob[row] = value - normaliser

    def _take_scores(self, read: Read, rows: list[int], scores: Tensor) -> None:
        if rows == list(range(len(self.buffer))):
            read.scores = scores
            return
        read.scores = scores.new_zeros(len(self.buffer), scores.shape[1]) if read.scores is None else read.scores
        read.scores[rows] = scores

    def _finish(self, read: Read, reader: Reader | None) -> None:
        way, plan = self.way, self.plan
        if reader is not None and plan.policy.decode_from == "contrastive" and plan.policy.contrast.full:
            way.advance(plan.last)
            reader.whole()
            exit = reader.at(plan.last, way.read)
            self._take(read, way.rows, plan.last, exit, list(range(len(way.rows))))
        else:
            self.read_last(read)

    def read_last(self, read: Read) -> None:
        """Take the rows still in to the last layer, and read them out there."""
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
        if n > 1 and self.adaptive is not None:
            for row, deep in zip(rows, choices.view(len(rows), n).tolist(), strict=True):
                self.adaptive.learn(self.shallow[row], deep)
        for row in rows:
            self.shallow[row].clear()

    def choose(self, read: Read, length: int, rows: list[int] | None = None) -> None:
        """The tokens of rows whose first `length` tokens are known; None: of all rows.

        Where the processors left no kept token (they forbade all, or demand one that was pruned), the full vocabulary
        is read at the same exit. Processors of all rows see the whole batch: some go by the number of a row.
        """
        if read.scores is None:  # they are the best ones, or none was drafted
            return
        some = rows or list(range(len(self.buffer)))
        for part in [some] if self.together else [[row] for row in some]:
            self._choose(read, length, part, self.samplers[part[0]], slice(None) if self.together else part)

    def _choose(self, read: Read, length: int, rows: list[int], sampler: Sampler, seen: Any) -> None:
        assert read.scores is not None
        ids, scores = self.buffer[seen, :length], read.scores[seen]
        processed = sampler.process(ids, scores)
        if read.states is not None and sampler.processors is not None:
            empty = (processed.amax(-1) == -torch.inf) & self.active[seen]
            if bool(empty.any()):
                with self.ledger.time("readout"):
                    full = self.model.project(read.states[seen]).float()
                self.ledger.readout(len(full))
                processed = sampler.process(ids, torch.where(empty[:, None], full, scores))
        if len(processed) == len(self.buffer) == len(rows):
            read.processed = processed
        else:
            read.processed = torch.zeros_like(read.scores) if not len(read.processed) else read.processed
            processed = processed if len(processed) == len(rows) else processed[rows]
            scores = scores if len(scores) == len(rows) else scores[rows]
            read.processed[rows] = processed
        picked = sampler.pick(processed)
        sound = sampler.sound(scores, picked)
        for row, token, right in zip(rows, picked.tolist(), sound.tolist(), strict=True):
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
        if len(rows) < len(tokens):
            tokens = [t if row in counted else self.pad for row, t in enumerate(tokens)]
            layers = [layer if row in counted else 0 for row, layer in enumerate(layers)]
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
        ended = {row for row in rows if self.samplers[row].is_end(tokens[row])}
        if self.together and (stopping := self.samplers[0].stopping) is not None:
            stops = stopping(self.buffer[:, : length + 1]).tolist()
            ended |= {row for row in rows if stops[row]}
        return [row for row in rows if row in ended or length + 1 - self.prompts[row] >= self.limits[row]]

    def end(self, rows: list[int]) -> None:
        """These rows are finished."""
        if not rows:
            return
        self.rows = [row for row in self.rows if row not in rows]
        self.active[rows] = False
        for row in rows if isinstance(self.way, Defer) or not self.together else ():
            self.way.forget(row)

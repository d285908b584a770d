"""Readouts of one token at growing depth, computed when a measure asks for them and reused by later tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from offramp.core.confidence import Confidence, TokenConfidence, begun, require_learned
from offramp.core.costs import Ledger
from offramp.core.plan import Plan, resolve
from offramp.core.policy import DRAFTER, ExitPolicy
from offramp.core.vocabulary import Frequent, Kept, require_frequent
from offramp.families import SplitModel
from offramp.families.readouts import Best, best_of


def measure_of(model: SplitModel, plan: Plan) -> Confidence | None:
    """The plan's measure, from the model's exits where they bring it.

    Returns:
        The measure; None if no test is made.

    Raises:
        ValueError: Single rows of the head are wanted but cannot be had, or classifiers or a posterior that it has not.
    """
    if (plan.pruning is not None or plan.frequent) and not model.head_is_plain:
        kind = type(model.head).__name__
        raise ValueError(
            f"vocabulary is {plan.policy.vocabulary!r}, but single rows of the head, a {kind}, cannot be read; "
            "use vocabulary=None, or merge adapters and dequantise first"
        )
    if DRAFTER in plan.thresholds and (model.exits is None or model.exits.drafter is None):
        raise ValueError(
            "the policy drafts before the first block (layer 0), but the model's exits have no drafter; train one "
            "with: offramp train --trainable drafter"
        )
    if plan.measure is None and plan.thresholds:
        return require_learned(model.exits, str(plan.policy.confidence), plan)
    return plan.measure


def check_prompt(model: SplitModel, policy: ExitPolicy) -> None:
    """Raise a ValueError if a policy would shorten the prompt of a decoder that has none."""
    if policy.prompt_layer is not None and model.is_encoder_decoder:
        raise ValueError(
            f"prompt_layer is {policy.prompt_layer}, but the decoder of an encoder-decoder has no prompt to shorten; "
            "leave prompt_layer away"
        )


def require_fit(model: SplitModel, policy: ExitPolicy | None) -> None:
    """Refuse a policy that a model, or the exits it has, cannot follow, before anything is decoded.

    Raises:
        ValueError: What `measure_of` refuses; or layers, sizes or a prompt that the model has not, or a list of
            frequent tokens that its exits have not.
    """
    if policy is None:
        return
    plan = resolve(policy, model.num_layers, model.shape.vocabulary, model.exit_layers)
    check_prompt(model, policy)
    measure_of(model, plan)
    require_frequent(model.exits, policy.vocabulary)


class Reader:
    """Reads one token step of A rows; `select` drops the rows that have left.

    Args:
        model: The model.
        plan: Where to look.
        measure: The confidence, as `measure_of` gives it.
        ledger: Where the work is written down.
        protected: Ids that pruning never drops, [P].
        rows: Which of the batch are read, A of them.
        position: Of the tokens, counted from the first generated one: one for all rows, or [A].
        scores: Whether those of all tokens are wanted where a row leaves; False: only the best.
        frequent: The tokens that are scored; None: all V, until some are kept.
    """

    def __init__(
        self,
        model: SplitModel,
        plan: Plan,
        measure: Confidence | None,
        ledger: Ledger,
        protected: Tensor,
        rows: list[int],
        position: int | Tensor = 0,
        *,
        scores: bool = True,
        frequent: Frequent | None = None,
    ) -> None:
        self.model, self.plan, self.ledger, self.protected, self.position = model, plan, ledger, protected, position
        self.rows, self.scores = rows, scores
        self.measure: TokenConfidence | None = None if measure is None else begun(measure)
        self.kept: Kept | Frequent | None = None if frequent is None else frequent.over(len(rows))
        self.previous: Tensor | None = None
        self.inputs: dict[int, Tensor] = {}  # readout inputs of candidate layers, [A, D] each
        self.earlier: dict[int, Tensor] = {}  # logits of candidate layers on the current columns, [A, K or V] each

    def capture(self, layer: int, hidden: Tensor) -> None:
        """Keep the readout input of a candidate layer."""
        self.inputs[layer] = self.input(layer, hidden)

    def input(self, layer: int, hidden: Tensor) -> Tensor:
        """Readout inputs of states [A, D] after `layer`."""
        with self.ledger.time("readout"):
            self.ledger.lens(layer, len(hidden))
            return self.model.readout_input(hidden, layer)

    def at(self, layer: int, hidden: Tensor) -> Exit:
        """The reading after `layer`, for states [A, D]."""
        return Exit(self, layer, hidden)

    def top(self, exit: Exit, index: list[int] | None = None) -> Best:
        """The best tokens at an exit, for all of its rows or some, with the logits if a later test needs them."""
        hidden, ledger, kept = exit.hidden if index is None else exit.hidden[index], self.ledger, self.kept
        wanted: Any = {"logits": self._keeps(exit.layer), "inputs": exit.layer == DRAFTER}
        if not self.model.fused:
            return best_of(self.project(exit.input if index is None else exit.input[index]), exit.names)
        ledger.lens(exit.layer, len(hidden))
        if kept is None:
            ledger.readout(len(hidden))
            with ledger.time("readout"):
                return self.model.best(hidden, exit.layer, **wanted)
        ledger.pruned_readout(len(hidden), kept.ids.shape[1], shared=kept.shared)
        with ledger.time("pruned_readout"):
            rows: Any = kept.gather(self.model)
            rows = rows.only(kept.scored) if kept.ragged else rows
            return self.model.best(hidden, exit.layer, rows, **wanted)

    def _keeps(self, layer: int) -> bool:
        """Whether the logits of a test after `layer` are needed: as scores, or to rank tokens for a later test."""
        return self.scores or (self.plan.pruning is not None and any(later > layer for later in self.plan.thresholds))

    def after(self, exit: Exit, confidences: list[float], next_layer: int | None) -> None:
        """Prepare the test at `next_layer` (None: there is none): remember the state, and which tokens to score."""
        self.previous = exit.hidden
        pruning = self.plan.pruning
        if pruning is None or next_layer is None or not exit.judged:
            return
        kept = self.kept
        have = kept.sizes if isinstance(kept, Kept) else [pruning.first_size()] * len(confidences)
        sizes = [pruning.next_size(next_layer, size, c) for size, c in zip(have, confidences, strict=True)]
        if isinstance(kept, Kept) and sizes == have:
            return
        with self.ledger.time("select"):
            if kept is None:
                self.kept = Kept.best(exit.logits, sizes, self.protected, self.model.rank)
            else:
                self.kept = kept.shrunk(exit.logits, sizes)
                self._bill_copy(self.kept)
        self.earlier.clear()

    def whole(self) -> None:
        """Score all tokens from now on."""
        self.kept = None
        self.earlier.clear()

    def select(self, index: list[int]) -> None:
        """Keep some of the A rows."""
        self.rows = [self.rows[i] for i in index]
        rows = torch.tensor(index, device=self.protected.device)
        self.kept = None if self.kept is None else self.kept.select(index)
        self.previous = None if self.previous is None else self.previous[rows]
        self.position = self.position if isinstance(self.position, int) else self.position[rows]
        self.inputs = {layer: x[rows] for layer, x in self.inputs.items()}
        self.earlier = {layer: z[rows] for layer, z in self.earlier.items()}
        if self.measure is not None:
            self.measure.select(rows)

    def project(self, x: Tensor) -> Tensor:
        """Logits in float32 of readout inputs [A, D], on the kept tokens if there are any."""
        ledger = self.ledger
        if self.kept is None:
            with ledger.time("readout"):
                ledger.readout(len(x))
                return self.model.project(x).float()
        if self.kept.rows is None:
            with ledger.time("select"):
                self.kept.gather(self.model)
                self._bill_copy(self.kept)
        with ledger.time("pruned_readout"):
            ledger.pruned_readout(len(x), self.kept.ids.shape[1], shared=self.kept.shared)
            return self.kept.mask(self.model.project(x, self.kept.rows))

    def _bill_copy(self, kept: Kept) -> None:
        if not self.model.fused:
            self.ledger.gather(*kept.ids.shape)


class Exit:
    """One exit of one token step: what a confidence measure sees (see `offramp.core.confidence.Reading`)."""

    def __init__(self, reader: Reader, layer: int, hidden: Tensor) -> None:
        self.reader, self.layer, self.hidden = reader, layer, hidden
        self.num_layers = reader.plan.num_layers
        self.candidates = tuple(c for c in reader.plan.candidates if c < layer)
        self.previous, self.position, self.rows = reader.previous, reader.position, reader.rows
        self.columns = reader.kept
        self.judged = False  # whether the measure read the logits
        self._logits: Tensor | None = None
        self._top: Best | None = None
        self._input: Tensor | None = None

    @property
    def input(self) -> Tensor:
        """The readout input, [A, D]."""
        if self._input is None:
            self._input = self.reader.input(self.layer, self.hidden)
        return self._input

    @property
    def logits(self) -> Tensor:
        """Logits in float32, [A, V], or [A, K] with the kept tokens of pruning."""
        if self._logits is None:
            self._logits = self.reader.project(self.input)
        return self._logits

    @property
    def top(self) -> Best:
        """The two best tokens and the normaliser, [A, 2] and [A]; with no logits moved where the engine can do so."""
        if self._top is None:
            self._top = self.reader.top(self) if self._logits is None else best_of(self._logits, self.names)
            self._logits, self._input = self._top.logits, self._input if self._top.inputs is None else self._top.inputs
        return self._top

    def confidence(self) -> list[float]:
        """The measure's values of the A rows, at most 1, moved to the host: the one synchronisation of a test."""
        measure = self.reader.measure
        assert measure is not None
        with self.reader.ledger.time("confidence"):
            values = [c if math.isnan(c) else max(-1.0, min(1.0, c)) for c in self.reader.model.told(measure(self))]
        self.judged = self._logits is not None or self._top is not None
        scored = self.reader.plan.vocabulary if self.columns is None else self.columns.ids.shape[1]
        pruned = self.reader.plan.pruning is not None
        self.reader.ledger.test(len(values), scored if self.judged else None, pruned=pruned)
        return values

    @property
    def kept(self) -> bool:
        """Whether `logits` are those of a pruned set."""
        return self.columns is not None

    @property
    def ids(self) -> Tensor | None:
        """Token ids of the columns, [A, K]; None: all V, in order."""
        return None if self.columns is None else self.columns.ids

    @property
    def names(self) -> Tensor | None:
        """The same as `best_of` takes them: once where they are the same for all rows, [K]."""
        return self.columns.tokens if isinstance(self.columns, Frequent) else self.ids

    @property
    def unread(self) -> bool:
        """Whether the measure needed no logits, and those who leave can be read alone."""
        return self._logits is None and self._top is None and (self.columns is None or self.columns.shared)

    def of(self, ids: Tensor) -> Tensor:
        """Logits of tokens [A, k]; -inf for those that were not scored."""
        columns, vocabulary = self.columns, self.reader.plan.vocabulary
        return (self.logits if columns is None else columns.scatter(self.logits, vocabulary)).gather(1, ids)

    def bill(self, flops: int, shared: int, own: int = 0) -> None:
        """Write down FLOPs per row, bytes read for all rows and per row."""
        self.reader.ledger.confidence(len(self.hidden), flops, shared, own)

    @property
    def restricted(self) -> bool:
        """Whether `emission` leaves tokens out: those that pruning or a set of tokens excludes."""
        return self.kept or (self.reader.measure is not None and self.reader.measure.restricts)

    def plausible(self) -> Tensor | None:
        """Which columns survive pruning, bool [A, K or V]; None without pruning."""
        pruning = self.reader.plan.pruning
        if self.columns is not None:
            return self.columns.scored
        if pruning is None:
            return None
        kept = Kept.best(self.logits, [pruning.first_size()] * len(self.logits), self.reader.protected)
        return torch.zeros_like(self.logits, dtype=torch.bool).scatter(1, kept.ids, value=True)

    def earlier(self, layer: int, columns: Tensor | None = None) -> Tensor:
        """Logits of candidate `layer`, [A, K or V], or on some columns only, [A, M]."""
        reader = self.reader
        if layer in reader.earlier:
            logits = reader.earlier[layer]
            return logits if columns is None else logits.gather(1, columns)
        x = reader.inputs[layer]
        if columns is None:
            reader.earlier[layer] = reader.project(x)
            return reader.earlier[layer]
        if not reader.model.head_is_plain:
            return self.earlier(layer).gather(1, columns)
        ids = columns if self.columns is None else self.columns.ids.gather(1, columns)
        with reader.ledger.time("select"):
            rows = reader.model.gather(ids)
            reader.ledger.gather(*ids.shape)
        with reader.ledger.time("pruned_readout"):
            reader.ledger.pruned_readout(*ids.shape)
            return reader.model.project(x, rows).float()

    def selected(self, index: list[int]) -> Exit:
        """The rows that stay, after `Reader.select` has dropped the others."""
        exit = Exit(self.reader, self.layer, self.hidden[index])
        exit._logits = None if self._logits is None else self._logits[index]
        exit.judged = self.judged
        return exit

    def best(self, index: list[int]) -> Best:
        """The best tokens of the rows that leave here."""
        if self.unread:
            found = self.reader.top(self, index)
            if found.inputs is not None and len(index) == len(self.hidden):
                self._input = found.inputs
            return found
        top = self.top
        return (
            top if len(index) == len(top.tokens) else Best(top.values[index], top.tokens[index], top.normaliser[index])
        )

    def emission(self, index: list[int]) -> Tensor:
        """Scores over all V tokens, float32, of the rows that leave here, [len(index), V]."""
        plan = self.reader.plan
        plain = plan.policy.decode_from == "logits"
        if plain and self.unread:
            scores = self.reader.project(self.input if len(index) == len(self.hidden) else self.input[index])
        else:
            scores = self.logits
        if plan.policy.decode_from == "contrastive":
            with self.reader.ledger.time("confidence"):
                scores = plan.measure.scores(self).log()  # type: ignore[union-attr]
        if len(index) < len(scores):
            scores = scores[index]
        if self.columns is not None:
            columns = self.columns if len(index) == len(self.hidden) else self.columns.select(index)
            with self.reader.ledger.time("select"):
                scores = columns.scatter(scores, plan.vocabulary)
        if (measure := self.reader.measure) is not None and measure.restricts:
            scores = measure.among(scores, torch.tensor(index, device=scores.device))
        return scores

"""A threshold for each exit layer, from examples that certify nothing: a family with one parameter.

Each token of the full model's answers is tested after every exit layer, as the policy would, without letting it leave.
At a share q, the threshold of layer l is the q-quantile of the confidences there of *wrong* tokens, whose readout chose
another token than the full model: a share q of the wrong ones stays in, and all that are surer leave. Falling q gives
falling thresholds in every layer. A layer that is never wrong has the smallest threshold there is. What is certified
is q; since thresholds are fixed before, from other examples, the certificate holds however well they fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from offramp.core.confidence import RANGES, Confidence, Contrastive, TokenConfidence, begun
from offramp.core.generation_options import greedy
from offramp.core.plan import resolve
from offramp.core.policy import ExitPolicy
from offramp.core.readout import measure_of

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.tasks import Example, Task

Seen = list[tuple[int, float, int]]
"""Tests of one token: (layer, confidence, the token that would have been chosen)."""


@dataclass(frozen=True)
class _Watched:
    """A measure that also writes down what it was asked; for one sequence at a time."""

    measure: Confidence
    seen: Seen

    def __call__(self, reading: Any) -> Tensor:
        return self.begin()(reading)

    def begin(self) -> _WatchedToken:
        return _WatchedToken(begun(self.measure), self.seen)


@dataclass
class _WatchedToken:
    """The same within one token step."""

    measure: TokenConfidence
    seen: Seen

    @property
    def restricts(self) -> bool:
        return self.measure.restricts

    def __call__(self, reading: Any) -> Tensor:
        return _watch(reading, self.measure(reading), self.seen)

    def select(self, rows: Tensor) -> None:
        self.measure.select(rows)

    def among(self, scores: Tensor, rows: Tensor) -> Tensor:
        return self.measure.among(scores, rows)


@dataclass(frozen=True)
class _WatchedContrastive(Contrastive):
    """The same for a contrastive measure: of its type, by which decoding knows that earlier layers are needed."""

    seen: Seen

    def __call__(self, reading: Any) -> Tensor:
        return _watch(reading, super().__call__(reading), self.seen)


def _watch(reading: Any, confidence: Tensor, seen: Seen) -> Tensor:
    seen.append((reading.layer, float(confidence), int(reading.emission([0]).argmax())))
    return confidence


def layer_thresholds(
    lm: LanguageModel,
    task: Task,
    examples: Sequence[Example],
    policy: ExitPolicy,
    shares: Sequence[float],
    *,
    max_new_tokens: int,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    gather: Callable[[list[float]], list[float]] = list,
) -> list[tuple[float, ...]]:
    """Thresholds for each share, from examples that are used for nothing else but choosing.

    Args:
        lm: The model.
        task: How to ask.
        examples: To be answered by the full model.
        policy: What tests: its measure, exits and pruning; its thresholds do not matter.
        shares: Of the wrong tokens to keep in, in [0, 1].
        max_new_tokens: Longest answer.
        settings: Further options of `LanguageModel.stream`.
        progress: Called with the number of examples done.
        gather: Adds to some values those that other processes found on their examples.

    Returns:
        For each share, one threshold per exit of the policy.

    Raises:
        ValueError: The policy does not test anything.
    """
    exits = tuple(resolve(policy, lm.num_layers, lm.vocabulary, lm.split.exit_layers).thresholds)
    wrong: dict[int, list[float]] = {layer: [] for layer in exits}
    seen: Seen = []
    watching = _watching(lm, policy, seen)
    for done, example in enumerate(examples):
        if progress is not None:
            progress(done)
        options = {"max_new_tokens": max_new_tokens, **(settings or {})}
        for step in lm.stream(task.prompts(lm, [example]), policy=watching, **greedy(options)):
            for layer, confidence, token in seen:
                if token != int(step.token[0]) and not math.isnan(confidence):
                    wrong[layer].append(confidence)
            seen.clear()
    wrong = {layer: gather(values) for layer, values in wrong.items()}
    lowest = RANGES[str(policy.confidence)][0]
    table = [
        [
            min(float(np.quantile(wrong[layer], share, method="higher")), 1.0) if wrong[layer] else lowest
            for layer in exits
        ]
        for share in shares
    ]
    return [tuple(row) for row in table]


def _watching(lm: LanguageModel, policy: ExitPolicy, seen: Seen) -> ExitPolicy:
    """The policy with its measure watched and no token leaving: no confidence is above 1."""
    plan = resolve(policy, lm.num_layers, lm.vocabulary, lm.split.exit_layers)
    measure = measure_of(lm.decoder, plan)
    if measure is None:
        raise ValueError(f"a policy with confidence {policy.confidence!r} tests nothing; it has no thresholds")
    watched: Confidence = _Watched(measure, seen)
    if isinstance(measure, Contrastive):
        watched = _WatchedContrastive(measure.options, measure.discounted, seen)
    return replace(
        policy, confidence=watched, threshold=1.0, decode_from="logits", decay=None, skipped="propagate", batch="rows"
    )

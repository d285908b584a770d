"""A threshold for each exit layer, from examples that certify nothing: families with one parameter.

Each token of the full model's answers is tested after every exit layer, as the policy would, without letting it leave.
A token is *wrong* at a layer if its readout there chose another token than the full model. Two rules make thresholds:

"share": at a share q, the threshold of layer l is the q-quantile of the confidences there of wrong tokens: a share q of
the wrong ones stays in, and all that are surer leave. Falling q gives falling thresholds in every layer.

"gain": at a price λ, a token leaves after layer l where p(wrong | confidence) < λ · s, with s the FLOPs that leaving
there saves, as a share of what a token costs in the full model: the Lagrangian of "as little disagreement as possible
for the FLOPs". p is fitted to the tokens of each layer as the nonincreasing step function that is nearest to them
(isotonic regression), so that rising λ gives falling thresholds in every layer. It looks at each layer alone: tokens
that would have left before are not taken out, and what a token could still save later is not held against it.

A layer that is never wrong has the smallest threshold there is. What is certified is the parameter; since thresholds
are fixed before, from other examples, the certificate holds however well they fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offramp.core.confidence import RANGES, Confidence, Contrastive, TokenConfidence, begun
from offramp.core.costs import exit_flops, saved_flops
from offramp.core.generation_inputs import greedy
from offramp.core.plan import Plan, resolve
from offramp.core.policy import ExitPolicy
from offramp.core.readout import measure_of

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.tasks import Example, Task

RULES = ("share", "gain")
Tests = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""Confidences of a layer's tests, and which of them were wrong, [N] each."""
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
    knobs: Sequence[float],
    *,
    rule: str = "share",
    max_new_tokens: int,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    gather: Callable[[list[float]], list[float]] = list,
) -> list[tuple[float, ...]]:
    """Thresholds for each share or price, from examples that are used for nothing else but choosing.

    Args:
        lm: The model.
        task: How to ask.
        examples: To be answered by the full model.
        policy: What tests: its measure, exits and pruning; its thresholds do not matter.
        knobs: Under "share", shares of the wrong tokens to keep in, in [0, 1]; under "gain", prices λ from 0 on.
        rule: One of `RULES`.
        max_new_tokens: Longest answer.
        settings: Further options of `LanguageModel.stream`.
        progress: Called with the number of examples done.
        gather: Adds to some values those that other processes found on their examples, in the same order each time.

    Returns:
        For each knob, one threshold per exit of the policy.

    Raises:
        ValueError: The policy does not test anything.
    """
    plan = resolve(policy, lm.num_layers, lm.vocabulary, lm.split.exit_layers)
    tests: dict[int, list[tuple[float, bool]]] = {layer: [] for layer in plan.thresholds}
    seen: Seen = []
    watching = _watching(lm, policy, seen)
    for done, example in enumerate(examples):
        if progress is not None:
            progress(done)
        options = {"max_new_tokens": max_new_tokens, **(settings or {})}
        for step in lm.stream(task.prompts(lm, [example]), policy=watching, **greedy(options)):
            for layer, confidence, token in seen:
                if not math.isnan(confidence):
                    tests[layer].append((confidence, token != int(step.token[0])))
            seen.clear()
    lowest = RANGES[str(policy.confidence)][0]
    found = {layer: _together(some, gather) for layer, some in tests.items()}
    if rule == "share":
        return [tuple(by_share(found[layer], share, lowest) for layer in found) for share in knobs]
    saved = saved_shares(lm, plan)
    return [tuple(by_gain(found[layer], price * saved[layer], lowest) for layer in found) for price in knobs]


def _together(tests: Sequence[tuple[float, bool]], gather: Callable[[list[float]], list[float]]) -> Tests:
    confidences, wrong = (gather([float(test[column]) for test in tests]) for column in (0, 1))
    return np.array(confidences, dtype=np.float64), np.array(wrong, dtype=bool)


def by_share(tests: Tests, share: float, lowest: float) -> float:
    """The threshold above which all but a share of a layer's wrong tokens stay in; `lowest` if none is wrong."""
    confidences, wrong = tests
    return min(float(np.quantile(confidences[wrong], share, method="higher")), 1.0) if wrong.any() else lowest


def by_gain(tests: Tests, most: float, lowest: float) -> float:
    """The threshold above which a layer's tokens are wrong with a probability below `most`.

    Args:
        tests: Of the layer.
        most: λ · s.
        lowest: The smallest threshold there is, for a layer where all may leave.

    Returns:
        The largest confidence seen that is too often wrong; 1, at which none leaves, where nothing was seen.
    """
    confidences, wrong = tests
    if not len(confidences):
        return 1.0
    values, place = np.unique(confidences, return_inverse=True)
    counts = np.bincount(place)
    dear = values[_falling(np.bincount(place, wrong) / counts, counts) >= most]
    return min(float(dear[-1]), 1.0) if len(dear) else lowest


def _falling(shares: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """The nonincreasing values that are nearest to shares, each weighted by its count: neighbours are pooled."""
    blocks: list[list[float]] = []  # mean, count, values
    for share, count in zip(shares.tolist(), counts.tolist(), strict=True):
        blocks.append([share, count, 1])
        while len(blocks) > 1 and blocks[-2][0] <= blocks[-1][0]:
            mean, weight, size = blocks.pop()
            last = blocks[-1]
            last[0] = (last[0] * last[1] + mean * weight) / (last[1] + weight)
            last[1], last[2] = last[1] + weight, last[2] + size
    return np.repeat([block[0] for block in blocks], [int(block[2]) for block in blocks])


def saved_shares(lm: LanguageModel, plan: Plan) -> dict[int, float]:
    """FLOPs that a token saves by leaving after each exit, as shares of what it costs in the full model."""
    shape, exits = lm.split.shape, tuple(plan.thresholds)
    listed = None if lm.exits is None else lm.exits.frequent
    kept = len(listed) if plan.frequent and listed is not None else None
    if plan.pruning is not None:
        kept = min(plan.pruning.first_size(), kept or shape.vocabulary)
    scored = plan.policy.confidence not in ("state", "classifier")
    whole = exit_flops(shape, len(shape.blocks), None)
    return {layer: saved_flops(shape, layer, exits, kept, scored=scored) / whole for layer in exits}


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

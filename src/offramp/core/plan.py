"""A policy for one model: which layers are read, against which threshold, on which vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from offramp.core.confidence import LEARNED, MEASURES, Confidence, Contrastive, certain
from offramp.core.policy import ExitPolicy
from offramp.core.vocabulary import Pruning, rule_of


@dataclass(frozen=True)
class Plan:
    """An `ExitPolicy` for one model.

    Attributes:
        policy: The policy.
        num_layers: L.
        vocabulary: V.
        last: The deepest layer a token may need: L, or the exit of a static policy.
        thresholds: Threshold by exit layer, ascending; empty if no test is ever made.
        measure: The confidence measure; None if no test is made, or if it is one that a model's exits bring.
        pruning: Sizes of the pruned vocabulary; None without pruning.
        candidates: Earlier layers a contrastive measure may look at, whatever the exit.
        min_layer: The first exit.
        frequent: Whether tests score the exits' frequent tokens only; later ones may prune further.
    """

    policy: ExitPolicy
    num_layers: int
    vocabulary: int
    last: int
    thresholds: Mapping[int, float]
    measure: Confidence | None
    pruning: Pruning | None
    candidates: tuple[int, ...]
    min_layer: int
    frequent: bool = False

    def with_candidates(self) -> Plan:
        """This plan with the layers its measure looks back at."""
        options = self.policy.contrast
        if not isinstance(self.measure, Contrastive):
            return self
        exits = [*self.thresholds, *([self.num_layers] if options.full else [])]
        if not self.measure.discounted:
            layers = {options.amateur or exit // 2 for exit in exits}
        elif options.candidates == "all":
            layers = set(range(2, max(exits, default=0), options.stride or 1))
        else:
            layers = set(options.below(self.min_layer))
        if options.amateur is not None and not 1 <= options.amateur < self.num_layers:
            raise ValueError(f"contrast amateur is {options.amateur}; earlier layers are 1..{self.num_layers - 1}")
        return replace(self, candidates=tuple(sorted(layer for layer in layers if layer >= 1)))

    @property
    def stops(self) -> tuple[int, ...]:
        """Layers after which something is read: exits and candidates, ascending."""
        return tuple(sorted({*self.thresholds, *(c for c in self.candidates if c < self.last)}))

    def scored_later(self, frequent: int | None) -> int | None:
        """Tokens that a test after the first one scores at most, if the first one scores `frequent`; None: all V."""
        if self.pruning is None:
            return frequent
        return min(self.pruning.first_size(), frequent or self.vocabulary)

    def threshold(self, layer: int, position: int, max_new_tokens: int) -> float:
        """τ(l, t) for the token at `position` (from 0) of at most `max_new_tokens` (see `ExitPolicy.decay`)."""
        tau = self.thresholds[layer]
        if self.policy.decay is None or math.isinf(tau):
            return tau
        fade = math.exp(-self.policy.decay_rate * position / max_new_tokens)
        if self.policy.decay == "multiplicative":
            return 0.9 * tau + 0.1 * tau * fade
        return min(1.0, max(0.0, 0.9 * tau + 0.1 * fade))


def resolve(policy: ExitPolicy, num_layers: int, vocabulary: int, exits: tuple[int, ...] = ()) -> Plan:
    """A policy for a model of L layers and V tokens, with trained exits after layers `exits`.

    Returns:
        What decoding follows, with all defaults filled in.

    Raises:
        ValueError: A layer is outside 1..L-1, the vocabulary size above V, or the thresholds do not fit the exits.
    """
    if exits and policy.min_layer is None and policy.exit_layers is None:
        return resolve(replace(policy, exit_layers=exits), num_layers, vocabulary)
    if num_layers < 2 and policy == ExitPolicy(threshold=None):
        return Plan(policy, num_layers, vocabulary, num_layers, {}, None, None, (), num_layers)
    if num_layers < 2:
        raise ValueError(f"a model of {num_layers} layer has no earlier layer to exit from")
    first = _first(policy, num_layers, vocabulary)
    if policy.confidence == "static" and policy.skipped != "verify":
        return Plan(policy, num_layers, vocabulary, first, {}, None, None, (), first)
    if policy.confidence == "static":
        tests = {first: -math.inf}
        return Plan(policy, num_layers, vocabulary, num_layers, tests, certain, None, (), first, policy.frequent)
    tested = _exits(policy, first, num_layers)
    pruning = None
    if (rule := rule_of(policy.vocabulary)) is not None:
        pruning = Pruning(
            rule, vocabulary, num_layers, tested[0], policy.vocabulary_size, policy.vocabulary_floor,
            policy.vocabulary_start, policy.vocabulary_shrink, policy.vocabulary_recursive,
        )  # fmt: skip
    thresholds = _thresholds(policy, tested)
    measure = _measure(policy)
    first = tested[0]
    plan = Plan(policy, num_layers, vocabulary, num_layers, thresholds, measure, pruning, (), first, policy.frequent)
    return plan.with_candidates()


def _first(policy: ExitPolicy, num_layers: int, vocabulary: int) -> int:
    """The first layer after which a token may leave; whole numbers of the policy are checked against the model's."""
    first, last = policy.min_layer, num_layers - 1
    if first is None:
        first = policy.exit_layers[0] if policy.exit_layers else max(1, num_layers // 2)
    if not (policy.drafter or 1 <= first <= last):
        raise ValueError(f"min_layer is {first}; a model of {num_layers} layers can exit after layers 1..{last}")
    if policy.prompt_layer is not None and not 1 <= policy.prompt_layer <= num_layers:
        raise ValueError(f"prompt_layer is {policy.prompt_layer}; the model's layers are 1..{num_layers}")
    if policy.vocabulary_size is not None and policy.vocabulary_size > vocabulary:
        raise ValueError(f"vocabulary_size is {policy.vocabulary_size}; the model has {vocabulary} tokens")
    return first


def _measure(policy: ExitPolicy) -> Confidence | None:
    """The measure, unless the model's exits bring it."""
    if callable(policy.confidence):
        return policy.confidence
    return None if policy.confidence in LEARNED else MEASURES[policy.confidence](policy.contrast)


def _exits(policy: ExitPolicy, first: int, num_layers: int) -> tuple[int, ...]:
    """The layers to test after, from `first` on."""
    exits, last = policy.exit_layers, num_layers - 1
    if exits is None:
        exits = (first,) if policy.adaptive or policy.drafter else tuple(range(first, num_layers))
    if not exits or list(exits) != sorted(set(exits)) or not first <= exits[0] <= exits[-1] <= last:
        raise ValueError(
            f"exit_layers is {exits}; allowed are ascending layers in {first}..{last} (from min_layer to the last "
            f"but one); layer {num_layers} is always an exit, leave it out"
        )
    return exits


def _thresholds(policy: ExitPolicy, exits: tuple[int, ...]) -> dict[int, float]:
    """Thresholds by exit layer; no exits at all if none can ever be passed."""
    threshold = policy.threshold
    if threshold is None:
        return {}
    if not isinstance(threshold, tuple):
        return dict.fromkeys(exits, float(threshold))
    if len(threshold) != len(exits):
        raise ValueError(
            f"threshold has {len(threshold)} values for {len(exits)} exits (after layers {exits[0]}.."
            f"{exits[-1]}); give one number, or one per exit"
        )
    return dict(zip(exits, map(float, threshold), strict=True))

"""A policy for one model: which layers are read, against which threshold, on which vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offramp.confidence import Confidence, Contrastive
from offramp.vocabulary import Pruning

if TYPE_CHECKING:
    from offramp.policy import ExitPolicy


@dataclass(frozen=True)
class Plan:
    """An `ExitPolicy` for one model.

    Attributes:
        policy: The policy.
        num_layers: L.
        vocabulary: V.
        last: The deepest layer a token may need: L, or the exit of a static policy.
        thresholds: Threshold by exit layer, ascending; empty if no test is ever made.
        measure: The confidence measure; None if no test is made.
        pruning: Sizes of the pruned vocabulary; None without pruning.
        candidates: Earlier layers a contrastive measure may look at, whatever the exit.
        min_layer: The first exit.
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

    def threshold(self, layer: int, position: int, max_new_tokens: int) -> float:
        """τ(l, t) for the token at `position` (from 0) of at most `max_new_tokens` (see `ExitPolicy.decay`)."""
        tau = self.thresholds[layer]
        if self.policy.decay is None or math.isinf(tau):
            return tau
        fade = math.exp(-self.policy.decay_rate * position / max_new_tokens)
        if self.policy.decay == "multiplicative":
            return 0.9 * tau + 0.1 * tau * fade
        return min(1.0, max(0.0, 0.9 * tau + 0.1 * fade))

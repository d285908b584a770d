"""How far drafts go: until one more would cost more than it is likely to bring, by the acceptance seen so far.

A cycle drafts tokens at s (the layers and readouts up to the exit) each and ends with a deep pass, which costs m more
for every draft it checks. One more draft adds a token with the probability P·p that all pending ones and this one are
right, and s + m to the cost. So a token leaves while P·p / (s + m) is above the rate of tokens per cost reached so far
(the marginal value theorem); otherwise it goes deeper, or deep. p is the share of agreement seen at this exit and this
confidence. Costs are weights read, in passes of the full model: a decoder waits for its weights. No text depends on any
of this, only how long it takes.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from offramp.core.confidence import HEADLESS
from offramp.core.plan import Plan
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

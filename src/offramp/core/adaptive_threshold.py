"""FREE's adaptive threshold: it follows how confident tokens are whose shallow and deep choices agree, or do not.

FREE as a whole (Bae et al., 2023, arXiv 2310.05424) is one exit, deferred deep layers and this threshold:

    policy = offramp.ExitPolicy(min_layer=6, skipped="defer", adaptive=True)
    for prompt in prompts:
        lm.generate(prompt, policy=policy)
    lm.adaptive_threshold(policy).value

The labels come with the deep pass: where positions that left early go through the deep layers after all, to give the
next token its keys and values, the last layer's choices are read and compared. Only that readout is extra work, billed
as `readout`. The threshold is a heuristic **without any guarantee** and depends on the order of the traffic.
`dataclasses.replace(policy, threshold=lm.adaptive_threshold(policy).value, adaptive=False)` freezes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.core.policy import ExitPolicy

GRID = tuple(0.3 + 0.6 * i / 9 for i in range(10))
"""Values τ can take after the first fit."""
_EDGE = 1e-4  # confidences are clipped to [_EDGE, 1 - _EDGE]
_FEWEST = 10  # pairs a class needs for a fit


@dataclass
class Moments:
    """Running mean and variance of confidences (Welford), and the Beta distribution that has them.

    Attributes:
        count: How many.
        mean: Their mean x̄.
        squares: Sum of their squared deviations from it.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, confidence: float) -> None:
        """Take one more confidence in, clipped to the open unit interval."""
        x = min(max(confidence, _EDGE), 1 - _EDGE)
        self.count += 1
        off = x - self.mean
        self.mean += off / self.count
        self.squares += off * (x - self.mean)

    def beta(self) -> tuple[float, float] | None:
        """Parameters a = x̄(x̄(1-x̄)/s² - 1) and b = a(1-x̄)/x̄, s² biased; None with too few values or no such Beta."""
        if self.count < _FEWEST:
            return None
        variance, widest = self.squares / self.count, self.mean * (1 - self.mean)
        if not 0 < variance < widest:
            return None
        a = self.mean * (widest / variance - 1)
        return a, a * (1 - self.mean) / self.mean


@dataclass
class AdaptiveThreshold:
    """τ, and the two moment-fitted Beta distributions it comes from: sums only, no list of pairs.

    FREE fits a mixture with labels, which is one fit per class; here "agree" is the class of that label, where FREE's
    code takes the component of the larger mean.

    Attributes:
        start: τ until the first fit. At 1 no token leaves, so nothing is ever learnt.
        zeta: ζ. τ is the first point of `GRID` at which the share of agreement is above it, or the last point.
        use_priors: Weigh the two densities by how many pairs each has (FREE's code does not).
        most_fits: After so many, τ stays.
        value: τ now.
        fits: Fits made so far.
        agree: Confidences of tokens whose shallow and deep choices agreed.
        disagree: Those of the others.
    """

    start: float
    zeta: float = 0.4
    use_priors: bool = False
    most_fits: int = 300
    value: float = field(init=False)
    fits: int = field(init=False)
    agree: Moments = field(init=False)
    disagree: Moments = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    @classmethod
    def of(cls, policy: ExitPolicy) -> AdaptiveThreshold:
        """A new one for a policy.

        Returns:
            One that has learnt nothing yet and starts at the policy's threshold.

        Raises:
            ValueError: The policy's threshold is fixed.
        """
        if not policy.adaptive or not isinstance(policy.threshold, float | int):
            raise ValueError("adaptive is False in this policy, its threshold is fixed; make it with adaptive=True")
        return cls(float(policy.threshold))

    def reset(self) -> None:
        """Forget everything learnt."""
        self.value, self.fits = self.start, 0
        self.agree, self.disagree = Moments(), Moments()

    def learnt(self) -> dict[str, Any]:
        """Everything learnt so far, as JSON values."""
        return {"value": self.value, "fits": self.fits, "agree": asdict(self.agree), "disagree": asdict(self.disagree)}

    def recall(self, learnt: Mapping[str, Any]) -> None:
        """Go on from where `learnt` was, instead of from what is known now."""
        self.value, self.fits = learnt["value"], learnt["fits"]
        self.agree, self.disagree = Moments(**learnt["agree"]), Moments(**learnt["disagree"])

    def add(self, confidences: Iterable[float], agreed: Iterable[bool]) -> None:
        """Learn from pairs; NaN confidences are none.

        Args:
            confidences: Confidences at the shallow exit.
            agreed: Whether the argmax there is the last layer's.
        """
        for confidence, same in zip(confidences, agreed, strict=True):
            if not math.isnan(confidence):
                (self.agree if same else self.disagree).add(confidence)

    def learn(self, shallow: Sequence[tuple[float, int]], deep: Sequence[int]) -> None:
        """Learn from a row's (confidence, token) at the exit and the tokens of the last layer."""
        self.add([c for c, _ in shallow], [token == d for (_, token), d in zip(shallow, deep, strict=True)])

    def refit(self) -> float:
        """Fit on all pairs so far; called where a new sequence, or batch of them, begins.

        Returns:
            τ; unchanged where a class has fewer than 10 pairs or no Beta distribution its moments.
        """
        if self.fits < self.most_fits and self.agree.beta() is not None and self.disagree.beta() is not None:
            self.fits += 1
            self.value = next((c for c in GRID if self.share(c) > self.zeta), GRID[-1])
        return self.value

    def share(self, confidence: float) -> float:
        """Share of agreement at a confidence in (0, 1): Beta_agree / (Beta_agree + Beta_disagree).

        Returns:
            The share; NaN before there can be a fit.
        """
        agree, disagree = self.agree.beta(), self.disagree.beta()
        if agree is None or disagree is None:
            return math.nan
        odds = _log_density(confidence, *agree) - _log_density(confidence, *disagree)
        if self.use_priors:
            odds += math.log(self.agree.count / self.disagree.count)
        return (1 + math.tanh(odds / 2)) / 2  # the logistic function, without overflow


def _log_density(x: float, a: float, b: float) -> float:
    """Log density of Beta(a, b) at x."""
    constant = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return constant + (a - 1) * math.log(x) + (b - 1) * math.log1p(-x)

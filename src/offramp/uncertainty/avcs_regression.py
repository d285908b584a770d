"""Confidence sequences over exits for a number: intervals from a predictive-likelihood ratio.

Jazbec et al. (2024), "Early-Exit Neural Networks with Nested Prediction Sets", section 4. With weights w_l drawn once
per exit from the posterior of a Bayesian last layer, ŵ_l = hᵀw_l, and q_l the total variance of a prediction,

    ln R_e(y) = Σ_{l<=e} [ ln N(y; m_l, q_l) - ln N(y; ŵ_l, σ_l²) ],   C_e = {y : R_e(y) <= 1/α}

which is a quadratic in y, so its ends are closed forms. These are nested sets (after `running()`) with a model-based
coverage target. R has expectation 1 only for weights drawn from a posterior that knows the row's own target, which is
unknown: 1 - α can be trusted only while K_e = Σ_{l<=e} v_l/σ_l² stays below about 0.7 (`validity`). For a guarantee
without a model: `nested_conformal`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offramp.uncertainty import bayesian_regression
from offramp.uncertainty.bayesian_regression import BayesianRegression, RegressionPrediction
from offramp.uncertainty.outputs import augmented
from offramp.uncertainty.sets import Intervals
from offramp.values import check_level

TRUSTED = 0.7
"""K up to which 1 - α is about kept, by simulation with a correct model."""


@dataclass(frozen=True)
class AVCSRegressionConfig:
    """What sequences to make.

    Attributes:
        alpha: One minus the coverage that is aimed at, in (0, 1).
        n_sequences: S, independent sequences whose intervals are intersected.
        union_bound: Give each sequence the level α/S. False is as published: α each, which no longer aims at 1 - α.
        seed: Of the drawn weights; sets of the same seed are the same.
    """

    alpha: float = 0.05
    n_sequences: int = 1
    union_bound: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_level("alpha", self.alpha)
        if self.n_sequences < 1 or self.seed < 0:
            raise ValueError(f"n_sequences is {self.n_sequences}, seed {self.seed}; at least 1 and 0 are needed")

    @property
    def level(self) -> float:
        """α of each sequence."""
        return self.alpha / self.n_sequences if self.union_bound else self.alpha


@dataclass(frozen=True)
class AVCSRegression:
    """A posterior and the weights drawn from it, the same for all rows.

    Attributes:
        posterior: Of every exit.
        draws: Weights of each exit for standardised targets, E tensors [S, m_e], float64.
        config: How they were drawn.
    """

    posterior: BayesianRegression
    draws: tuple[Tensor, ...]
    config: AVCSRegressionConfig


@dataclass(frozen=True)
class Validity:
    """Whether the coverage target can be trusted, per exit.

    Attributes:
        mean: Mean of K over the rows, [E].
        p90: Its 90th percentile, [E].
        share: Share of rows with K above `TRUSTED`, [E].
    """

    mean: tuple[float, ...]
    p90: tuple[float, ...]
    share: tuple[float, ...]

    @property
    def warning(self) -> str | None:
        """What to say about the last exit; None if K is small for all rows."""
        if not self.share[-1]:
            return None
        return (
            f"K, the summed ratio of epistemic to noise variance, is above {TRUSTED} for {self.share[-1]:.0%} of the "
            f"rows (mean {self.mean[-1]:.2f}, 90th percentile {self.p90[-1]:.2f}): the sets are nested, but their "
            "coverage target rests on the model and does not hold there; use nested conformal sets for a guarantee"
        )


def fit(posterior: BayesianRegression, config: AVCSRegressionConfig | None = None) -> AVCSRegression:
    """Draw the weights of every exit and sequence, each keyed by seed, sequence and exit."""
    config = config or AVCSRegressionConfig()
    draws = []
    for place, layer in enumerate(posterior.exits):
        normal = [
            np.random.default_rng([config.seed, sequence, place]).standard_normal(len(layer.mean))
            for sequence in range(config.n_sequences)
        ]
        draws.append(layer.mean + torch.from_numpy(np.stack(normal)) @ layer.root)
    return AVCSRegression(posterior, tuple(draws), config)


def apply(state: AVCSRegression, features: Sequence[Tensor]) -> Intervals:
    """The intervals C_e of every exit for features of E exits, [N, D_e] each, the S sequences intersected.

    They are not nested: `running()` of them is, and is what to report.

    Returns:
        Intervals in the units of the targets, [E, N]. Empty where no number is plausible; unbounded where the exits do
        not restrict the number.
    """
    posterior = state.posterior
    prediction = bayesian_regression.apply(posterior, features)
    drawn = torch.stack(
        [draws @ augmented(f).mT for draws, f in zip(state.draws, features, strict=True)]
    )  # [E, S, N], standardised
    return intervals(prediction, posterior.location + posterior.scale * drawn, state.config.level)


def intervals(prediction: RegressionPrediction, drawn: Tensor, alpha: float) -> Intervals:
    """The sets {y : R_e(y) <= 1/α} at a sequence's own level α, those of the S sequences intersected.

    Args:
        prediction: Of E exits for N rows.
        drawn: ŵ, predictions of the drawn weights, [E, S, N], float64, in units of the targets.
        alpha: Level of each sequence.

    Returns:
        Intervals, [E, N].
    """
    a, b, c = log_ratio(prediction, drawn)
    low, high = _at_most_zero(a, b, c + math.log(alpha))
    origin = prediction.mean[0]
    return Intervals.between(low.amax(dim=1) + origin, high.amin(dim=1) + origin)


def log_ratio(prediction: RegressionPrediction, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log ratio ln R_e(y) = a·u² + b·u + c, with u = y - m_1, the distance from the first exit's mean.

    Returns:
        a >= 0, b and c, [E, S, N], of predictions of E exits and of the drawn weights, ŵ [E, S, N].
    """
    noise = prediction.noise[:, None]  # [E, 1]
    total = prediction.total
    origin = prediction.mean[0]  # [N]; sums of squares of large means would cancel
    mean, drawn = (prediction.mean - origin).unsqueeze(1), drawn - origin
    a = (prediction.epistemic / (2 * noise * total)).cumsum(dim=0)
    noise, total = noise.unsqueeze(1), total.unsqueeze(1)
    b = (mean / total - drawn / noise).cumsum(dim=0)
    steps = drawn.square() / (2 * noise) - mean.square() / (2 * total) - torch.log(total / noise) / 2
    return a.unsqueeze(1).expand_as(b), b, steps.cumsum(dim=0)


def _at_most_zero(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of {y : a·y² + b·y + c <= 0} for a >= 0, without cancellation; +inf, -inf if there is no such y."""
    discriminant = b.square() - 4 * a * c
    q = -(b + torch.where(b < 0, -1.0, 1.0) * discriminant.clamp(min=0).sqrt()) / 2
    first, second = q / a, torch.where(q == 0, 0.0, c / q)
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    inf = torch.full_like(b, torch.inf)
    line = -c / b  # where a = 0
    low = torch.where(a > 0, low, torch.where(b < 0, line, -inf))
    high = torch.where(a > 0, high, torch.where(b > 0, line, inf))
    empty = torch.where((a > 0) | (b != 0), discriminant < 0, c > 0)
    return torch.where(empty, inf, low), torch.where(empty, -inf, high)


def validity(prediction: RegressionPrediction) -> Validity:
    """K_e = Σ_{l<=e} v_l/σ_l² of the rows, the condition under which 1 - α may be trusted.

    Returns:
        Mean, 90th percentile and share above 0.7, per exit, of rows that look like those to come.
    """
    ratios = (prediction.epistemic / prediction.noise[:, None]).cumsum(dim=0)  # [E, N]
    return Validity(
        tuple(ratios.mean(dim=1).tolist()),
        tuple(ratios.quantile(0.9, dim=1).tolist()),
        tuple((ratios > TRUSTED).double().mean(dim=1).tolist()),
    )

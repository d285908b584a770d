"""Sets of every exit for itself: the baselines that nested sets are compared with.

Each covers 1 - α at its own exit. They are not nested, and their running intersection, which is, covers less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.uncertainty.bayesian_regression import RegressionPrediction
from offramp.uncertainty.conformal_scores import ClassScore, class_scores, conformal_quantile
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.sets import ClassSets, Intervals
from offramp.values import check_level


@dataclass(frozen=True)
class PerExitConfig:
    """What sets to make.

    Attributes:
        alpha: Probability that an exit's set misses the truth, in (0, 1).
        score: Of classes; "raps" is the baseline of Jazbec et al. (2024), but for its randomisation.
    """

    alpha: float = 0.05
    score: ClassScore = "raps"

    def __post_init__(self) -> None:
        check_level("alpha", self.alpha)


@dataclass(frozen=True)
class PerExit:
    """Where the sets of each exit end.

    Attributes:
        quantiles: [E], float64.
        config: How they were calibrated.
    """

    quantiles: Tensor
    config: PerExitConfig


def fit(scores: Tensor, config: PerExitConfig | None = None) -> PerExit:
    """Quantiles from scores of true labels or numbers of calibration rows, [E, n]; a ValueError if there are none."""
    config = config or PerExitConfig()
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(f"scores of true labels are needed, exits x rows; their shape is {list(scores.shape)}")
    quantiles = [conformal_quantile(row, config.alpha, f"exit {e}") for e, row in enumerate(scores, start=1)]
    return PerExit(torch.tensor(quantiles, dtype=torch.float64), config)


def apply_classes(state: PerExit, given: ExitOutputs | Tensor) -> ClassSets:
    """Sets of classes, from outputs or probabilities [E, N, C]."""
    return ClassSets(class_scores(given, state.config.score) <= state.quantiles[:, None, None])


def apply_intervals(state: PerExit, prediction: RegressionPrediction) -> Intervals:
    """Intervals m_e ± q_e·√(total variance), for quantiles of `conformal_scores.residuals`."""
    return _about_the_mean(prediction, state.quantiles[:, None])


def bayes_intervals(prediction: RegressionPrediction, width: float = 2.0) -> Intervals:
    """Intervals m_e ± width·√(total variance): "EENN-Bayes" of Jazbec et al. (2024), about 95 % with a width of 2."""
    return _about_the_mean(prediction, torch.tensor(width, dtype=torch.float64))


def _about_the_mean(prediction: RegressionPrediction, width: Tensor) -> Intervals:
    half = width * prediction.total.sqrt()
    return Intervals.between(prediction.mean - half, prediction.mean + half)

"""Conformal sets of every exit for itself: scores, the quantile that sets end at, and the baselines of nested sets.

A score says how badly a class or a number fits what an exit predicts; nested sets are made of the same scores. Sets of
an exit for itself cover 1 - α there. They are not nested, and their running intersection, which is, covers less.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from offramp.uncertainty.bayesian_regression import RegressionPrediction
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.sets import ClassSets, Intervals
from offramp.values import check_level, choice

ClassScore: TypeAlias = Literal["complement", "raps"]


def class_scores(given: ExitOutputs | Tensor, kind: ClassScore = "complement") -> Tensor:
    """The score of every class: low if it is plausible.

    Args:
        given: Outputs of the exits, whose softmax is taken, or probabilities, [E, N, C].
        kind: "complement": 1 - p. "raps": see `raps`.

    Returns:
        [E, N, C], float64.

    Raises:
        ValueError: These are no probabilities, or there is no score of that name.
    """
    if isinstance(given, ExitOutputs):
        probabilities = given.logits.double().softmax(dim=-1)
    else:
        probabilities = given.double()
    if probabilities.ndim != 3 or not bool(((probabilities >= 0) & (probabilities <= 1 + 1e-6)).all()):
        raise ValueError("probabilities in [0, 1] are needed, exits x rows x classes; take the softmax of logits first")
    choice("score", kind, ("complement", "raps"))
    return raps(probabilities) if kind == "raps" else 1 - probabilities


def raps(probabilities: Tensor) -> Tensor:
    """Probability mass down to and including a class, and a penalty of 0.01 for each rank beyond the first five.

    Angelopoulos et al. (2021), "Uncertainty Sets for Image Classifiers using Conformal Prediction", without its
    randomisation; constants as in the baseline of Jazbec et al. (2024). Of classes that are as probable, the lower one
    comes first.

    Returns:
        Of [..., C], the same shape, float64.
    """
    ordered, order = probabilities.double().sort(dim=-1, descending=True, stable=True)
    extra = 0.01 * (torch.arange(1, probabilities.shape[-1] + 1) - 5).clamp(min=0)
    ranked = ordered.cumsum(dim=-1) + extra.double()
    return torch.empty_like(ranked).scatter(-1, order, ranked)


def label_scores(scores: Tensor, labels: Tensor) -> Tensor:
    """The scores of the rows' true labels: [E, N, C], [N] -> [E, N]."""
    return scores.gather(-1, labels.expand(len(scores), -1).unsqueeze(-1)).squeeze(-1)


def residuals(prediction: RegressionPrediction, targets: Tensor) -> Tensor:
    """|y - m_e| / √q_e of the rows' true numbers, [E, N]."""
    return (targets - prediction.mean).abs() / prediction.total.sqrt()


def conformal_rank(rows: int, alpha: float) -> int:
    """⌈(n + 1)(1 - α)⌉, which of n ascending scores is the conformal quantile; above n if there are too few."""
    return math.ceil((rows + 1) * (1 - alpha) - 1e-9)


def conformal_quantile(scores: Tensor, alpha: float, name: str = "") -> float:
    """The ⌈(n + 1)(1 - α)⌉-th smallest score; for exchangeable scores a new one is above it with probability <= α.

    Args:
        scores: Of the true label or number of n calibration rows, [n].
        alpha: In (0, 1).
        name: Of what, for the warning, such as "exit 3".

    Returns:
        The quantile; +inf if there are too few scores, with a warning that says how many are needed: sets then hold
        everything.
    """
    n = len(scores)
    place = conformal_rank(n, alpha)
    if place > n:
        of = f" of {name}" if name else ""
        warnings.warn(
            f"{n} calibration rows{of} are too few for alpha = {alpha:g}, the sets hold everything; at least "
            f"{math.ceil(1 / alpha - 1 - 1e-9)} rows are needed",
            stacklevel=3,
        )
        return math.inf
    return float(scores.double().sort().values[place - 1])


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
    """Intervals m_e ± q_e·√(total variance), for quantiles of `residuals`."""
    return _about_the_mean(prediction, state.quantiles[:, None])


def bayes_intervals(prediction: RegressionPrediction, width: float = 2.0) -> Intervals:
    """Intervals m_e ± width·√(total variance): "EENN-Bayes" of Jazbec et al. (2024), about 95 % with a width of 2."""
    return _about_the_mean(prediction, torch.tensor(width, dtype=torch.float64))


def _about_the_mean(prediction: RegressionPrediction, width: Tensor) -> Intervals:
    half = width * prediction.total.sqrt()
    return Intervals.between(prediction.mean - half, prediction.mean + half)

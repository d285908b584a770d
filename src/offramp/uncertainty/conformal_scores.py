"""Scores that say how badly a class or a number fits what an exit predicts, and the quantile conformal sets end at."""

from __future__ import annotations

import math
import warnings
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from offramp.uncertainty.bayesian_regression import RegressionPrediction
from offramp.uncertainty.outputs import ExitOutputs
from offramp.values import choice

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


def raps(probabilities: Tensor, *, penalty: float = 0.01, free: int = 5) -> Tensor:
    """Probability mass down to and including a class, and a penalty for each rank beyond the first few.

    Angelopoulos et al. (2021), "Uncertainty Sets for Image Classifiers using Conformal Prediction", without its
    randomisation; constants as in the baseline of Jazbec et al. (2024). Of classes that are as probable, the lower one
    comes first.

    Returns:
        Of [..., C], the same shape, float64.
    """
    ordered, order = probabilities.double().sort(dim=-1, descending=True, stable=True)
    extra = penalty * (torch.arange(1, probabilities.shape[-1] + 1) - free).clamp(min=0)
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

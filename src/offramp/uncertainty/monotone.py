"""Predictors whose probability of the finally right class should not fall as exits deepen.

Jazbec et al. (2023), "Towards Anytime Classification in Early-Exit Architectures by Enforcing Conditional
Monotonicity". Nothing is fitted; `violations` says how often the probability falls all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DELTAS = (0.01, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class ProductConfig:
    """How evidence multiplies.

    Attributes:
        threshold: Of the logits: max(logit, threshold) is the evidence; at least 0. Not used with `softplus`.
        weights: Exponents of the exits, E positive numbers; None: 1 each.
        centre: Subtract the mean over the classes from the logits, whose offset is arbitrary.
        most: Evidence is clipped there; None: not.
        softplus: ln(1 + exp(logit)) as evidence, which is never 0, so nothing ever has to be fallen back from.
        fall_back: Where all products are 0 take the softmax of the exit's own logits, which breaks monotonicity; if
            False they are 1/C each.
    """

    threshold: float = 0.0
    weights: Sequence[float] | None = None
    centre: bool = True
    most: float | None = None
    softplus: bool = False
    fall_back: bool = True

    def __post_init__(self) -> None:
        if self.threshold < 0 or (self.most is not None and not self.most > self.threshold):
            raise ValueError(f"threshold is {self.threshold}, most {self.most}; 0 <= threshold < most is needed")
        if self.weights is not None and not all(weight > 0 for weight in self.weights):
            raise ValueError(f"weights are {list(self.weights)}; they must be positive")


@dataclass(frozen=True)
class Products:
    """Product-anytime predictions.

    Attributes:
        probabilities: [E, N, C], float64.
        fallen_back: Where all products were 0, [E, N], bool.
    """

    probabilities: Tensor
    fallen_back: Tensor


def product_anytime(logits: Tensor, config: ProductConfig | None = None) -> Products:
    """p_e(y) ∝ Π_{l<=e} max(logit_l(y), threshold)^w_l: a class without evidence at one exit never comes back.

    Returns:
        Of logits [E, N, C], probabilities, and where they are those of the exit alone.

    Raises:
        ValueError: There are not as many weights as exits.
    """
    config = config or ProductConfig()
    weights = [1.0] * len(logits) if config.weights is None else config.weights
    if len(weights) != len(logits):
        raise ValueError(f"{len(weights)} weights are given for {len(logits)} exits")
    values = logits.double()
    if config.centre:
        values = values - values.mean(dim=-1, keepdim=True)
    evidence = torch.nn.functional.softplus(values) if config.softplus else values.clamp(min=config.threshold)
    if config.most is not None:
        evidence = evidence.clamp(max=config.most)
    power = torch.tensor(weights, dtype=torch.float64)[:, None, None]
    logs = (power * evidence.log()).cumsum(dim=0)
    fallen = (logs == -torch.inf).all(dim=-1)
    instead = values if config.fall_back else torch.zeros_like(values)
    return Products(torch.where(fallen.unsqueeze(-1), instead, logs).softmax(dim=-1), fallen)


def caching_anytime(probabilities: Tensor) -> Tensor:
    """At each exit the prediction of the most confident exit so far, the later of equals: [E, N, C] -> [E, N, C]."""
    confidence = probabilities.amax(dim=-1)  # [E, N]
    numbers = torch.arange(len(confidence)).unsqueeze(-1).expand(confidence.shape)
    best = torch.where(confidence == confidence.cummax(dim=0).values, numbers, 0).cummax(dim=0).values
    return probabilities.gather(0, best.unsqueeze(-1).expand(probabilities.shape))


def violations(probabilities: Tensor, labels: Tensor, deltas: Sequence[float] = DELTAS) -> dict[float, float]:
    """Share of rows whose probability of the true label falls by more than δ between any exits, by δ; NaN of none."""
    if not len(labels):
        return dict.fromkeys(deltas, math.nan)
    true = probabilities.gather(-1, labels.expand(len(probabilities), -1).unsqueeze(-1)).squeeze(-1)
    fall = (true.cummax(dim=0).values - true).amax(dim=0)  # [N]
    return {delta: float((fall > delta).double().mean()) for delta in deltas}

"""The model-internal ensemble: what an exit says, averaged with what all exits before it said.

Meronen et al. (2023), "Fixing Overconfidence in Dynamic Neural Networks", section 3.2: the weight of an exit is its
cumulative cost, so deeper exits count more. Probabilities are averaged, not logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weights(costs: Tensor) -> Tensor:
    """w_e = c_e / c_E of cumulative costs [E], float64; a ValueError if one is not positive."""
    if not bool((costs > 0).all()):
        raise ValueError(f"costs are {costs.tolist()}; an ensemble weighs exits by them, so they must be positive")
    return costs.double() / costs[-1].double()


def join(probabilities: Tensor, carried: Tensor | None, weight: Tensor, exit: int) -> tuple[Tensor, Tensor]:
    """p_e of the ensemble = Σ_{l≤e} w_l p_l / Σ_{l≤e} w_l, at exit e counted from 0, with weights [E] of all exits.

    Returns:
        The ensemble's probabilities [..., C], and the sum Σ_{l≤e} w_l p_l to carry on; it begins as None.
    """
    total = probabilities * weight[exit] if carried is None else carried + probabilities * weight[exit]
    return total / weight[: exit + 1].sum(), total


def join_logarithms(
    log_probability: Tensor, carried: Tensor | None, weight: Tensor, exit: int
) -> tuple[Tensor, Tensor]:
    """`join` for logarithms of probabilities, which may be as small as they like."""
    total = log_probability + math.log(float(weight[exit]))
    if carried is not None:
        total = torch.logaddexp(carried, total)
    return total - math.log(float(weight[: exit + 1].sum())), total

"""How sure probabilities are: what a row leaves by."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def max_probability(probabilities: Tensor) -> Tensor:
    """The largest, [A, C] -> [A]."""
    return probabilities.amax(-1)


def gap(probabilities: Tensor) -> Tensor:
    """The largest minus the second, [A, C] -> [A]."""
    top = probabilities.topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


def certainty(probabilities: Tensor) -> Tensor:
    """1 - H / ln C with the entropy H in nats, [A, C] -> [A]."""
    entropy: Tensor = torch.special.entr(probabilities).sum(-1)
    return 1 - entropy / math.log(probabilities.shape[-1])


CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {"max": max_probability, "gap": gap, "entropy": certainty}
"""How sure probabilities [A, C] are, [A], at most 1: the larger, the surer."""


def measure_of(confidence: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A measure by its name in `CONFIDENCES`, or the function [A, C] -> [A] given; a ValueError for another name."""
    if callable(confidence):
        return confidence
    if confidence not in CONFIDENCES:
        raise ValueError(f"confidence is {confidence!r}; choose one of {', '.join(CONFIDENCES)}, or give a function")
    return CONFIDENCES[confidence]

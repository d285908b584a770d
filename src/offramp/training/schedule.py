"""Learning rates over the way of a run, and weights over exits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
    "step": lambda done: 0.1 ** sum(done >= edge for edge in (0.5, 0.75)),
}
"""Schedules: share of the way done, in [0, 1] -> share of the learning rate. "step" divides by 10 at half and at three
quarters of the way (ResNet, MSDNet)."""
SCHEDULES = ("cosine", "linear", "constant")
"""Those for language models."""
PRECISIONS = (None, "bf16")


def _layerskip(layers: Sequence[int], scale: float = 0.2) -> list[float]:
    """Triangular in the layer; every layer but the last one scaled (LayerSkip, arXiv 2404.16710, section 4.1.2)."""
    *early, last = (layer * (layer - 1) / 2 for layer in layers)  # the sum over layers before, counted from 0
    values = [*(scale * value for value in early), layers[-1] - 1 + scale * (last - (layers[-1] - 1))]
    return [1 / len(layers)] * len(layers) if not sum(values) else [value / sum(values) for value in values]


WEIGHTS: dict[str, Callable[[Sequence[int]], list[float]]] = {
    "uniform": lambda layers: [1 / len(layers) for _ in layers],
    "layer": lambda layers: [layer / sum(layers) for layer in layers],
    "layerskip": _layerskip,
}
"""Weights over the readouts that are trained, which sum to 1: equal, proportional to the layer (CALM, Schuster et al.
2022, section 3.2, and FREE), or LayerSkip's, normalised over these alone. Where the backbone is trained, the last layer
is one of them; else the deepest exit has its place in LayerSkip's formula."""

"""What the exits of a classifier are trained for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.classifiers.batches import Batch

Objective = Callable[[Any, Batch], Tensor | tuple[Tensor, Mapping[str, Tensor]]]
"""What a classifier's forward gave, and the batch -> the loss of the step, and terms of it to be logged by name.

One that is a module is trained too where it has parameters (projectors, say), and its buffers are kept in checkpoints:
what changes between steps, such as weights of rows, must be a buffer."""
AfterEpoch = Callable[[int, nn.Module], None]
"""Epoch (counted from 0) that ended, and the classifier, which it must leave as it was -> changes the objective."""


def logits_of(outputs: Sequence[Any]) -> list[Tensor]:
    """The logits [B, C] of each exit, in float32, of what a classifier's forward gave."""
    return [(output if isinstance(output, Tensor) else output.logits).float() for output in outputs]


def joint_cross_entropy(weights: Sequence[float], label_smoothing: float = 0.0) -> Objective:
    """Σ_e w_e · mean over rows of the cross-entropy at exit e, in nats (MSDNet, arXiv 1703.09844, section 4)."""

    def objective(outputs: Any, batch: Batch) -> Tensor:
        losses = [F.cross_entropy(z, batch.labels, label_smoothing=label_smoothing) for z in logits_of(outputs)]
        return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()

    return objective


@torch.no_grad()
def judged(outputs: Any, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies, and rows that are right, at each exit: [2, E], float64."""
    found = []
    for z in logits_of(outputs):
        right = (z.argmax(-1) == labels).sum()
        found.append(torch.stack([F.cross_entropy(z, labels, reduction="sum").double(), right.double()]))
    return torch.stack(found, 1)

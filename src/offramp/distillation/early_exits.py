"""Exits of a student that was trained by its last exit alone: linear readouts of what is there; it is not changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.backbone import evaluating
from offramp.classifiers.batches import Rows
from offramp.classifiers.classifier import EarlyExitClassifier

DECAY = 1e-4
"""Of the readouts' weights, on standardised features."""
CHUNK = 256


def fit_early_exits(student: EarlyExitClassifier, rows: Rows, steps: int = 40) -> None:
    """Fit the linear layers of all exits but the last, by plain cross-entropy on features of the training rows.

    Args:
        student: Its blocks and its last exit stay as they are.
        rows: Training rows.
        steps: Of LBFGS.

    Raises:
        ValueError: An exit has more than a linear layer to train.
    """
    heads: list[Any] = list(student.heads)[:-1]
    for number, head in enumerate(heads, 1):
        if any(True for part in (head.body, head.dense) for _ in part.parameters()):
            raise ValueError(
                f"exit {number} has more than a linear layer, which only training can give; train exits jointly "
                "(early_exits joint)"
            )
    if not heads:
        return
    found: list[list[Tensor]] = [[] for _ in heads]
    with torch.no_grad(), evaluating(student):
        for places in torch.split(torch.arange(len(rows.data)), CHUNK):
            for parts, output in zip(found, student(rows.inputs(places)), strict=False):
                parts.append(output.features.float())
    for head, parts in zip(heads, found, strict=True):
        _fit(head.linear, torch.cat(parts), rows.data.labels.to(student.device), steps)


def _fit(linear: nn.Linear, features: Tensor, labels: Tensor, steps: int) -> None:
    mean, std = features.mean(0), features.std(0, unbiased=False).clamp(min=1e-6)
    x = (features - mean) / std
    weight = torch.zeros(linear.weight.shape, device=x.device, requires_grad=True)
    bias = torch.zeros(linear.bias.shape, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + DECAY * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        linear.weight.copy_(weight / std)
        linear.bias.copy_(bias - weight @ (mean / std))

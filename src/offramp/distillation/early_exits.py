"""Exits of a student that was trained by its last exit alone: linear readouts of what is there; it is not changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.classifiers.batches import Rows, by_length
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.families.backbone import evaluating

DECAY = 1e-4
"""Of the readouts' weights, on standardised features."""
STEPS = 40


def fit_early_exits(student: EarlyExitClassifier, rows: Rows, precision: str | None = None) -> None:
    """Fit the linear layers of all exits but the last, by plain cross-entropy on features of the training rows."""
    require_linear(student)
    heads: list[Any] = list(student.heads)[:-1]
    if not heads:
        return
    found: list[list[Tensor]] = [[] for _ in heads]
    batches = by_length(rows)
    with torch.no_grad(), evaluating(student, precision):
        for places in batches:
            for parts, output in zip(found, student(rows.inputs(places)), strict=False):
                parts.append(output.features.float())
    labels = rows.data.labels[torch.cat(batches)].to(student.device)
    for head, parts in zip(heads, found, strict=True):
        _fit(head.linear, torch.cat(parts), labels)


def require_linear(student: EarlyExitClassifier) -> None:
    """Raise a ValueError if an exit before the last has more to learn than a linear layer and a norm.

    A copy of the network's final norm is no obstacle: the linear layer reads what the copy gives, as it is.

    Raises:
        ValueError: See above.
    """
    heads: list[Any] = list(student.heads)[:-1]
    for number, head in enumerate(heads, 1):
        parts = [part for made in (head.body, head.dense) for part in made.modules()]
        if any(not isinstance(part, nn.LayerNorm) and list(part.parameters(recurse=False)) for part in parts):
            raise ValueError(
                f"exit {number} has more than a linear layer to learn, which only training can give; train exits "
                "jointly (early_exits joint, a method that learns from labels or logits), or leave them out (exits [])"
            )


def _fit(linear: nn.Linear, features: Tensor, labels: Tensor) -> None:
    mean, std = features.mean(0), features.std(0, unbiased=False).clamp(min=1e-6)
    x = (features - mean) / std
    weight = torch.zeros(linear.weight.shape, device=x.device, requires_grad=True)
    bias = torch.zeros(linear.bias.shape, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + DECAY * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        linear.weight.copy_(weight / std)
        linear.bias.copy_(bias - weight @ (mean / std))

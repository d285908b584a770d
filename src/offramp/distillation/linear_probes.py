"""Linear layers fitted to a trained student, which is not changed: exits of one that has a last exit alone, and DFR.

Deep feature reweighting (Kirichenko et al. 2022, arXiv 2204.02937) is a new last layer from validation rows alone.
Features are standardised; L1 logistic regression is fitted on subsets of validation rows that are balanced over groups,
its strength chosen on one half, the layer refitted on all of them for several subsets, and its coefficients averaged.
Uses group labels of validation rows to train. Differs in a softmax for two classes too, and in its solver (FISTA).
"""

from __future__ import annotations

from dataclasses import dataclass
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
STRENGTHS = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)
"""C: the weight of the likelihood's sum beside the L1 norm, as scikit-learn has it."""
DRAWS, STEPS = 20, 300


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


@dataclass(frozen=True)
class LastLayer:
    """A linear layer on features as they are.

    Attributes:
        weight: [C, D].
        bias: [C].
        strength: The C that was chosen.
    """

    weight: Tensor
    bias: Tensor
    strength: float

    def __call__(self, features: Tensor) -> Tensor:
        """Logits [N, C] of features [N, D]."""
        return features.double() @ self.weight.mT + self.bias


def refitted(features: Tensor, labels: Tensor, groups: Tensor, classes: int, *, seed: int = 0) -> LastLayer:
    """A last layer for features [N, D], labels [N] and groups [N] of rows outside training; -1: left out."""
    random = torch.Generator().manual_seed(seed)
    known = groups >= 0
    x, y, g = features[known].double(), labels[known], groups[known]
    order = torch.randperm(len(x), generator=random)
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    rows = balanced(g[first], random)
    chosen, best = STRENGTHS[0], -1.0
    mean, std = _scale(x[first][rows])
    for strength in STRENGTHS:
        weight, bias = l1_logistic((x[first][rows] - mean) / std, y[first][rows], classes, strength)
        right = (((x[second] - mean) / std) @ weight.mT + bias).argmax(1) == y[second]
        worst = min(float(right[g[second] == group].double().mean()) for group in torch.unique(g[second]))
        if worst > best:
            chosen, best = strength, worst
    mean, std = _scale(x)
    weights, biases = torch.zeros(classes, x.shape[1], dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    for _ in range(DRAWS):
        rows = balanced(g, random)
        weight, bias = l1_logistic((x[rows] - mean) / std, y[rows], classes, chosen)
        weights, biases = weights + weight / DRAWS, biases + bias / DRAWS
    return LastLayer(weights / std, biases - weights @ (mean / std), chosen)


def balanced(groups: Tensor, random: torch.Generator) -> Tensor:
    """Places of as many rows of each group as the smallest has, drawn without replacement."""
    each = int(torch.unique(groups, return_counts=True)[1].min())
    places = [(groups == group).nonzero()[:, 0] for group in torch.unique(groups)]
    return torch.cat([rows[torch.randperm(len(rows), generator=random)[:each]] for rows in places])


def l1_logistic(x: Tensor, labels: Tensor, classes: int, strength: float, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Minimise strength Σ_i ce_i + ‖W‖₁, the bias not penalised, by accelerated proximal gradient steps.

    Returns:
        Weight [C, D] and bias [C] for standardised features [N, D], float64; the strength is C of scikit-learn.
    """
    full = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    target = F.one_hot(labels, classes).to(x.dtype)
    size = 1 / (0.5 * strength * float(torch.linalg.matrix_norm(full, 2)) ** 2)  # softmax's Hessian is at most 1/2
    w = torch.zeros(classes, full.shape[1], dtype=x.dtype)
    at, t = w, 1.0
    for _ in range(steps):
        gradient = strength * ((full @ at.mT).softmax(1) - target).mT @ full
        new = at - size * gradient
        new[:, :-1] = F.softshrink(new[:, :-1], size)
        faster = (1 + (1 + 4 * t * t) ** 0.5) / 2
        at, w, t = new + (t - 1) / faster * (new - w), new, faster
    return w[:, :-1], w[:, -1]


def _scale(x: Tensor) -> tuple[Tensor, Tensor]:
    std = x.std(0, unbiased=False)
    return x.mean(0), torch.where(std > 1e-12, std, 1.0)

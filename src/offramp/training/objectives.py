"""What an exit is trained for: losses between its readout and the model's last one, or between hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor


class Teacher:
    """The last layer's readout at N positions.

    Args:
        logits: Its logits, float32 [N, V].
        temperature: Divides the logits of both sides of a divergence.
    """

    def __init__(self, logits: Tensor, temperature: float = 1.0) -> None:
        self.logits, self.temperature = logits, temperature

    @cached_property
    def best(self) -> Tensor:
        """The token the full model would choose, [N]."""
        return choices(self.logits)

    @cached_property
    def log_probabilities(self) -> Tensor:
        """At the temperature, [N, V]."""
        return _over(self.logits, self.temperature).log_softmax(-1)

    @cached_property
    def probabilities(self) -> Tensor:
        """At the temperature, [N, V]."""
        return self.log_probabilities.exp()

    @cached_property
    def negative_entropy(self) -> Tensor:
        """Of the probabilities, in nats, [N]."""
        return (self.probabilities * self.log_probabilities).sum(-1)


def choices(logits: Tensor) -> Tensor:
    """The most probable tokens, [N, V] -> [N]; on CPUs five times as fast as `argmax`, with the same values."""
    return logits.max(-1).indices


def _over(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


# Over a large vocabulary a pass over the logits costs as much as half a matrix product with the head, hence derivatives
# by hand: they take half the passes that automatic differentiation of the formulas takes.


class _ForwardKL(torch.autograd.Function):
    """Σ p (log p - log q) for logits of q; derivative q - p."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Teacher) -> Tensor:
        own = logits.log_softmax(-1)  # [N, V]
        p = teacher.probabilities
        losses = teacher.negative_entropy - (p * own).sum(-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(own.exp_().sub_(p))
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradient[:, None], None


class _ReverseKL(torch.autograd.Function):
    """Σ q (log q - log p) for logits of q; derivative q (log q - log p - the sum)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Teacher) -> Tensor:
        own = logits.log_softmax(-1)  # [N, V]
        q = own.exp()
        difference = own.sub_(teacher.log_probabilities)
        losses = (q * difference).sum(-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(difference.sub_(losses[:, None]).mul_(q))
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradient[:, None], None


class _CrossEntropy(torch.autograd.Function):
    """-log q at the label, for logits of q; derivative q - 1[label]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        own = logits.log_softmax(-1)  # [N, V]
        losses = -own.gather(1, labels[:, None])[:, 0]
        if ctx.needs_input_grad[0]:
            own.exp_().scatter_add_(1, labels[:, None], own.new_full((len(own), 1), -1.0))
            ctx.save_for_backward(own)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradient[:, None], None


class Objective(Protocol):
    """Loss of one exit, in nats, for each of N positions."""

    def __call__(self, logits: Tensor, teacher: Any, labels: Tensor) -> Tensor:
        """Float32 logits [N, V], the last layer's readout there, the next tokens [N] -> losses [N]."""
        ...


def forward_kl(logits: Tensor, teacher: Teacher, labels: Tensor | None = None) -> Tensor:
    """KL(last layer || exit), times the temperature squared (Hinton et al. 2015, section 2); covers all its modes."""
    losses: Tensor = _ForwardKL.apply(_over(logits, teacher.temperature), teacher)  # type: ignore[no-untyped-call]
    return losses * teacher.temperature**2


def reverse_kl(logits: Tensor, teacher: Teacher, labels: Tensor) -> Tensor:
    """KL(exit || last layer), times the temperature squared; settles on its main mode."""
    losses: Tensor = _ReverseKL.apply(_over(logits, teacher.temperature), teacher)  # type: ignore[no-untyped-call]
    return losses * teacher.temperature**2


def cross_entropy(logits: Tensor, teacher: Teacher, labels: Tensor) -> Tensor:
    """Cross-entropy to the next token of the text; knows nothing of the last layer."""
    losses: Tensor = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return losses


def teacher_argmax(logits: Tensor, teacher: Teacher, labels: Tensor) -> Tensor:
    """Cross-entropy to the token the last layer would choose."""
    return cross_entropy(logits, teacher, teacher.best)


def mixed(kd: Tensor, ce: Tensor, weights: Tensor | None, fraction: float, weight_on: str) -> Tensor:
    """(1 - λ) v ce + λ u kd of each row, where v and u are its weight or 1: losses and weights [N] -> [N].

    Hinton et al. (2015), arXiv 1503.02531, with weights of rows; λ = 1 is no cross-entropy at all, λ = 0 no teacher.

    Args:
        kd: Divergences from the teacher.
        ce: Cross-entropies to the labels.
        weights: Of the rows; None: all are 1.
        fraction: λ.
        weight_on: "kd", "ce" or "both": which term is weighted.

    Returns:
        The losses.
    """
    if weights is not None:
        kd = weights * kd if weight_on != "ce" else kd
        ce = weights * ce if weight_on != "kd" else ce
    if fraction in (0, 1):
        return kd if fraction else ce
    return (1 - fraction) * ce + fraction * kd


OBJECTIVES: dict[str, Objective] = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "labels": cross_entropy,
    "teacher-argmax": teacher_argmax,
}
"""By the names that configurations and commands use."""
SOFTENED = ("forward-kl", "reverse-kl")
"""Objectives that have a temperature."""


def layerwise_loss(shallow: Sequence[Tensor], deep: Sequence[Tensor]) -> Tensor:
    """FREE's dynamic layer-wise distillation: each shallow layer imitates the deep layer that is closest to it.

    (1/S) Σ_i MSE(h_i, h_m(i)) with m(i) = argmin_j MSE(h_i, h_j) over the deep layers j, chosen per call (Bae et al.
    2023, arXiv 2310.05424, section 4.3). States are [N, D]; the deep ones are the teacher and get no gradient.

    Returns:
        The loss, a scalar.
    """
    teachers = torch.stack([hidden.detach() for hidden in deep])  # [M, N, D]
    losses = [(hidden - teachers).pow(2).mean((1, 2)).min() for hidden in shallow]
    return torch.stack(losses).mean()

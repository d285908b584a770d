"""What an exit is trained for: losses between its readout and the model's last one, a chunk of positions at a time.

The loss of one step is Σ_e w_e · mean over positions of loss_e. Its gradient is a sum over exits and positions, so it
is accumulated one exit and one chunk at a time: no tensor is larger than `CHUNK` elements, and about eight of that size
live at once, whatever the batch, the window, the number of exits and the vocabulary are. (One position needs V
elements, so a vocabulary larger than `CHUNK` is the limit.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1 << 23
"""Logits of one exit held at once; 32 MB in float32."""


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


class Objective(Protocol):
    """Loss of one exit, in nats, for each of N positions."""

    def __call__(self, logits: Tensor, teacher: Teacher, labels: Tensor) -> Tensor:
        """Float32 logits [N, V], the last layer's readout there, the next tokens [N] -> losses [N]."""
        ...


def forward_kl(logits: Tensor, teacher: Teacher, labels: Tensor) -> Tensor:
    """KL(last layer || exit), times the temperature squared (Hinton et al. 2015, section 2); covers all its modes."""
    losses: Tensor = _ForwardKL.apply(_over(logits, teacher.temperature), teacher)  # type: ignore[no-untyped-call]
    return losses * teacher.temperature**2


def reverse_kl(logits: Tensor, teacher: Teacher, labels: Tensor) -> Tensor:
    """KL(exit || last layer), times the temperature squared; settles on its main mode."""
    losses: Tensor = _ReverseKL.apply(_over(logits, teacher.temperature), teacher)  # type: ignore[no-untyped-call]
    return losses * teacher.temperature**2


def cross_entropy(logits: Tensor, teacher: Teacher, labels: Tensor) -> Tensor:
    """Cross-entropy to the next token of the text; knows nothing of the last layer."""
    return F.cross_entropy(logits, labels, reduction="none")


def teacher_argmax(logits: Tensor, teacher: Teacher, labels: Tensor) -> Tensor:
    """Cross-entropy to the token the last layer would choose."""
    return F.cross_entropy(logits, teacher.best, reduction="none")


OBJECTIVES: dict[str, Objective] = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "labels": cross_entropy,
    "teacher-argmax": teacher_argmax,
}
"""By the names that configurations and commands use."""
SOFTENED = ("forward-kl", "reverse-kl")
"""Objectives that have a temperature."""


WEIGHTS: dict[str, Callable[[Sequence[int]], list[float]]] = {
    "uniform": lambda layers: [1 / len(layers) for _ in layers],
    "layer": lambda layers: [layer / sum(layers) for layer in layers],
}
"""Weights over exits, which sum to 1: equal, or proportional to the layer (CALM, Schuster et al. 2022, section 3.2)."""


class Adapters(Protocol):
    """What is trained: `offramp.exits.Exits`."""

    @property
    def layers(self) -> Sequence[int]:
        """The exits."""
        ...

    def adapt(self, layer: int, hidden: Tensor) -> Tensor:
        """States after `layer` -> states to read out, any shape [..., D]."""
        ...


@dataclass(frozen=True)
class Tally:
    """Sums over N positions: `losses` [E] and `agreed` [E], how often an exit's choice is the last layer's."""

    losses: Tensor
    agreed: Tensor
    positions: int

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(self.losses + other.losses, self.agreed + other.agreed, self.positions + other.positions)

    @property
    def loss(self) -> list[float]:
        """Mean loss of each exit."""
        return [float(value) / self.positions for value in self.losses]

    @property
    def agreement(self) -> list[float]:
        """Share of positions at which each exit's most probable token is the last layer's."""
        return [float(value) / self.positions for value in self.agreed]


def tally(
    exits: Adapters,
    readout: Callable[[Tensor], Tensor],
    states: Sequence[Tensor],
    labels: Tensor,
    objective: Objective,
    *,
    rows: int,
    temperature: float = 1.0,
    weights: Sequence[float] | None = None,
    parameters: Sequence[Tensor] = (),
) -> Tally:
    """Losses and agreement of all exits; with `weights`, also adds the gradient of Σ_e w_e · mean loss_e.

    Args:
        exits: The adapters, E of them.
        readout: States [n, D] -> logits [n, V]: the frozen final norm and head.
        states: After each exit layer and, as the last one, after layer L; E + 1 of [N, D], without gradients.
        labels: Next tokens, [N].
        objective: The loss.
        rows: Positions read out at once, see `chunk_rows`.
        temperature: Of both sides of a divergence.
        weights: Of the exits, E of them; None: only measure.
        parameters: Whose `.grad` the gradient is added to; nothing else gets one.

    Returns:
        Sums over the positions.
    """
    count, device = len(labels), labels.device
    losses = torch.zeros(len(exits.layers), dtype=torch.float64, device=device)
    agreed = torch.zeros(len(exits.layers), dtype=torch.long, device=device)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        with torch.no_grad():
            teacher = Teacher(readout(states[-1][part]).float(), temperature)
        for index, layer in enumerate(exits.layers):
            with torch.set_grad_enabled(weights is not None):
                hidden = states[index][part]
                adapted = exits.adapt(layer, hidden.float()).to(hidden.dtype)  # adapters work in float32
                logits = readout(adapted).float()  # [n, V]
                loss = objective(logits, teacher, labels[part]).sum()
                if weights is not None:
                    torch.autograd.backward(loss * (weights[index] / count), inputs=list(parameters))
            losses[index] += loss.detach()
            agreed[index] += (choices(logits.detach()) == teacher.best).sum()
    return Tally(losses, agreed, count)


def chunk_rows(vocabulary: int) -> int:
    """Positions whose logits fit into `CHUNK` elements, at least one."""
    return max(1, CHUNK // vocabulary)

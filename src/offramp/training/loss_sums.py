"""The loss of a step over all readouts, with its gradient, a chunk of positions at a time.

The loss is Σ_e w_e · mean over positions of loss_e. Its gradient is a sum over readouts and positions, so it is
accumulated one readout and one chunk at a time: no tensor is larger than `CHUNK` elements, and about eight of that size
live at once, whatever the batch, the window, the number of exits and the vocabulary are. (One position needs V
elements, so a vocabulary larger than `CHUNK` is the limit.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offramp.training.objectives import OBJECTIVES, Objective, Teacher, choices

CHUNK = 1 << 23
"""Logits of one readout held at once; 32 MB in float32. Each chunk goes through the whole head and, where it learns,
through its gradient: at a quarter of this size, which a CPU's caches might hold, these passes took longer than the
products (SmolLM2's head that learns, 343 positions, five readouts, one core, bfloat16: 6.8 s, here 2.9 s)."""


class Adapters(Protocol):
    """What is trained: `offramp.core.exits.Exits`."""

    @property
    def layers(self) -> Sequence[int]:
        """The exits."""
        ...

    def adapt(self, layer: int, hidden: Tensor) -> Tensor:
        """States after `layer` -> states to read out, any shape [..., D]."""
        ...


@dataclass(frozen=True)
class LossSums:
    """Sums over N positions, exits first and the last layer behind them.

    Attributes:
        losses: Of exits by the objective, of the last layer to the text, in nats, float64 [E + 1].
        agreed: How often an exit's choice is the last layer's, and the last layer's is the text's, [E + 1].
        positions: N.
    """

    losses: Tensor
    agreed: Tensor
    positions: int

    def __add__(self, other: LossSums) -> LossSums:
        """Both together."""
        return LossSums(self.losses + other.losses, self.agreed + other.agreed, self.positions + other.positions)

    @property
    def loss(self) -> list[float]:
        """Mean loss of each exit."""
        return self._means(self.losses)[:-1]

    @property
    def last_loss(self) -> float:
        """Mean cross-entropy of the last layer to the text."""
        return self._means(self.losses)[-1]

    @property
    def agreement(self) -> list[float]:
        """Share of positions at which each exit's most probable token is the last layer's."""
        return self._means(self.agreed)[:-1]

    @property
    def last_accuracy(self) -> float:
        """Share of positions at which the last layer's most probable token is the text's."""
        return self._means(self.agreed)[-1]

    def _means(self, sums: Tensor) -> list[float]:
        return [float(value) / max(self.positions, 1) for value in sums]


def loss_sums(
    exits: Adapters,
    readout: Callable[[Tensor], Tensor],
    states: Sequence[Tensor],
    labels: Tensor,
    objective: Objective,
    *,
    rows: int,
    temperature: float = 1.0,
    weights: Sequence[float | None] | None = None,
    count: int | None = None,
) -> LossSums:
    """Losses and agreement of all exits; with `weights`, also adds the gradient of Σ_e w_e · loss_e / `count`.

    The gradient reaches every leaf that requires one, states included.

    Args:
        exits: The adapters, E of them.
        readout: States [n, D] -> logits [n, V]: the final norm and head.
        states: After each exit layer and, as the last one, after layer L; E + 1 of [N, D].
        labels: Next tokens, [N].
        objective: The loss of the exits.
        rows: Positions read out at once, see `chunk_rows`.
        temperature: Of both sides of a divergence.
        weights: Of the exits, E of them, and perhaps one more: of the last layer's cross-entropy to the labels. None:
            only measure. An exit whose weight is None is not read out; its sums stay 0.
        count: What the sums are divided by in the gradient; None: N.

    Returns:
        Sums over the positions.
    """
    device, last, learns = labels.device, len(exits.layers), weights is not None
    shares = [None if weight is None else weight / (count or len(labels)) for weight in weights or ()]
    losses = torch.zeros(last + 1, dtype=torch.float64, device=device)
    agreed = torch.zeros(last + 1, dtype=torch.long, device=device)
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        with torch.set_grad_enabled(len(shares) > last):
            logits = readout(states[-1][part]).float()
            loss = OBJECTIVES["labels"](logits, None, labels[part]).sum()
            if len(shares) > last and (share := shares[last]) is not None:
                (loss * share).backward()  # type: ignore[no-untyped-call]
        losses[last] += loss.detach()
        teacher = Teacher(logits.detach(), temperature)
        agreed[last] += (teacher.best == labels[part]).sum()
        for index, layer in enumerate(exits.layers):
            share = shares[index] if learns else None
            if learns and share is None:
                continue
            with torch.set_grad_enabled(learns):
                hidden = states[index][part]
                adapted = exits.adapt(layer, hidden.float()).to(hidden.dtype)  # adapters work in float32
                logits = readout(adapted).float()  # [n, V]
                loss = objective(logits, teacher, labels[part]).sum()
                if share is not None:
                    (loss * share).backward()  # type: ignore[no-untyped-call]
            losses[index] += loss.detach()
            agreed[index] += (choices(logits.detach()) == teacher.best).sum()
    return LossSums(losses, agreed, len(labels))


def chunk_rows(vocabulary: int) -> int:
    """Positions whose logits fit into `CHUNK` elements, at least one."""
    return max(1, CHUNK // vocabulary)

"""The loss of a language model that learns from another one, token by token, and its sums by group of prompts.

Per token first, then the weights, then the mean over the step's tokens, see `offramp.training.objectives.mixed`. Both
models are read out a chunk of tokens at a time, so no tensor is larger than
`offramp.training.loss_sums.CHUNK` elements, whatever the batch, the window and the vocabulary are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.training.objectives import Objective, Teacher, choices, cross_entropy, mixed

COLUMNS = ("tokens", "kd", "ce", "agreement", "accuracy")


@dataclass(frozen=True)
class TokenLoss:
    """What the terms are and how they are mixed.

    Attributes:
        divergence: KL(teacher || student) or KL(student || teacher), times T².
        temperature: T.
        fraction: λ; at 1 the text's tokens are not learnt, at 0 the teacher is not.
        weight_on: "kd", "ce" or "both": which term a token's weight is for.
    """

    divergence: Objective
    temperature: float = 1.0
    fraction: float = 0.9
    weight_on: str = "both"

    def mixed(self, kd: Tensor, ce: Tensor, weights: Tensor | None) -> Tensor:
        """The sum over n tokens, a scalar: kd, ce, weights [n]."""
        return mixed(kd, ce, weights, self.fraction, self.weight_on).sum()


@dataclass(frozen=True)
class TokenSums:
    """Sums over tokens, by group.

    Attributes:
        values: [G + 1, 5] as `COLUMNS`, float64; the last row is of tokens without a group.
        loss: Σ of what was trained.
    """

    values: Tensor
    loss: Tensor

    @classmethod
    def nothing(cls, groups: int, device: torch.device) -> TokenSums:
        """Of no tokens."""
        zeros = torch.zeros(groups + 1, len(COLUMNS), dtype=torch.float64, device=device)
        return cls(zeros, zeros.new_zeros(()))

    def __add__(self, other: TokenSums) -> TokenSums:
        """Both together."""
        return TokenSums(self.values + other.values, self.loss + other.loss)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return int(self.values[:, 0].sum())

    def mean(self, column: str) -> float:
        """Over all tokens."""
        return float(self.values[:, COLUMNS.index(column)].sum() / max(self.tokens, 1))

    def by_group(self, column: str) -> list[float | None]:
        """Over the tokens of each group; None where there are none."""
        pairs = self.values[:-1, [0, COLUMNS.index(column)]].tolist()
        return [total / count if count else None for count, total in pairs]


Readout = Callable[[Tensor], Tensor]
"""States [n, D] -> logits [n, V]."""


def token_losses(
    student: tuple[Tensor, Readout],
    teacher: tuple[Tensor, Readout],
    labels: Tensor,
    groups: Tensor,
    loss: TokenLoss,
    *,
    rows: int,
    names: int,
    weights: Tensor | None = None,
    count: int | None = None,
) -> TokenSums:
    """Losses of N tokens; with `count`, also adds the gradient of the mixed sum divided by it.

    The gradient reaches every leaf of the student's side that requires one, states included.

    Args:
        student: Its last states [N, D], and how they are read out.
        teacher: Likewise; never gets a gradient.
        labels: Next tokens, [N].
        groups: Number of each token's group, [N]; -1: none.
        loss: Which.
        rows: Tokens read out at once.
        names: G.
        weights: Weights of the tokens, [N]; None: all are 1.
        count: What the sum is divided by in the gradient; None: only measure.

    Returns:
        Sums over the tokens.
    """
    sums = TokenSums.nothing(names, labels.device)
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        with torch.no_grad():
            guide = Teacher(teacher[1](teacher[0][part]).float().to(labels.device), loss.temperature)
        with torch.set_grad_enabled(count is not None):
            logits = student[1](student[0][part]).float()  # [n, V]
            kd, ce = loss.divergence(logits, guide, labels[part]), cross_entropy(logits, guide, labels[part])
            mixed = loss.mixed(kd, ce, None if weights is None else weights[part])
            if count is not None:
                (mixed / count).backward()  # type: ignore[no-untyped-call]
        chosen = choices(logits.detach())
        found = [torch.ones_like(kd), kd.detach(), ce.detach(), chosen == guide.best, chosen == labels[part]]
        values = torch.stack([each.double() for each in found], dim=1)  # [n, 5]
        inside = groups[part].to(labels.device).where(groups[part].to(labels.device) >= 0, names)
        sums = sums + TokenSums(torch.zeros_like(sums.values).index_add_(0, inside, values), mixed.detach().double())
    return sums

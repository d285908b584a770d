"""What a student learns: labels, a teacher's probabilities or features; row by row, then weighted, then averaged.

A language model learns token by token. It and its teacher are read out a chunk of tokens at a time, so that no tensor
is larger than `offramp.training.loss_sums.CHUNK` elements, whatever the batch, the window and the vocabulary are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.classifiers.batches import Batch
from offramp.classifiers.trainer import logits_of
from offramp.families.backbone import autocast
from offramp.training.objectives import Objective, Teacher, choices, cross_entropy, forward_kl, mixed

Targets = Callable[[Batch], Tensor]
"""What a teacher says about a batch, [B, ...], without gradients."""
Loss = tuple[Tensor, Mapping[str, Tensor]]
"""The loss of a step, and its terms by name, for the log."""


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher || student) of each row of logits, [B], in nats: T² keeps the gradient's size at every T."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"the teacher's logits have shape {list(teacher.shape)}, the student's {list(student.shape)}: they have "
            "different classes; distil from a teacher of the same ones"
        )
    return forward_kl(student, Teacher(teacher, temperature))


class Distilled(nn.Module):
    """Labels and a teacher's probabilities, each row with a weight that may change between epochs.

    The loss is the mean over the batch, see `offramp.training.objectives.mixed`. The weights are kept by the row's
    place in the training split, so no shuffling parts them from their rows.


    Args:
        rows: N, of the training split.
        teacher: Its logits [B, C]; None: labels alone.
        fraction: λ.
        temperature: T.
        weight_on: "kd", "ce" or "both": which term is weighted.
        exits: Weight of each exit's loss; None: the last exit alone.
    """

    weights: Tensor

    def __init__(
        self,
        rows: int,
        teacher: Targets | None = None,
        *,
        fraction: float = 0.9,
        temperature: float = 4.0,
        weight_on: str = "both",
        exits: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.teacher, self.fraction, self.temperature = teacher, fraction if teacher else 0.0, temperature
        self.weight_on, self.exits = weight_on, exits
        self.register_buffer("weights", torch.ones(rows))

    def forward(self, outputs: Sequence[Any], batch: Batch) -> Loss:
        """The loss of a step."""
        weights = self.weights[batch.rows.to(self.weights.device)].to(batch.labels.device)
        target = None if self.teacher is None else self.teacher(batch)
        logits = logits_of(outputs)
        if self.exits is None:
            return self._of(logits[-1], target, weights, batch.labels)
        found = [self._of(z, target, weights, batch.labels) for z in logits]
        loss = torch.stack([share * one for share, (one, _) in zip(self.exits, found, strict=True)]).sum()
        return loss, found[-1][1]

    def _of(self, logits: Tensor, target: Tensor | None, weights: Tensor, labels: Tensor) -> Loss:
        hard = F.cross_entropy(logits, labels, reduction="none")
        soft = hard if target is None else divergence(logits, target, self.temperature)
        terms = {"ce": hard.mean()} | ({} if target is None else {"kd": soft.mean()})
        return mixed(soft, hard, weights, self.fraction, self.weight_on).mean(), terms


class FeatureMatching(nn.Module):
    """SimKD (Chen et al. 2022, arXiv 2203.14001): the squared distance to the teacher's features, and nothing else.

    With weights of rows it is the student's loss of DeTT (arXiv 2302.11187).

    Args:
        rows: N, of the training split.
        teacher: Its features [B, ...], see `offramp.distillation.run`.
    """

    weights: Tensor

    def __init__(self, rows: int, teacher: Targets) -> None:
        super().__init__()
        self.teacher = teacher
        self.register_buffer("weights", torch.ones(rows))

    def forward(self, outputs: Sequence[Any], batch: Batch) -> Loss:
        """The loss of a step."""
        made, target = outputs[-1].matched, self.teacher(batch)
        if made.ndim == 4 and made.shape[2:] != target.shape[2:]:
            target = F.adaptive_avg_pool2d(target, made.shape[2:])
        distance = (made - target).square().flatten(1).mean(1)
        weights = self.weights[batch.rows.to(self.weights.device)].to(distance.device)
        return (weights * distance).mean(), {"features": distance.mean()}


class GroupDRO(nn.Module):
    """Group distributionally robust optimisation (Sagawa et al. 2020, arXiv 1911.08731), with labels.

    q_g ← q_g exp(η (ℓ_g + K / √n_g)), then normalised; the loss is Σ q_g ℓ_g with the batch's mean loss of each group,
    0 for a group that is not in it. To be used with batches balanced over groups.

    Args:
        counts: Training rows of each group, [G].
        step: η.
        adjustment: K.
    """

    q: Tensor
    margins: Tensor

    def __init__(self, counts: Tensor, *, step: float = 0.01, adjustment: float = 0.0) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("q", torch.ones(len(counts)) / len(counts))
        self.register_buffer("margins", adjustment / counts.float().sqrt(), persistent=False)

    def forward(self, outputs: Sequence[Any], batch: Batch) -> Loss:
        """The loss of a step, after q moved."""
        assert batch.groups is not None
        losses = F.cross_entropy(logits_of(outputs)[-1], batch.labels, reduction="none")
        inside = F.one_hot(batch.groups, len(self.q)).to(losses.dtype)  # [B, G]
        counts = inside.sum(0)
        means = (losses @ inside) / counts.clamp(min=1)
        if self.training:
            seen = (counts > 0).to(losses.dtype)
            q = self.q * (self.step * seen * (means.detach() + self.margins)).exp()
            self.q.copy_(q / q.sum())
        return (self.q.clone() * means).sum(), {"ce": losses.mean()}


class LearningFromFailure(nn.Module):
    """LfF (Nam et al. 2020, arXiv 2007.02561): a second network follows the shortcut, and its failures weigh more.

    The second one learns by generalised cross-entropy, whose gradient is p_y^q times that of cross-entropy. The first
    one's cross-entropy is weighted by ℓ_b / (ℓ_b + ℓ_d), of losses that are averaged over time for each row and divided
    by the largest of their class. The two are stepped by one optimiser.

    Args:
        labels: Labels of the training split, [N].
        biased: The second network, of the student's kind.
        power: q.
        memory: Share of the old value in the averages.
        precision: That the student computes in, and so does the second network.
    """

    averages: Tensor
    weights: Tensor
    labels: Tensor

    def __init__(
        self,
        labels: Tensor,
        biased: nn.Module,
        *,
        power: float = 0.7,
        memory: float = 0.7,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        self.biased, self.power, self.memory, self.precision = biased, power, memory, precision
        self.register_buffer("averages", torch.zeros(2, len(labels)))
        self.register_buffer("weights", torch.ones(len(labels)))
        self.register_buffer("labels", labels, persistent=False)

    def forward(self, outputs: Sequence[Any], batch: Batch) -> Loss:
        """The loss of a step."""
        with autocast(batch.labels.device, self.precision):
            shortcut = self.biased(batch.inputs)
        logits = [logits_of(found)[-1] for found in (shortcut, outputs)]
        losses = torch.stack([F.cross_entropy(z, batch.labels, reduction="none") for z in logits])  # [2, B]
        rows = batch.rows.to(self.averages.device)
        if self.training:
            new = losses.detach()
            self.averages[:, rows] = self.memory * self.averages[:, rows] + (1 - self.memory) * new
        now = self.averages[:, rows]
        present = torch.unique(self.labels)
        largest = torch.stack([self.averages[:, self.labels == label].amax(1) for label in present], 1)
        place = torch.searchsorted(present, batch.labels)
        scaled = now / largest[:, place].clamp(min=1e-12)
        weights = scaled[0] / scaled.sum(0).clamp(min=1e-8)
        self.weights[rows] = weights
        sure = logits[0].detach().softmax(-1).gather(1, batch.labels[:, None])[:, 0]
        failing = (self.power * sure**self.power * losses[0]).mean()
        return failing + (weights * losses[1]).mean(), {"ce": losses[1].mean(), "shortcut": losses[0].mean()}


# ---------------------------------------------------------------- token by token


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

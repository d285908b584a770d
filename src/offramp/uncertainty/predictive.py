"""From the logits of an exit to its probabilities: softmax, means over noisy logits, and the probit without draws.

Draws are made once per posterior and used for every row, exit and setting (common random numbers), so thresholds that
were found with them hold for them. The temperature divides the noisy logits, so the noise too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offramp.uncertainty.laplace import Damped

WORKING = 2**20
"""Bytes of one working array where memory allows: it fits into a processor's cache, which makes it 4 times faster."""
ARRAYS = 4
"""Working arrays that are alive at the same time."""


def draws(number: int, classes: int, seed: int) -> Tensor:
    """Standard normal draws, [number, C], float64."""
    return torch.randn(number, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Predictive(Protocol):
    """What an exit says about some rows, at any temperature."""

    def probabilities(self, temperature: float) -> Tensor:
        """[B, C], float64."""
        ...

    def log_probabilities(self, labels: Tensor, temperature: float) -> Tensor:
        """Logarithms of the labels' probabilities, [B] -> [B], float64."""
        ...


# ---------------------------------------------------------------- without noise


@dataclass(frozen=True)
class Plain:
    """softmax(z / T) of logits [B, C]."""

    logits: Tensor

    def probabilities(self, temperature: float) -> Tensor:
        """[B, C], float64."""
        return (self.logits.double() / temperature).softmax(-1)

    def log_probabilities(self, labels: Tensor, temperature: float) -> Tensor:
        """[B], float64."""
        return _own((self.logits.double() / temperature).log_softmax(-1), labels)


def _own(values: Tensor, labels: Tensor) -> Tensor:
    """[..., B, C], [B] -> [..., B]."""
    return values.gather(-1, labels.expand(values.shape[:-1])[..., None]).squeeze(-1)


# ---------------------------------------------------------------- with noise


@dataclass(frozen=True)
class Noisy:
    """The logits of some rows as Gaussians.

    Attributes:
        logits: Their means z, [B, C].
        root: Roots of the rows' spreads, [B, k].
        directions: Of the draws, [n, C].
        damped: What makes noise of the two.
        memory: Bytes that may be used for work.
    """

    logits: Tensor
    root: Tensor
    directions: Tensor
    damped: Damped
    memory: int

    def samples(self, temperature: float) -> Iterator[tuple[slice, slice, Tensor]]:
        """(z + noise) / T less its maximum over classes, in chunks that the caller may overwrite.

        Yields:
            Rows, draws, and what belongs to them, [draws, rows, C]; all draws of some rows, then the next rows.
        """
        (number, classes), rows = self.directions.shape, len(self.logits)
        numbers = max(1, min(WORKING, self.memory // ARRAYS) // (8 * classes))
        height = min(numbers, max(rows, 1))
        length = max(1, numbers // height)
        directions = self.directions / temperature
        for row in range(0, rows, height):
            part = slice(row, min(row + height, rows))
            means, root = self.logits[part].double() / temperature, self.root[part]
            for draw in range(0, number, length):
                some = slice(draw, min(draw + length, number))
                x = self.damped.noise(root, directions[some]).add_(means)
                yield part, some, x.sub_(x.amax(-1, keepdim=True))

    def probabilities(self, temperature: float) -> Tensor:
        """Mean over the draws of softmax((z + noise) / T), [B, C], float64."""
        total = self._zeros()
        for rows, _, x in self.samples(temperature):
            p = x.exp_()
            total[rows] += p.div_(p.sum(-1, keepdim=True)).sum(0)
        return total / len(self.directions)

    def log_probabilities(self, labels: Tensor, temperature: float) -> Tensor:
        """Logarithm of the labels' mean probability, [B]: what tuning needs, at half the price."""
        total = torch.full((len(self.logits),), -torch.inf, dtype=torch.float64)
        for rows, _, x in self.samples(temperature):
            own = _own(x, labels[rows])
            own -= x.exp_().sum(-1).log_()
            total[rows] = torch.logaddexp(total[rows], own.logsumexp(0))
        return total - math.log(len(self.directions))

    def moments(self, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of the drawn probabilities: mean [B, C], mean entropy [B] in nats, sum over classes of the variance [B]."""
        total, squares = self._zeros(), self._zeros()
        entropy = torch.zeros(len(self.logits), dtype=torch.float64)
        for rows, _, x in self.samples(temperature):
            p = x.exp()
            norm = p.sum(-1, keepdim=True)
            p /= norm
            total[rows] += p.sum(0)
            entropy[rows] += (norm.log().squeeze(-1) - x.mul_(p).sum(-1)).sum(0)
            squares[rows] += p.square_().sum(0)
        number = len(self.directions)
        mean = total / number
        return mean, entropy / number, (squares / number - mean.square()).sum(-1).clamp(min=0)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.logits.shape, dtype=torch.float64)


# ---------------------------------------------------------------- the same without draws


@dataclass(frozen=True)
class Shrunk:
    """The anchored, centred probit: logits that shrink where they are unsure. The argmax stays.

    MacKay (1992) for two classes; the usual form for C classes (Gibbs, 1997) divides every logit by its own
    √(1 + π/8 variance), which depends on the offset of the logits and counts the noise that all share. Differs in
    taking variances of centred logits, and in measuring logits from their maximum.

    Attributes:
        logits: [B, C].
        variance: Of the centred logits, diag(P Σ P), [B, C].
    """

    logits: Tensor
    variance: Tensor

    def probabilities(self, temperature: float) -> Tensor:
        """[B, C], float64."""
        return self._scaled(temperature).softmax(-1)

    def log_probabilities(self, labels: Tensor, temperature: float) -> Tensor:
        """[B], float64."""
        return _own(self._scaled(temperature).log_softmax(-1), labels)

    def _scaled(self, temperature: float) -> Tensor:
        z = self.logits.double()
        z = z - z.amax(-1, keepdim=True)
        return z / (1 + math.pi / 8 / temperature**2 * self.variance).sqrt() / temperature

"""From the logits of an exit to its probabilities, and what that costs: softmax, noisy means, probit, ensembles.

Draws are made once per posterior and used for every row, exit and setting (common random numbers), so thresholds that
were found with them hold for them. The temperature divides the noisy logits, so the noise too.

The model-internal ensemble averages what an exit says with what all exits before it said: Meronen et al. (2023),
"Fixing Overconfidence in Dynamic Neural Networks", section 3.2. The weight of an exit is its cumulative cost, so
deeper exits count more. Probabilities are averaged, not logits.

FLOPs are given as published, and counted: every addition, subtraction, multiplication, division, root and exponential
from the logits to the probabilities, one FLOP each (so two per multiply-add); comparisons are free. What is worked out
once per exit for all rows (Cholesky factors, directions of draws) is not in it. The softmax that any exit needs is:
"vanilla" has that alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


# ---------------------------------------------------------------- the model-internal ensemble


def ensemble_weights(costs: Tensor) -> Tensor:
    """w_e = c_e / c_E of cumulative costs [E], float64; a ValueError if one is not positive."""
    if not bool((costs > 0).all()):
        raise ValueError(f"costs are {costs.tolist()}; an ensemble weighs exits by them, so they must be positive")
    return costs.double() / costs[-1].double()


def ensemble_join(probabilities: Tensor, carried: Tensor | None, weight: Tensor, exit: int) -> tuple[Tensor, Tensor]:
    """p_e of the ensemble = Σ_{l≤e} w_l p_l / Σ_{l≤e} w_l, at exit e counted from 0, with weights [E] of all exits.

    Returns:
        The ensemble's probabilities [..., C], and the sum Σ_{l≤e} w_l p_l to carry on; it begins as None.
    """
    total = probabilities * weight[exit] if carried is None else carried + probabilities * weight[exit]
    return total / weight[: exit + 1].sum(), total


def ensemble_join_logarithms(
    log_probability: Tensor, carried: Tensor | None, weight: Tensor, exit: int
) -> tuple[Tensor, Tensor]:
    """`ensemble_join` for logarithms of probabilities, which may be as small as they like."""
    total = log_probability + math.log(float(weight[exit]))
    if carried is not None:
        total = torch.logaddexp(carried, total)
    return total - math.log(float(weight[: exit + 1].sum())), total


# ---------------------------------------------------------------- what it costs


class Overhead(NamedTuple):
    """FLOPs per row at an exit.

    Attributes:
        formula: Of Meronen et al. (2023); 0 where there is no Laplace approximation by sampling.
        counted: Of what is done here.
    """

    formula: int
    counted: int


def published_flops(features: int, classes: int, n_mc: int) -> int:
    """2 c n + 2 p² + 5 p + 2: a quadratic form of p + 1 numbers, one scale and one addition per class and draw.

    It leaves out the root, the division by T, the n softmaxes and their mean. p is without the bias's one.

    Returns:
        FLOPs per row.
    """
    return 2 * classes * n_mc + 2 * features**2 + 5 * features + 2


def softmax_flops(classes: int) -> int:
    """Less the maximum, exponentials, their sum, quotients."""
    return 4 * classes - 1


def spread_flops(inputs: int, classes: int, damping: str) -> int:
    """Of `Damped.spread`, for m inputs of the head."""
    if damping == "factored":
        return inputs**2 + 2 * inputs - 1  # a triangular solve and a squared norm
    # a turn, squares, and their products with the variances
    return inputs * (2 * inputs - 1) + inputs + classes * (2 * inputs - 1)


def sampled_flops(classes: int, n_mc: int, damping: str) -> int:
    """Of the mean over draws, once the spread is known."""
    roots = 1 if damping == "factored" else classes
    turn = 0 if damping == "factored" else classes * (2 * classes - 1)
    draw = classes + turn + classes + softmax_flops(classes)  # scale, turn, add, softmax
    return roots + classes + n_mc * draw + (n_mc - 1) * classes + classes  # roots, z / T, draws, their sum, / n


def probit_flops(classes: int, damping: str) -> int:
    """Of the probit, once the spread is known."""
    variance = classes if damping == "factored" else classes * (2 * classes - 1)
    return variance + 5 * classes + softmax_flops(classes)  # + 1, root, less the maximum, / root, / T


def ensemble_flops(classes: int, exit: int) -> int:
    """Of one exit's part in the ensemble, exits counted from 0: a weight, a sum but at the first, a quotient."""
    return (2 if exit == 0 else 3) * classes

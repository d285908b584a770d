"""Last-layer Laplace at a linear exit: Kronecker factors of its Hessian in closed form, and the noise of its logits.

Meronen et al. (2023), "Fixing Overconfidence in Dynamic Neural Networks"; Daxberger et al. (2021), "Laplace Redux". For
a linear softmax head the exact-expectation KFAC of the generalised Gauss-Newton matrix is A ⊗ G with

    A = (1/N) Σ φ φᵀ,  G = (1/N) Σ (diag(p) - p pᵀ),

one pass, no labels, no autograd. Differs from the published code, which samples labels and keeps a moving average over
about the last twenty batches.

Damping, with prior variance ω: "factored" is the published H ≈ (√N A + ω^(-1/2) I) ⊗ (√N G + ω^(-1/2) I); "exact" is
H = N A ⊗ G + I / ω, by eigenvectors, which costs C² operations more per row and draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offramp.uncertainty.checks import require_finite
from offramp.uncertainty.cholesky import cholesky
from offramp.uncertainty.outputs import augmented

# ---------------------------------------------------------------- factors


@dataclass(frozen=True)
class Factors:
    """Sums over the rows seen so far; those of several workers are merged by addition.

    Attributes:
        features: Σ φ φᵀ, [m, m], float64; m = D + 1 with a bias, else D.
        classes: Σ (diag(p) - p pᵀ), [C, C], float64.
        rows: N.
        bias: Whether the head has a bias: then a one is put behind the features.
    """

    features: Tensor
    classes: Tensor
    rows: int
    bias: bool = True

    @classmethod
    def empty(cls, width: int, classes: int, *, bias: bool = True) -> Factors:
        """Of no rows, for features of this width D."""
        m = width + bias
        zeros = [torch.zeros(size, size, dtype=torch.float64) for size in (m, classes)]
        return cls(zeros[0], zeros[1], 0, bias)

    def update(self, features: Tensor, logits: Tensor) -> Factors:
        """The sums with these rows added.

        Args:
            features: [B, D].
            logits: Of the head, at temperature 1, [B, C].

        Returns:
            New sums; these stay.

        Raises:
            ValueError: A row is not finite.
        """
        require_finite("the features", features, self.rows)
        require_finite("the logits", logits, self.rows)
        f = inputs(features, self.bias)
        p = logits.double().softmax(-1)
        return Factors(
            torch.addmm(self.features, f.mT, f),
            self.classes + p.sum(0).diag() - p.mT @ p,
            self.rows + len(f),
            self.bias,
        )

    def merge(self, other: Factors) -> Factors:
        """The sums over the rows of both."""
        return Factors(
            self.features + other.features, self.classes + other.classes, self.rows + other.rows, self.bias
        )  # fmt: skip


def inputs(features: Tensor, bias: bool) -> Tensor:
    """What the head's weights are multiplied with, [..., m], float64."""
    return augmented(features) if bias else features.double()


# ---------------------------------------------------------------- damped: the noise of the logits


class Damped(Protocol):
    """A Gaussian over an exit's logits around z: what its spread at a row is, and how draws become noise.

    The spread [B, k] is all that depends on the row: k = 1 for the factored damping, C for the exact one.
    """

    @property
    def jitters(self) -> tuple[float, float]:
        """What was added to the diagonals of the feature and the class factor, as shares of their means."""
        ...

    def spread(self, features: Tensor) -> Tensor:
        """Of each row, [B, D] -> [B, k]."""
        ...

    def directions(self, draws: Tensor) -> Tensor:
        """What does not depend on the row, of standard normal draws, [n, C] -> [n, C]."""
        ...

    def noise(self, root: Tensor, directions: Tensor) -> Tensor:
        """Of the logits: roots of spreads [B, k] and directions [n, C] -> [n, B, C]."""
        ...

    def centred(self) -> Tensor:
        """diag(P Σ P) = spread @ this, [k, C], for the covariance Σ of the logits and P = I - 11ᵀ/C."""
        ...


@dataclass(frozen=True)
class Factored:
    """H ≈ Ṽ ⊗ Ũ, so that the logits' covariance is s(x) Ũ⁻¹ with s(x) = φᵀ Ṽ⁻¹ φ.

    Attributes:
        feature_root: Cholesky factor of Ṽ = √N A + ω^(-1/2) I, [m, m], lower.
        class_root: Of Ũ = √N G + ω^(-1/2) I, [C, C].
        bias: As in `Factors`.
        jitters: What had to be added to the two diagonals, as shares of their means; usually 0.
    """

    feature_root: Tensor
    class_root: Tensor
    bias: bool = True
    jitters: tuple[float, float] = (0.0, 0.0)

    def spread(self, features: Tensor) -> Tensor:
        """s(x) of each row, [B, D] -> [B, 1]: one triangular solve."""
        f = inputs(features, self.bias)
        half: Tensor = torch.linalg.solve_triangular(self.feature_root, f.mT, upper=False)
        return half.square().sum(0)[:, None]

    def directions(self, draws: Tensor) -> Tensor:
        """ε with covariance Ũ⁻¹, [n, C] -> [n, C]."""
        solved: Tensor = torch.linalg.solve_triangular(self.class_root.mT, draws.mT, upper=True)
        return solved.mT.contiguous()

    def noise(self, root: Tensor, directions: Tensor) -> Tensor:
        """√s ε, [B, 1], [n, C] -> [n, B, C]."""
        return root * directions[:, None]

    def centred(self) -> Tensor:
        """diag(P Ũ⁻¹ P), [1, C]."""
        half: Tensor = torch.linalg.solve_triangular(self.class_root, _centring(self.class_root), upper=False)
        return half.square().sum(0)[None]


@dataclass(frozen=True)
class Exact:
    """H = N A ⊗ G + I / ω, so that the logits' covariance is Q_G diag(v(x)) Q_Gᵀ.

    Immer et al. (2021), "Improving predictions of Bayesian neural nets via local linearization", appendix.

    Attributes:
        feature_basis: Eigenvectors Q_A of A, [m, m].
        class_basis: Q_G of G, [C, C].
        variance: 1 / (N λ_A λ_G + 1/ω), [m, C].
        bias: As in `Factors`.
        jitters: None are ever needed.
    """

    feature_basis: Tensor
    class_basis: Tensor
    variance: Tensor
    bias: bool = True
    jitters: tuple[float, float] = (0.0, 0.0)

    def spread(self, features: Tensor) -> Tensor:
        """v(x) = (Q_Aᵀ φ)² @ variance, the variances along Q_G, [B, D] -> [B, C]."""
        return (inputs(features, self.bias) @ self.feature_basis).square() @ self.variance

    def directions(self, draws: Tensor) -> Tensor:
        """The draws themselves: they are turned when it is known how long they are."""
        return draws.clone()

    def noise(self, root: Tensor, directions: Tensor) -> Tensor:
        """Q_G (√v ∘ g), [B, C], [n, C] -> [n, B, C]."""
        return (root * directions[:, None]) @ self.class_basis.mT

    def centred(self) -> Tensor:
        """(P Q_G)², transposed, [C, C]."""
        return (_centring(self.class_basis) @ self.class_basis).square().mT.contiguous()


def _centring(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype) - 1 / len(like)


def damping(factors: Factors, kind: str, *, evidence: float = 1.0, name: str = "the exit") -> Callable[[float], Damped]:
    """From a prior variance ω > 0 to the damped Hessian; what does not depend on ω is worked out once.

    Args:
        factors: Of at least one row.
        kind: "factored" or "exact".
        evidence: Multiplies N, in (0, 1]: rows that depend on each other, such as tokens, say less than their number.
        name: Of the exit, for errors.

    Returns:
        The function.
    """
    a, g = factors.features / factors.rows, factors.classes / factors.rows
    rows = factors.rows * evidence
    sizes = f"(N = {factors.rows}, D = {len(a) - factors.bias}, C = {len(g)})"

    if kind == "exact":
        (a_values, a_basis), (g_values, g_basis) = torch.linalg.eigh(a), torch.linalg.eigh(g)
        curvature = rows * a_values.clamp(min=0)[:, None] * g_values.clamp(min=0)  # [m, C]
        return lambda omega: Exact(a_basis, g_basis, 1 / (curvature + 1 / omega), factors.bias)

    def factored(omega: float) -> Factored:
        def root(which: str, matrix: Tensor) -> tuple[Tensor, float]:
            prior = torch.eye(len(matrix), dtype=matrix.dtype) / math.sqrt(omega)
            return cholesky(math.sqrt(rows) * matrix + prior, f"the {which} factor of {name} {sizes}")

        (feature_root, first), (class_root, second) = root("feature", a), root("class", g)
        return Factored(feature_root, class_root, factors.bias, (first, second))

    return factored

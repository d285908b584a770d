"""Last-layer Laplace at a linear exit: Kronecker factors of its Hessian in closed form, and the noise of its logits.

Meronen et al. (2023), "Fixing Overconfidence in Dynamic Neural Networks"; Daxberger et al. (2021), "Laplace Redux". For
a linear softmax head the exact-expectation KFAC of the generalised Gauss-Newton matrix is A ⊗ G with

    A = (1/N) Σ φ φᵀ,  G = (1/N) Σ (diag(p) - p pᵀ),

one pass, no labels, no autograd. Differs from the published code, which samples labels and keeps a moving average over
about the last twenty batches. A row is an example with C classes, or a token with V of them, of which only the diagonal
of G is kept.

Damping, with prior variance ω: "factored" is the published H ≈ (√N A + ω^(-1/2) I) ⊗ (√N G + ω^(-1/2) I); "exact" is
H = N A ⊗ G + I / ω, by eigenvectors, which costs C² operations more per row and draw. What is factored gives the logits
the covariance s(φ) Ũ⁻¹ with s(φ) = φᵀ Ṽ⁻¹ φ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from offramp.uncertainty.outputs import augmented, require_finite

JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)

# ---------------------------------------------------------------- factors


@dataclass(frozen=True)
class Factors:
    """Sums over the rows seen so far; those of several workers are merged by addition.

    Attributes:
        features: Σ φ φᵀ, [m, m], float64; m = D + 1 with a bias, else D.
        classes: Σ (diag(p) - p pᵀ), [C, C], float64, or its diagonal alone, [C].
        rows: N.
        bias: Whether the head has a bias: then a one is put behind the features.
    """

    features: Tensor
    classes: Tensor
    rows: int
    bias: bool = True

    @classmethod
    def empty(cls, width: int, classes: int, *, bias: bool = True, diagonal: bool = False) -> Factors:
        """Of no rows, for features of this width D."""
        m = width + bias
        g = torch.zeros((classes,) if diagonal else (classes, classes), dtype=torch.float64)
        return cls(torch.zeros(m, m, dtype=torch.float64), g, 0, bias)

    def update(self, features: Tensor, logits: Tensor) -> Factors:
        """The sums with these rows added, which stay; they may lie on another device.

        Args:
            features: [B, D].
            logits: Of the head, at temperature 1, [B, C].

        Returns:
            New sums, on the CPU.

        Raises:
            ValueError: A row is not finite.
        """
        require_finite("the features", features, self.rows)
        require_finite("the logits", logits, self.rows)
        f = inputs(features, self.bias).cpu()
        if self.classes.ndim == 1:  # C is large: in float64 these would be the largest tensors of all
            p = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
            g = (p * (1 - p)).sum(0, dtype=torch.float64).cpu()
        else:
            p = logits.double().softmax(-1).cpu()
            g = p.sum(0).diag() - p.mT @ p
        return Factors(torch.addmm(self.features, f.mT, f), self.classes + g, self.rows + len(f), self.bias)

    def merge(self, other: Factors) -> Factors:
        """The sums over the rows of both."""
        return replace(
            self, features=self.features + other.features, classes=self.classes + other.classes,
            rows=self.rows + other.rows,
        )  # fmt: skip


def inputs(features: Tensor, bias: bool) -> Tensor:
    """What the head's weights are multiplied with, [..., m], float64."""
    return augmented(features) if bias else features.double()


# ---------------------------------------------------------------- damped: the noise of the logits


@dataclass(frozen=True)
class Factored:
    """H ≈ Ṽ ⊗ Ũ, so that the logits' covariance is s(x) Ũ⁻¹ with s(x) = φᵀ Ṽ⁻¹ φ.

    Attributes:
        feature_root: Cholesky factor of Ṽ = √N A + ω^(-1/2) I, [m, m], lower.
        class_root: Of Ũ = √N G + ω^(-1/2) I, [C, C]; of a diagonal one its roots, [C].
        bias: As in `Factors`.
        jitters: What was added to the diagonals of the two, as shares of their means; usually 0.
    """

    feature_root: Tensor
    class_root: Tensor
    bias: bool = True
    jitters: tuple[float, float] = (0.0, 0.0)

    def spread(self, features: Tensor) -> Tensor:
        """s(x), all that depends on the row, [B, D] -> [B, 1]."""
        return quadratic(self.feature_root, inputs(features, self.bias))[:, None]

    def directions(self, draws: Tensor) -> Tensor:
        """What does not depend on the row: ε with covariance Ũ⁻¹ of standard normal draws, [n, C] -> [n, C]."""
        return correlated(self.class_root, draws)

    def noise(self, root: Tensor, directions: Tensor) -> Tensor:
        """Of the logits, √s ε: roots of spreads [B, 1] and directions [n, C] -> [n, B, C]."""
        return root * directions[:, None]

    def centred(self) -> Tensor:
        """diag(P Σ P) = spread @ this, [1, C], for the covariance Σ of the logits and P = I - 11ᵀ/C."""
        half: Tensor = torch.linalg.solve_triangular(self.class_root, _centring(self.class_root), upper=False)
        return half.square().sum(0)[None]


def quadratic(root: Tensor, f: Tensor) -> Tensor:
    """φᵀ (R Rᵀ)⁻¹ φ of each row: a triangular solve, [m, m], [B, m] -> [B]."""
    half: Tensor = torch.linalg.solve_triangular(root, f.mT, upper=False)
    return half.square().sum(0)


def correlated(root: Tensor, draws: Tensor) -> Tensor:
    """Draws with covariance (R Rᵀ)⁻¹ of standard normal ones, [C, C], [n, C] -> [n, C]; R diagonal: its roots, [C]."""
    if root.ndim == 1:
        return draws / root
    solved: Tensor = torch.linalg.solve_triangular(root.mT, draws.mT, upper=True)
    return solved.mT.contiguous()


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

    What depends on the row is the spread, here [B, C]; see `Factored` for what its methods are for.
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


Damped = Factored | Exact
"""A Gaussian over an exit's logits around z."""


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
        The function, which raises a ValueError where a factor is singular.
    """
    a, g = factors.features / factors.rows, factors.classes / factors.rows
    rows = factors.rows * evidence
    sizes = f"(N = {factors.rows}, D = {len(a) - factors.bias}, C = {len(g)})"

    if kind == "exact":
        (a_values, a_basis), (g_values, g_basis) = torch.linalg.eigh(a), torch.linalg.eigh(g)
        curvature = rows * a_values.clamp(min=0)[:, None] * g_values.clamp(min=0)  # [m, C]
        return lambda omega: Exact(a_basis, g_basis, 1 / (curvature + 1 / omega), factors.bias)

    def factored(omega: float) -> Factored:
        feature_root, first = damped_root(a, rows, omega, f"the feature factor of {name} {sizes}")
        class_root, second = damped_root(g, rows, omega, f"the class factor of {name} {sizes}")
        return Factored(feature_root, class_root, factors.bias, (first, second))

    return factored


def with_prior(matrix: Tensor, rows: float, omega: float) -> Tensor:
    """√N M + ω^(-1/2) I of M [m, m], or of its diagonal [m]."""
    prior = torch.ones(len(matrix), dtype=matrix.dtype) / math.sqrt(omega)
    return math.sqrt(rows) * matrix + (prior if matrix.ndim == 1 else prior.diag())


def damped_root(matrix: Tensor, rows: float, omega: float, name: str) -> tuple[Tensor, float]:
    """Its lower Cholesky factor [m, m], of a diagonal the roots [m], and what had to be added, see `cholesky`."""
    damped = with_prior(matrix, rows, omega)
    return (damped.sqrt(), 0.0) if damped.ndim == 1 else cholesky(damped, name)


def cholesky(matrix: Tensor, name: str) -> tuple[Tensor, float]:
    """The lower factor R of M = R Rᵀ, with as little added to the diagonal as needed.

    Args:
        matrix: [m, m], symmetric but for rounding; worked on in float64.
        name: What it is, for errors, such as "the feature factor of exit 2 (N = 100, D = 64, C = 10)".

    Returns:
        R [m, m], float64, and the jitter: how many times the mean of the diagonal was added to it; 0 if nothing was.

    Raises:
        ValueError: The matrix is not finite, or is singular even with the largest jitter.
    """
    matrix = matrix.double()
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite; look at the features and logits it was made of")
    matrix = (matrix + matrix.mT) / 2
    unit = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) * matrix.diagonal().mean()
    for jitter in JITTERS:
        factor, failed = torch.linalg.cholesky_ex(matrix + jitter * unit)
        if not int(failed):
            return factor, jitter
    smallest = float(torch.linalg.eigvalsh(matrix)[0])
    raise ValueError(
        f"{name} is singular: its smallest eigenvalue is {smallest:.3g}, and adding {JITTERS[-1]:g} of the mean "
        "diagonal did not help; fit on more rows or with a smaller prior variance"
    )

"""Bayesian linear regression on the features of every exit, its two variances learnt from the data.

Per exit, on features with a one behind them, h [m], and standardised targets: weights w ~ N(w₀, I/η), targets
y ~ N(hᵀw, 1/β). The posterior is N(μ, Σ) with Σ = (ηI + β·XᵀX)⁻¹ and μ = w₀ + β·Σ·Xᵀ(y - Xw₀); a prediction has the
mean hᵀμ, the epistemic variance hᵀΣh and the noise variance σ² = 1/β. MacKay (1992), "Bayesian Interpolation"; Bishop
(2006), section 3.5; at exits: Jazbec et al. (2024), "Early-Exit Neural Networks with Nested Prediction Sets".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from offramp.uncertainty.outputs import augmented
from offramp.values import choice

CHUNK = 8192
"""Rows that are worked on at a time."""
LARGEST = 1e12
"""Of η and β: beyond it the data say that there are no weights, or no noise."""


@dataclass(frozen=True)
class BayesianRegressionConfig:
    """How the variances are learnt.

    Attributes:
        prior_mean: "zero", or "head": the trained heads, which `fit` is then given.
        start: First value of η and β.
        tolerance: The fixed point is reached when both change by less, relative to their values.
        max_steps: At most so many steps; the best evidence is kept if they do not do.
    """

    prior_mean: Literal["zero", "head"] = "zero"
    start: float = 1e-5
    tolerance: float = 1e-5
    max_steps: int = 1000

    def __post_init__(self) -> None:
        choice("prior_mean", self.prior_mean, ("zero", "head"))
        if not (self.start > 0 and self.tolerance > 0 and self.max_steps >= 1):
            raise ValueError(
                f"start {self.start}, tolerance {self.tolerance}, max_steps {self.max_steps}; all must be positive"
            )


@dataclass(frozen=True)
class LastLayer:
    """The posterior of one exit, for standardised targets.

    Attributes:
        mean: μ, [m], float64.
        root: The symmetric square root of Σ, [m, m], float64: `root @ root` is Σ.
        noise: σ² = 1/β.
        prior_precision: η.
        evidence: ln p(y | η, β), of the standardised targets.
        steps: That the fixed point took.
        converged: Whether it was reached.
    """

    mean: Tensor
    root: Tensor
    noise: float
    prior_precision: float
    evidence: float
    steps: int
    converged: bool


@dataclass(frozen=True)
class BayesianRegression:
    """The posteriors of all exits.

    Attributes:
        exits: One per exit, shallow to deep.
        location: Mean of the targets that it was fitted on.
        scale: Their standard deviation.
        rows: N, their number.
        config: How it was fitted.
    """

    exits: tuple[LastLayer, ...]
    location: float
    scale: float
    rows: int
    config: BayesianRegressionConfig


@dataclass(frozen=True)
class RegressionPrediction:
    """What all exits predict for N rows, in the units of the targets.

    Attributes:
        mean: [E, N], float64.
        epistemic: Variance for not knowing the weights, [E, N], float64.
        noise: Variance of the targets about the truth, [E], float64.
    """

    mean: Tensor
    epistemic: Tensor
    noise: Tensor

    @property
    def total(self) -> Tensor:
        """Variance of a new target, [E, N]."""
        return self.epistemic + self.noise.unsqueeze(-1)


def fit(
    features: Sequence[Tensor],
    targets: Tensor,
    config: BayesianRegressionConfig | None = None,
    *,
    heads: Sequence[Tensor] | None = None,
) -> BayesianRegression:
    """Fit every exit, in float64, with one eigendecomposition each.

    Use rows that the network was not trained on if it interpolates its training data: else the noise comes out far too
    small.

    Args:
        features: Inputs of each exit's last linear layer, E tensors [N, D_e], without the bias's one.
        targets: [N].
        config: How; the default starts from a prior mean of zero.
        heads: With `prior_mean="head"` the trained weights of each exit, E tensors [D_e + 1], the bias last, in units
            of the targets.

    Returns:
        The posteriors.

    Raises:
        ValueError: Numbers that are not finite, too few rows, or shapes that do not fit.
    """
    config = config or BayesianRegressionConfig()
    rows = _checked(features, targets)
    if (heads is not None) != (config.prior_mean == "head") or (heads is not None and len(heads) != len(features)):
        raise ValueError(
            f"prior_mean is {config.prior_mean!r} and heads of {len(heads or ())} exits are given; with 'head' give "
            f"those of all {len(features)} exits, with 'zero' none"
        )
    y = targets.double()
    location, scale = float(y.mean()), float(y.std(correction=0)) or 1.0
    exits = []
    for number, inputs in enumerate(features, start=1):
        prior = torch.zeros(inputs.shape[1] + 1, dtype=torch.float64)
        if heads is not None:
            prior = heads[number - 1].double().flatten() / scale
            prior[-1] -= location / scale
        exits.append(_fit_exit(inputs, (y - location) / scale, prior, config, f"exit {number}"))
    return BayesianRegression(tuple(exits), location, scale, rows, config)


def apply(state: BayesianRegression, features: Sequence[Tensor]) -> RegressionPrediction:
    """Means and variances of rows, E tensors [N, D_e], in the units of the targets; refused as by `require_fitting`."""
    require_fitting(state, features)
    inputs = [augmented(f) for f in features]
    mean = torch.stack([h @ exit.mean for h, exit in zip(inputs, state.exits, strict=True)])
    spread = torch.stack([(h @ exit.root).square().sum(dim=1) for h, exit in zip(inputs, state.exits, strict=True)])
    noise = torch.tensor([exit.noise for exit in state.exits], dtype=torch.float64)
    return RegressionPrediction(
        state.location + state.scale * mean, state.scale**2 * spread, state.scale**2 * noise
    )  # fmt: skip


def require_fitting(state: BayesianRegression, features: Sequence[Tensor]) -> None:
    """Raise a ValueError if the number of exits or a width is another one than in the fit."""
    have, asked = [f.shape[-1] + 1 for f in features], [len(exit.mean) for exit in state.exits]
    if have != asked:
        raise ValueError(
            f"features have the widths {[m - 1 for m in have]}; the regression was fitted on {[m - 1 for m in asked]}"
        )


def _checked(features: Sequence[Tensor], targets: Tensor) -> int:
    """The number of rows that a fit is given; a ValueError as it says."""
    if targets.ndim != 1 or len(targets) < 2:
        raise ValueError(f"targets have shape {list(targets.shape)}; one number for each of at least 2 rows is needed")
    if not features or any(f.ndim != 2 or len(f) != len(targets) for f in features):
        shapes = [list(f.shape) for f in features]
        raise ValueError(f"features have the shapes {shapes}; one matrix of {len(targets)} rows per exit is needed")
    if not bool(targets.isfinite().all()):
        raise ValueError(f"the target of row {int((~targets.isfinite()).nonzero()[0])} is not finite; leave it out")
    for number, inputs in enumerate(features, start=1):
        wrong = ~inputs.isfinite().all(dim=1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(f"features of row {row} at exit {number} are not finite; leave the row out")
    return len(targets)


class _Sums(NamedTuple):
    """The least-squares problem in the eigenvectors of XᵀX: all that a step needs, O(m) of it."""

    eigenvalues: Tensor  # [m], of XᵀX
    moments: Tensor  # [m], Xᵀr in the eigenvectors, r = y - Xw₀
    square: float  # rᵀr
    rows: int


def _fit_exit(inputs: Tensor, targets: Tensor, prior: Tensor, config: BayesianRegressionConfig, name: str) -> LastLayer:
    width = inputs.shape[1] + 1
    gram = torch.zeros(width, width, dtype=torch.float64)
    cross, square = torch.zeros(width, dtype=torch.float64), 0.0
    for start in range(0, len(targets), CHUNK):
        x, y = augmented(inputs[start : start + CHUNK]), targets[start : start + CHUNK]
        rest = y - x @ prior
        gram += x.mT @ x
        cross += x.mT @ rest
        square += float(rest @ rest)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    sums = _Sums(eigenvalues.clamp(min=0), vectors.mT @ cross, square, len(targets))
    eta, beta, evidence, steps, converged = _empirical_bayes(sums, config)
    if not converged:
        warnings.warn(
            f"{name}: the variances did not settle in {steps} steps; those of the best evidence are kept", stacklevel=3
        )
    if beta >= LARGEST:
        warnings.warn(
            f"{name} interpolates the rows it was fitted on, no noise is left; fit on rows the network has not seen",
            stacklevel=3,
        )
    precision = eta + beta * sums.eigenvalues
    mean = prior + vectors @ (beta * sums.moments / precision)
    root = (vectors * precision.rsqrt()) @ vectors.mT
    return LastLayer(mean, root, 1 / beta, eta, evidence, steps, converged)


def _empirical_bayes(sums: _Sums, config: BayesianRegressionConfig) -> tuple[float, float, float, int, bool]:
    """MacKay's fixed point: γ = Σ λ/(λ + η), η <- γ/‖μ - w₀‖², 1/β <- ‖y - Xμ‖²/(N - γ), with N - γ at least 1.

    Returns:
        η, β, their log evidence, steps, whether it converged.
    """
    eta = beta = config.start
    best = (eta, beta, _evidence(sums, eta, beta))
    for step in range(1, config.max_steps + 1):
        scaled = beta * sums.eigenvalues
        weights = beta * sums.moments / (scaled + eta)
        gamma = float((scaled / (scaled + eta)).sum())
        before = eta, beta
        eta = _bounded(gamma / max(float(weights @ weights), 1 / LARGEST**2))
        beta = _bounded(max(sums.rows - gamma, 1.0) / max(_residual(sums, weights), 1 / LARGEST**2))
        evidence = _evidence(sums, eta, beta)
        if evidence > best[2]:
            best = (eta, beta, evidence)
        if all(math.isclose(a, b, rel_tol=config.tolerance) for a, b in zip(before, (eta, beta), strict=True)):
            return eta, beta, evidence, step, True
    return *best, config.max_steps, False


def _bounded(value: float) -> float:
    return min(max(value, 1 / LARGEST), LARGEST)


def _residual(sums: _Sums, weights: Tensor) -> float:
    """‖r - Xw‖², with w in the eigenvectors."""
    return max(sums.square - float(weights @ (2 * sums.moments - sums.eigenvalues * weights)), 0.0)


def _evidence(sums: _Sums, eta: float, beta: float) -> float:
    """Log of p(y | η, β); Bishop (2006), equation 3.86."""
    precision = eta + beta * sums.eigenvalues
    weights = beta * sums.moments / precision
    energy = beta * _residual(sums, weights) + eta * float(weights @ weights)
    logs = len(precision) * math.log(eta) + sums.rows * math.log(beta / (2 * math.pi)) - float(precision.log().sum())
    return (logs - energy) / 2

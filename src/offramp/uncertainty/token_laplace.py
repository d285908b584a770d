"""Last-layer Laplace at the exits of a language model: a posterior over the head's rows of the candidate tokens.

The head is linear, so the Hessian of its loss at N tokens, in Kronecker form, is A ⊗ G with A = mean(φ φᵀ) of the
readout inputs φ and G = mean(diag(p) - p pᵀ) of the probabilities. Only the rows of the candidates S are uncertain, all
others stay as they were trained: G is restricted to S (p is that of the whole vocabulary), which leaves it positive
definite. By default only its diagonal is kept, so that S may differ from token to token. Damping is factored, as
published (Meronen et al. 2023, arXiv 2302.06359): Ṽ = √N·A + I/√ω, Ũ = √N·G + I/√ω, and the logits of a token have the
covariance s(φ)·Ũ⁻¹ with s(φ) = φᵀṼ⁻¹φ. What is predicted is the mean of the softmax over stored draws.

A soft cap of the logits acts on the logits that noise is added to; its derivative is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from offramp.uncertainty.cholesky import cholesky
from offramp.uncertainty.outputs import augmented
from offramp.uncertainty.shortlist import Shortlist

DENSE = 4096
"""Most candidates of a class factor that is kept whole."""
_BUDGET = 1 << 24  # elements of perturbed logits held at once


@dataclass(frozen=True)
class LaplaceConfig:
    """How the posterior is made and used.

    Attributes:
        draws: n_MC.
        seed: Of the draws.
        evidence: What the number of tokens is multiplied with, in (0, 1]: tokens of one text are not independent.
        rank: s(φ) from this many eigen-directions of Ṽ⁻¹, those that deviate most from their median; None: exactly.
        rest_as_rival: Let the rest count as a second token: p̄_(1) - max(p̄_(2), p̄_rest).
    """

    draws: int = 20
    seed: int = 0
    evidence: float = 0.1
    rank: int | None = None
    rest_as_rival: bool = False

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}; at least one is needed")
        if not 0 < self.evidence <= 1:
            raise ValueError(f"evidence is {self.evidence}; it is a share of the tokens, in (0, 1]")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}; give at least one direction, or None for all")


def standard_draws(config: LaplaceConfig, vocabulary: int) -> Tensor:
    """Standard normal numbers that belong to token ids, the same at every exit and step, [n_MC, V]."""
    return torch.randn(config.draws, vocabulary, generator=torch.Generator().manual_seed(config.seed))


class Factors:
    """Sums of A and G over the tokens of one exit, in float64, from batch to batch.

    Args:
        width: D, of the readout inputs.
        vocabulary: V.
        bias: Whether the head has a bias, which is one more weight.
        members: A fixed candidate set, ids [k] with k <= 4096, whose G is kept whole; None: the diagonal over all V.

    Raises:
        ValueError: The fixed candidate set is too large.
    """

    def __init__(self, width: int, vocabulary: int, *, bias: bool = False, members: Tensor | None = None) -> None:
        if members is not None and len(members) > DENSE:
            raise ValueError(
                f"the fixed candidate set has {len(members)} tokens; a whole class factor is for at most {DENSE}, "
                "leave the set away for a diagonal one"
            )
        self.rows, self.bias, self.members, self.vocabulary = 0, bias, members, vocabulary
        self.features = torch.zeros(width + bias, width + bias, dtype=torch.float64)
        shape = (vocabulary,) if members is None else (len(members),) * 2
        self.classes = torch.zeros(shape, dtype=torch.float64)

    def add(self, x: Tensor, logits: Tensor) -> None:
        """Add N tokens.

        Args:
            x: Readout inputs, [N, D].
            logits: On the whole vocabulary, [N, V].

        Raises:
            ValueError: Something is not finite.
        """
        if not bool(x.isfinite().all() & logits.isfinite().all()):
            row = int((~(x.isfinite().all(-1) & logits.isfinite().all(-1))).nonzero()[0])
            raise ValueError(f"token {self.rows + row} has a readout input or logits that are not finite")
        phi = (augmented(x) if self.bias else x.double()).cpu()
        self.features.addmm_(phi.mT, phi)
        p = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
        if self.members is None:
            self.classes += (p * (1 - p)).sum(0, dtype=torch.float64).cpu()
        else:
            chosen = p[:, self.members].double().cpu()
            self.classes += chosen.sum(0).diag() - chosen.mT @ chosen
        self.rows += len(x)

    def merge(self, other: Factors) -> None:
        """Add the tokens of another part of the same data."""
        self.rows += other.rows
        self.features += other.features
        self.classes += other.classes


@dataclass(frozen=True)
class TokenLaplace:
    """The posterior of one exit.

    Attributes:
        root: R with Ṽ = R Rᵀ, [m, m]; m = D, or D + 1 with a bias. None with `directions`.
        directions: Eigenvectors of Ṽ⁻¹, [m, ρ]; None with `root`.
        gains: What their eigenvalues are above the median one, and behind them the median, [ρ + 1].
        spread: Standard deviation of a token's logit where s(φ) = 1, [V]; ones if `draws` hold it.
        draws: Standard normal numbers, or correlated ones of a whole class factor, [n_MC, V].
        temperature: T, which divides the perturbed logits.
        rest_as_rival: See `LaplaceConfig`.
        jitter: What was added to the diagonal for the factor to exist, see `cholesky`.
    """

    root: Tensor | None
    directions: Tensor | None
    gains: Tensor | None
    spread: Tensor
    draws: Tensor
    temperature: float = 1.0
    rest_as_rival: bool = False
    jitter: float = 0.0

    def single(self) -> TokenLaplace:
        """The same in float32."""
        root, directions, gains = (
            None if part is None else part.float() for part in (self.root, self.directions, self.gains)
        )
        spread, draws = self.spread.float(), self.draws.float()
        return replace(self, root=root, directions=directions, gains=gains, spread=spread, draws=draws)


def fit(
    factors: Factors, omega: float, draws: Tensor, config: LaplaceConfig, *, temperature: float = 1.0, name: str = ""
) -> TokenLaplace:
    """The posterior for a prior variance.

    Args:
        factors: Sums over the tokens.
        omega: ω, the prior variance of a weight.
        draws: See `standard_draws`.
        config: Evidence and form of s(φ).
        temperature: T.
        name: Which exit, for errors.

    Returns:
        The posterior, in float64.

    Raises:
        ValueError: No tokens, or a factor that is singular.
    """
    if not factors.rows:
        raise ValueError(f"there are no tokens to fit {name or 'a posterior'} on; give more text")
    scale, prior = math.sqrt(factors.rows * config.evidence), omega**-0.5
    precision = scale * factors.features / factors.rows
    precision.diagonal().add_(prior)
    about = f"{name} (N = {factors.rows}, D = {len(precision)})".strip()
    root, directions, gains, jitter = None, None, None, 0.0
    if config.rank is None:
        root, jitter = cholesky(precision, f"the feature factor of {about}")
    else:
        directions, gains = _low_rank(precision, config.rank)
    g = scale * factors.classes / factors.rows
    draws = draws.double()
    if factors.members is None:
        spread = (g + prior).rsqrt()
    else:
        g.diagonal().add_(prior)
        upper, added = cholesky(g, f"the class factor of {about}")
        noise = torch.linalg.solve_triangular(upper.mT, draws[:, factors.members].mT, upper=True).mT
        draws = torch.zeros_like(draws).index_copy(1, factors.members, noise)
        spread, jitter = torch.ones(factors.vocabulary, dtype=torch.float64), max(jitter, added)
    return TokenLaplace(root, directions, gains, spread, draws, temperature, config.rest_as_rival, jitter)


def _low_rank(precision: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the inverse that deviate most from the median eigenvalue; their gains, and the median."""
    values, vectors = torch.linalg.eigh((precision + precision.mT) / 2)
    variances = values.reciprocal()
    middle = variances.median()
    chosen = (variances - middle).abs().topk(min(rank, len(variances))).indices
    return vectors[:, chosen], torch.cat([variances[chosen] - middle, middle[None]])


def distance(state: TokenLaplace, x: Tensor) -> Tensor:
    """s(φ) = φᵀṼ⁻¹φ of readout inputs [A, D], [A]: the only part of the covariance that depends on the input."""
    matrix = state.root if state.root is not None else state.directions
    assert matrix is not None
    x = x.to(matrix.dtype)
    if len(matrix) > x.shape[-1]:
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=-1)
    if state.root is not None:
        solved: Tensor = torch.linalg.solve_triangular(state.root, x.mT, upper=False)
        return solved.square().sum(0)
    assert state.gains is not None
    return (state.gains[-1] * x.square().sum(-1) + (x @ matrix).square() @ state.gains[:-1]).clamp(min=0)


def perturbed(state: TokenLaplace, x: Tensor, short: Shortlist, draws: slice = slice(None)) -> Tensor:
    """Sampled logits, not divided by T, of the candidates and, behind them, of the rest; [n, A, k + 1]."""
    noise = distance(state, x).sqrt()[:, None] * state.spread[short.ids]  # [A, k]
    z = short.logits + noise * state.draws[draws][:, short.ids]  # [n, A, k]
    return torch.cat([z, short.rest.to(z.dtype).expand(len(z), -1)[:, :, None]], dim=-1)


def predictive(state: TokenLaplace, x: Tensor, short: Shortlist) -> tuple[Tensor, Tensor]:
    """Probabilities, averaged over the posterior.

    Args:
        state: The posterior of the exit.
        x: Readout inputs, [A, D].
        short: Candidates, k of them in each row.

    Returns:
        p̄ of the candidates, [A, k], and of the rest, [A].
    """
    count = len(state.draws)
    size = max(1, _BUDGET // max(short.ids.numel(), 1))
    parts = [slice(at, at + size) for at in range(0, count, size)]
    sums = [(perturbed(state, x, short, part) / state.temperature).softmax(-1).sum(0) for part in parts]
    p = torch.stack(sums).sum(0) / count
    return p[:, :-1], p[:, -1]


def gap(state: TokenLaplace, x: Tensor, short: Shortlist) -> Tensor:
    """The confidence p̄_(1) - p̄_(2) of the candidates, [A], in [0, 1]; the rest is in the normaliser only.

    With `rest_as_rival`, p̄_(1) - max(p̄_(2), p̄_rest), and 0 where that is negative.

    Args:
        state: The posterior of the exit.
        x: Readout inputs, [A, D].
        short: Candidates.

    Returns:
        One gap per row.
    """
    p, rest = predictive(state, x, short)
    top = p.topk(2, dim=-1).values
    second = torch.maximum(top[:, 1], rest) if state.rest_as_rival else top[:, 1]
    return (top[:, 0] - second).clamp(0, 1)


def size(state: TokenLaplace) -> int:
    """Numbers that s(φ) reads, whatever the batch."""
    matrix = state.root if state.root is not None else state.directions
    assert matrix is not None
    m, columns = matrix.shape
    return m * columns if state.root is None else m * (m + 1) // 2


def flops(state: TokenLaplace, candidates: int) -> int:
    """FLOPs of one confidence: s(φ), by a triangular solve or ρ products, and a scale and a sum per candidate and draw.

    Softmaxes are not counted, as nowhere in the ledger.

    Args:
        state: The posterior of the exit.
        candidates: k.

    Returns:
        FLOPs of one row, a multiply-add counted as 2.
    """
    matrix = state.root if state.root is not None else state.directions
    assert matrix is not None
    m, columns = matrix.shape
    exact = state.root is not None
    return (m * m + 2 * m if exact else 2 * m * columns + 3 * columns + 2 * m) + 2 * candidates * len(state.draws)

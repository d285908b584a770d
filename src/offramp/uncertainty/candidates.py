"""The few tokens that an uncertain readout is about, and last-layer Laplace for their logits.

Candidates are the best of the scored tokens, all others are one rest. Of a head over the vocabulary only the rows of
candidates are uncertain, all others stay as they were trained: G (see `laplace`) is restricted to them (p is that of
the whole vocabulary), which leaves it positive definite. By default only its diagonal is kept, so that candidates may
differ from token to token. What is predicted is the mean of the softmax over stored draws (Meronen et al. 2023, arXiv
2302.06359).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.uncertainty.laplace import Factors, correlated, damped_root, quadratic, with_prior

SMALLEST = math.log(1e-12)
"""Log-probabilities below this count as this."""
_BUDGET = 1 << 24  # elements of perturbed logits held at once
_ROWS = 256  # tokens looked at together


class Shortlist(NamedTuple):
    """Candidates S of A rows, best first, and what stands behind them.

    Attributes:
        ids: Token ids, [A, k].
        logits: Theirs, [A, k]; -inf for tokens that were not scored.
        rest: ln of the sum of exp(logit) over all other scored tokens, [A]; -inf if there are none.
    """

    ids: Tensor
    logits: Tensor
    rest: Tensor

    def select(self, rows: Tensor | slice) -> Shortlist:
        """Some of the rows."""
        return Shortlist(self.ids[rows], self.logits[rows], self.rest[rows])


def shortlist(logits: Tensor, size: int, ids: Tensor | None = None) -> Shortlist:
    """The k best of logits [A, V], or of kept tokens' [A, K] with these ids; fewer if fewer are scored."""
    best, columns = logits.topk(min(size, logits.shape[1]), dim=-1)
    rest = logits.scatter(1, columns, -float("inf")).logsumexp(-1)
    return Shortlist(columns if ids is None else ids.gather(1, columns), best, rest)


@dataclass(frozen=True)
class TokenRows:
    """N tokens at one exit, and which token each should have been.

    Attributes:
        x: Readout inputs, [N, D].
        short: Candidates.
        place: Column of the true token among the candidates, or k if it is one of the rest, [N].
        beyond: ln of the true token's share of the rest where it is there, else 0, [N].
    """

    x: Tensor
    short: Shortlist
    place: Tensor
    beyond: Tensor

    def __len__(self) -> int:
        return len(self.place)

    def select(self, rows: Tensor | slice) -> TokenRows:
        """Some of the tokens."""
        return TokenRows(self.x[rows], self.short.select(rows), self.place[rows], self.beyond[rows])


def place_of(ids: Tensor, target: Tensor) -> Tensor:
    """Columns of true tokens among candidates, k for those that are none: [N, k], [N] -> [N]."""
    same = ids == target[:, None]
    return torch.where(same.any(-1), same.int().argmax(-1), ids.shape[1])


def rows_of(x: Tensor, logits: Tensor, short: Shortlist, target: Tensor) -> TokenRows:
    """Inputs [N, D], logits of all tokens [N, V] (-inf where not scored), their candidates and the true tokens [N]."""
    place = place_of(short.ids, target)
    inside = place < short.ids.shape[1]
    z = logits.gather(1, target[:, None])[:, 0]
    share = torch.where(z.isfinite(), z - short.rest, -torch.inf)
    return TokenRows(x, short, place, torch.where(inside, 0.0, share))


# ---------------------------------------------------------------- the posterior


@dataclass(frozen=True)
class LaplaceConfig:
    """How the posterior of an exit of a language model is made and used.

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


@dataclass(frozen=True)
class TokenLaplace:
    """The posterior of one exit. A soft cap acts on the logits that noise is added to; its derivative is left out.

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
        made: dict[str, Any] = {name: part.float() for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **made)

    @property
    def matrix(self) -> Tensor:
        """The root or the directions, whichever s(φ) is made of."""
        matrix = self.directions if self.root is None else self.root
        assert matrix is not None
        return matrix


def fit(
    factors: Factors, omega: float, draws: Tensor, config: LaplaceConfig, *, temperature: float = 1.0, name: str = ""
) -> TokenLaplace:
    """The posterior of tokens for a prior variance.

    Args:
        factors: Sums over the tokens, with the diagonal of G or all of it.
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
    rows, draws = factors.rows * config.evidence, draws.double()
    a, g = factors.features / factors.rows, factors.classes / factors.rows
    about = f"{name} (N = {factors.rows}, D = {len(a)})".strip()
    root, directions, gains, first = None, None, None, 0.0
    if config.rank is None:
        root, first = damped_root(a, rows, omega, f"the feature factor of {about}")
    else:
        directions, gains = _low_rank(with_prior(a, rows, omega), config.rank)
    class_root, second = damped_root(g, rows, omega, f"the class factor of {about}")
    if g.ndim == 1:
        spread = 1 / class_root
    else:
        spread, draws = torch.ones(draws.shape[1], dtype=torch.float64), correlated(class_root, draws)
    rival, jitter = config.rest_as_rival, max(first, second)
    return TokenLaplace(root, directions, gains, spread, draws, temperature, rival, jitter)


def _low_rank(precision: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the inverse that deviate most from the median eigenvalue; their gains, and the median."""
    values, vectors = torch.linalg.eigh((precision + precision.mT) / 2)
    variances = values.reciprocal()
    middle = variances.median()
    chosen = (variances - middle).abs().topk(min(rank, len(variances))).indices
    return vectors[:, chosen], torch.cat([variances[chosen] - middle, middle[None]])


def distance(state: TokenLaplace, x: Tensor) -> Tensor:
    """s(φ) of readout inputs, [A, D] -> [A]: the only part of the covariance that depends on the input."""
    x = x.to(state.matrix.dtype)
    if len(state.matrix) > x.shape[-1]:
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=-1)
    if state.root is not None:
        return quadratic(state.root, x)
    assert state.gains is not None
    return (state.gains[-1] * x.square().sum(-1) + (x @ state.matrix).square() @ state.gains[:-1]).clamp(min=0)


def perturbed(state: TokenLaplace, x: Tensor, short: Shortlist, draws: slice = slice(None)) -> Tensor:
    """Sampled logits, not divided by T, of the candidates and, behind them, of the rest; [n, A, k + 1]."""
    noise = distance(state, x).sqrt()[:, None] * state.spread[short.ids]  # [A, k]
    z = short.logits + noise * state.draws[draws][:, short.ids]  # [n, A, k]
    return torch.cat([z, short.rest.to(z.dtype).expand(len(z), -1)[:, :, None]], dim=-1)


def predictive(state: TokenLaplace, x: Tensor, short: Shortlist) -> tuple[Tensor, Tensor]:
    """Probabilities averaged over the posterior: inputs [A, D] -> those of the k candidates [A, k], of the rest [A]."""
    count = len(state.draws)
    size = max(1, _BUDGET // max(short.ids.numel(), 1))
    parts = [slice(at, at + size) for at in range(0, count, size)]
    sums = [(perturbed(state, x, short, part) / state.temperature).softmax(-1).sum(0) for part in parts]
    p = torch.stack(sums).sum(0) / count
    return p[:, :-1], p[:, -1]


def gap(state: TokenLaplace, x: Tensor, short: Shortlist) -> Tensor:
    """The confidence p̄_(1) - p̄_(2) of the candidates, in [0, 1], [A, D] -> [A]; the rest is in the normaliser only.

    With `rest_as_rival`, p̄_(1) - max(p̄_(2), p̄_rest), and 0 where that is negative.

    Returns:
        One gap per row.
    """
    p, rest = predictive(state, x, short)
    top = p.topk(2, dim=-1).values
    second = torch.maximum(top[:, 1], rest) if state.rest_as_rival else top[:, 1]
    return (top[:, 0] - second).clamp(0, 1)


def size(state: TokenLaplace) -> int:
    """Numbers that s(φ) reads, whatever the batch."""
    m, columns = state.matrix.shape
    return m * columns if state.root is None else m * (m + 1) // 2


def flops(state: TokenLaplace, candidates: int) -> int:
    """FLOPs of one confidence: s(φ), by a triangular solve or ρ products, a scale and a sum per candidate and draw.

    Softmaxes are not counted, as nowhere in the ledger.

    Returns:
        FLOPs, a multiply-add counted as 2.
    """
    m, columns = state.matrix.shape
    exact = state.root is not None
    return (m * m + 2 * m if exact else 2 * m * columns + 3 * columns + 2 * m) + 2 * candidates * len(state.draws)


def log_likelihood(rows: TokenRows, temperatures: Sequence[float], state: TokenLaplace | None = None) -> Tensor:
    """Log p̄ of the true tokens, at least ln 1e-12, for each temperature.

    Args:
        rows: The tokens.
        temperatures: t of them; that of the state is not looked at.
        state: The posterior; None: the trained head alone.

    Returns:
        Log-probabilities in nats, [t, N].
    """
    parts = []
    for at in range(0, len(rows), _ROWS):
        part = rows.select(slice(at, at + _ROWS))
        if state is None:
            z = torch.cat([part.short.logits, part.short.rest[:, None]], dim=-1)[None]
        else:
            z = perturbed(state, part.x, part.short)  # [n, A, k + 1]
        true = z.gather(2, part.place.expand(len(z), -1)[:, :, None])[:, :, 0]
        for_each = [true / t - (z / t).logsumexp(-1) for t in temperatures]
        means = torch.stack(for_each).logsumexp(1) - math.log(len(z))  # [t, A]
        parts.append((means + part.beyond).clamp(min=SMALLEST))
    return torch.cat(parts, dim=1)

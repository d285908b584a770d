"""Temperature and prior variance of a token posterior, by the likelihood of known tokens (Meronen et al., sec. 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from offramp.uncertainty import token_laplace
from offramp.uncertainty.shortlist import Shortlist
from offramp.uncertainty.token_laplace import Factors, LaplaceConfig, TokenLaplace

PRIORS = tuple(10.0**power for power in range(-4, 5))
"""Prior variances of a logit tried, nine: ω is this over the mean of φᵀφ, which differs by orders between models."""
TEMPERATURES = (0.3, 0.5, 0.7, 1.0, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0)
"""Temperatures tried for each of them; the best is then refined, between its neighbours or to the bounds."""
BOUNDS = (0.05, 20.0)
SMALLEST = math.log(1e-12)
"""Log-probabilities below this count as this."""
_ROWS = 256  # tokens looked at together


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


def rows_of(x: Tensor, logits: Tensor, short: Shortlist, target: Tensor) -> TokenRows:
    """Find the true tokens.

    Args:
        x: Readout inputs, [N, D].
        logits: Of all tokens, -inf where not scored, [N, V].
        short: Candidates of these logits.
        target: True tokens, [N].

    Returns:
        The tokens; one that was not scored has `beyond` -inf.
    """
    same = short.ids == target[:, None]  # [N, k]
    inside = same.any(-1)
    place = torch.where(inside, same.int().argmax(-1), short.ids.shape[1])
    z = logits.gather(1, target[:, None])[:, 0]
    share = torch.where(z.isfinite(), z - short.rest, -torch.inf)
    return TokenRows(x, short, place, torch.where(inside, 0.0, share))


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
            z = token_laplace.perturbed(state, part.x, part.short)  # [n, A, k + 1]
        true = z.gather(2, part.place.expand(len(z), -1)[:, :, None])[:, :, 0]
        for_each = [true / t - (z / t).logsumexp(-1) for t in temperatures]
        means = torch.stack(for_each).logsumexp(1) - math.log(len(z))  # [t, A]
        parts.append((means + part.beyond).clamp(min=SMALLEST))
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        temperature: T.
        omega: ω, of a weight.
        prior: ω · mean(φᵀφ), of a logit.
        nlpd: Mean of -ln p̄ of the true token there.
        surface: The same on the grid, one row per prior variance of `PRIORS` and one column per T of `TEMPERATURES`.
        edges: Which of "temperature" and "prior" lie at an end of what was tried; the smallest prior is no posterior.
    """

    temperature: float
    omega: float
    prior: float
    nlpd: float
    surface: tuple[tuple[float, ...], ...]
    edges: tuple[str, ...]


def tune(
    factors: Factors, rows: TokenRows, draws: Tensor, config: LaplaceConfig, *,
    priors: Sequence[float] = PRIORS, name: str = "",
) -> tuple[TokenLaplace, Tuned]:  # fmt: skip
    """The T and ω of the smallest NLPD; of equal ones the T nearest to 1, then the smallest ω.

    Args:
        factors: Sums over the fit tokens.
        rows: Other tokens, to tune on.
        draws: See `standard_draws`.
        config: Of the posterior.
        priors: Prior variances of a logit to try, ascending.
        name: Which exit, for errors.

    Returns:
        The posterior in float32, and how it was found.
    """
    square = float(factors.features.trace()) / max(factors.rows, 1)
    states = [token_laplace.fit(factors, prior / square, draws, config, name=name).single() for prior in priors]
    surface = torch.stack([-log_likelihood(rows, TEMPERATURES, state).double().mean(1) for state in states])
    ranked = [
        (float(surface[i, j]), abs(math.log(t)), prior, i, j)
        for i, prior in enumerate(priors)
        for j, t in enumerate(TEMPERATURES)
    ]
    value, _, prior, i, j = min(ranked)
    state, best = states[i], TEMPERATURES[j]
    ends = (BOUNDS[0], *TEMPERATURES, BOUNDS[1])
    temperature, refined = _refined(rows, state, ends[j], ends[j + 2])
    if refined > value:
        temperature, refined = best, value
    edges = ["temperature"] if _at_bound(temperature) else []
    edges += ["prior"] if len(priors) > 1 and prior in (priors[0], priors[-1]) else []
    grid = tuple(tuple(round(v, 5) for v in row) for row in surface.tolist())
    tuned = Tuned(temperature, prior / square, prior, refined, grid, tuple(edges))
    return replace(state, temperature=temperature), tuned


def temperature_alone(rows: TokenRows) -> float:
    """The T of the smallest NLPD of the trained head itself."""
    return _refined(rows, None, *BOUNDS)[0]


def _refined(rows: TokenRows, state: TokenLaplace | None, low: float, high: float) -> tuple[float, float]:
    """The best T between two, and its NLPD."""
    from scipy.optimize import minimize_scalar

    def nlpd(log_t: float) -> float:
        return -float(log_likelihood(rows, [math.exp(log_t)], state).double().mean())

    found = minimize_scalar(nlpd, bounds=(math.log(low), math.log(high)), method="bounded", options={"xatol": 2e-3})
    return math.exp(float(found.x)), float(found.fun)


def _at_bound(temperature: float) -> bool:
    return min(abs(math.log(temperature / bound)) for bound in BOUNDS) < 0.01

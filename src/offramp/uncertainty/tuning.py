"""Temperature and prior variance of each exit, by the negative log predictive density (NLPD) of rows or known tokens.

With the model-internal ensemble exits are tuned greedily, shallow to deep: exit e for the ensemble of exits 1..e, with
the earlier ones as they are. Without it exits do not depend on each other. One temperature per exit, softmax(z / T):
Guo et al. (2017), "On Calibration of Modern Neural Networks", section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from offramp.uncertainty import candidates, predictive
from offramp.uncertainty.candidates import LaplaceConfig, TokenLaplace, TokenRows, log_likelihood
from offramp.uncertainty.laplace import Factors

LOWEST, HIGHEST = 0.05, 20.0
"""Between these the temperature is looked for; their logarithms are opposite, so 1 is in the middle."""
SCAN = tuple(math.exp(i / 4 * math.log(HIGHEST)) for i in range(-4, 5))
MERONEN_TEMPERATURES = (0.3, 0.5, 0.7, 1.0, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0)
"""The published grid (Meronen et al., 2023)."""


@dataclass(frozen=True)
class Search:
    """The best temperature and all that were tried.

    Attributes:
        temperature: The best; between equals, the one with the smallest |ln T|.
        loss: At it.
        tried: (T, loss) of each temperature that was looked at, by T.
        at_edge: Whether the best is the first or the last that is allowed: a better one may lie beyond.
    """

    temperature: float
    loss: float
    tried: tuple[tuple[float, float], ...]
    at_edge: bool


def search_temperature(
    loss: Callable[[float], float], grid: Sequence[float] | None = None, precision: float = 1e-6
) -> Search:  # fmt: skip
    """The temperature with the smallest loss.

    Args:
        loss: Of a temperature. For one exit alone it is convex in 1 / T; for ensembles and Monte-Carlo means it need
            not be, hence the scan.
        grid: Temperatures to try; None: any from `LOWEST` to `HIGHEST`, by bounded minimisation over ln T between the
            neighbours of the best of nine.
        precision: Of ln T, without a grid.

    Returns:
        The best, and what was tried.
    """
    tried: dict[float, float] = {}

    def value(temperature: float) -> float:
        return tried.setdefault(temperature, loss(temperature))

    def best() -> float:
        return min(tried, key=lambda t: (tried[t], abs(math.log(t))))

    points = sorted(grid or SCAN)
    for temperature in points:
        value(temperature)
    if grid is None:
        place = points.index(best())
        ends = points[max(place - 1, 0)], points[min(place + 1, len(points) - 1)]
        temperature_between(value, *ends, precision)
    found = best()
    at_edge = min(abs(math.log(found / end)) for end in (points[0], points[-1])) < 2 * precision
    return Search(found, tried[found], tuple(sorted(tried.items())), at_edge)


def temperature_between(
    loss: Callable[[float], float], low: float = LOWEST, high: float = HIGHEST, precision: float = 2e-3
) -> tuple[float, float]:  # fmt: skip
    """The best temperature between two, by bounded minimisation over ln T to this precision, and the loss at it."""
    from scipy.optimize import minimize_scalar

    bounds = math.log(low), math.log(high)
    found = minimize_scalar(
        lambda at: loss(math.exp(at)), bounds=bounds, method="bounded", options={"xatol": precision}
    )  # fmt: skip
    return math.exp(float(found.x)), float(found.fun)


WIDE = tuple(10.0**i for i in range(-6, 3))
"""Prior variances looked at: nine from 1e-6, where Laplace is next to nothing, to 100. A narrower grid forces a Laplace
on exits that are better without: at 0.01, features of norm 20 already give logits a prior variance of 4."""
MERONEN_PRIORS = (0.5, 0.7, 1.0, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0, 4.0)
"""The published grid (Meronen et al., 2023)."""
LOGIT_PRIORS = tuple(10.0**power for power in range(-4, 5))
"""Of tokens, prior variances of a logit: ω is this over the mean of φᵀφ, which differs by orders between models."""

Z95 = 1.959964
"""Standard errors on each side of a 95 % interval."""

Rows = Callable[[float], Tensor]
"""From a temperature to ln p_y of each row, [N], of one exit alone."""


@dataclass(frozen=True)
class Space:
    """Where settings of an exit are looked for.

    Attributes:
        temperatures: Grid; None: all between the bounds of `search_temperature`.
        omegas: Grid of prior variances; (None,) where there is no prior.
        precision: Of ln T, without a grid.
    """

    temperatures: tuple[float, ...] | None = (1.0,)
    omegas: tuple[float | None, ...] = (None,)
    precision: float = 1e-6


def temperatures(grid: str | None) -> Space:
    """For temperature alone: any, or with "meronen" the published grid."""
    return Space(None if grid is None else MERONEN_TEMPERATURES)


def with_prior(grid: str | None) -> Space:
    """For temperature and prior variance together: any and the wide grid, or with "meronen" the published ones."""
    return Space(None, WIDE, 1e-3) if grid is None else Space(MERONEN_TEMPERATURES, MERONEN_PRIORS)


@dataclass(frozen=True)
class Tuned:
    """The settings of one exit, and how they were found.

    Attributes:
        temperature: T.
        omega: Prior variance ω; None: no prior.
        nlpd: At them, on the tune split, of what the exit answers (with an ensemble, the ensemble up to it).
        surface: (ω, T, NLPD) of all that was looked at.
        edges: What sits on the end of its grid, in words; empty: nothing.
        losses: −ln p_y of each row at the settings, [N].
    """

    temperature: float
    omega: float | None
    nlpd: float
    surface: tuple[tuple[float | None, float, float], ...] = field(repr=False, default=())
    edges: tuple[str, ...] = ()
    losses: Tensor = field(repr=False, compare=False, default_factory=lambda: torch.zeros(0))


def tune(predict: Callable[[float | None], Rows], space: Space) -> Tuned:
    """The setting with the smallest NLPD; between equals the smallest |ln T|, then the smallest ω."""
    surface: list[tuple[float | None, float, float]] = []
    found: list[tuple[tuple[float, float, float], float | None, Search]] = []
    for omega in space.omegas:
        best = search_temperature(partial(_nlpd, predict(omega)), space.temperatures, space.precision)
        surface += [(omega, t, loss) for t, loss in best.tried]
        found.append(((best.loss, abs(math.log(best.temperature)), omega or 0.0), omega, best))
    _, omega, best = min(found, key=lambda entry: entry[0])
    edges = []
    if best.at_edge and len(best.tried) > 1:
        edges.append(f"its temperature, {best.temperature:g}, is at an end of what was looked at")
    if omega is not None and len(space.omegas) > 1 and omega in (space.omegas[0], space.omegas[-1]):
        edges.append(f"its prior variance, {omega:g}, is at an end of what was looked at")
    losses = -predict(omega)(best.temperature)
    return Tuned(best.temperature, omega, best.loss, tuple(surface), tuple(edges), losses)


def _nlpd(rows: Rows, temperature: float) -> float:
    return -float(rows(temperature).mean())


def tune_all(
    predict: Callable[[int, float | None], Rows], exits: int, space: Space, weights: Tensor | None
) -> list[Tuned]:  # fmt: skip
    """Settings of E exits, shallow to deep; with weights [E], each for the ensemble up to it."""
    found: list[Tuned] = []
    carried: Tensor | None = None
    for exit in range(exits):
        alone = partial(predict, exit)
        if weights is None:
            found.append(tune(alone, space))
            continue
        found.append(tune(partial(_joined, alone, partial(_after, carried, weights, exit)), space))
        own = alone(found[-1].omega)(found[-1].temperature)
        carried = predictive.ensemble_join_logarithms(own, carried, weights, exit)[1]
    return found


def _after(carried: Tensor | None, weights: Tensor, exit: int, own: Tensor) -> Tensor:
    return predictive.ensemble_join_logarithms(own, carried, weights, exit)[0]


def _joined(alone: Callable[[float | None], Rows], join: Callable[[Tensor], Tensor], omega: float | None) -> Rows:
    rows = alone(omega)
    return lambda t: join(rows(t))


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class TokensTuned:
    """What tuning on tokens found.

    Attributes:
        temperature: T.
        omega: ω, of a weight.
        prior: ω · mean(φᵀφ), of a logit.
        nlpd: Mean of -ln p̄ of the true token there.
        surface: The same on the grid, one row per prior variance and one column per T of `MERONEN_TEMPERATURES`.
        edges: Which of "temperature" and "prior" lie at an end of what was tried; the smallest prior is no posterior.
    """

    temperature: float
    omega: float
    prior: float
    nlpd: float
    surface: tuple[tuple[float, ...], ...]
    edges: tuple[str, ...]


def tune_tokens(
    factors: Factors, rows: TokenRows, draws: Tensor, config: LaplaceConfig, *,
    priors: Sequence[float] = LOGIT_PRIORS, name: str = "",
) -> tuple[TokenLaplace, TokensTuned]:  # fmt: skip
    """The T and ω of the smallest NLPD; of equal ones the T nearest to 1, then the smallest ω.

    All T of the grid are tried with the noise of each ω, the best is then refined between its neighbours or the bounds.

    Args:
        factors: Sums over the fit tokens.
        rows: Other tokens, to tune on.
        draws: See `candidates.standard_draws`.
        config: Of the posterior.
        priors: Prior variances of a logit to try, ascending.
        name: Which exit, for errors.

    Returns:
        The posterior in float32, and how it was found.
    """
    square = float(factors.features.trace()) / max(factors.rows, 1)
    grid = MERONEN_TEMPERATURES
    states = [candidates.fit(factors, prior / square, draws, config, name=name).single() for prior in priors]
    surface = torch.stack([-log_likelihood(rows, grid, state).double().mean(1) for state in states])
    ranked = [
        (float(surface[i, j]), abs(math.log(t)), prior, i, j)
        for i, prior in enumerate(priors) for j, t in enumerate(grid)
    ]  # fmt: skip
    value, _, prior, i, j = min(ranked)
    ends = (LOWEST, *grid, HIGHEST)
    best, refined = temperature_between(partial(_tokens_nlpd, rows, states[i]), ends[j], ends[j + 2])
    if refined > value:
        best, refined = grid[j], value
    edges = ["temperature"] if min(abs(math.log(best / end)) for end in (ends[0], ends[-1])) < 0.01 else []
    edges += ["prior"] if len(priors) > 1 and prior in (priors[0], priors[-1]) else []
    tried = tuple(tuple(round(v, 5) for v in row) for row in surface.tolist())
    return replace(states[i], temperature=best), TokensTuned(best, prior / square, prior, refined, tried, tuple(edges))


def temperature_alone(rows: TokenRows) -> float:
    """The T of the smallest NLPD of the trained head itself."""
    return temperature_between(partial(_tokens_nlpd, rows, None))[0]


def _tokens_nlpd(rows: TokenRows, state: TokenLaplace | None, at: float) -> float:
    return -float(log_likelihood(rows, [at], state).double().mean())


# ---------------------------------------------------------------- is the Laplace approximation worth it?


@dataclass(frozen=True)
class Comparison:
    """Laplace against temperature alone at one exit, on the same rows.

    Attributes:
        vanilla: NLPD without any of it.
        temperature: NLPD with the best temperature alone.
        gain: NLPD of temperature alone less that of Laplace, mean over rows; positive: Laplace is better.
        error: Standard error of the gain.
    """

    vanilla: float
    temperature: float
    gain: float
    error: float

    @property
    def better(self) -> bool:
        """Whether all of the 95 % interval of the gain is above 0."""
        return self.gain > Z95 * self.error

    def words(self) -> str:
        """The verdict, which no point estimate decides."""
        half = Z95 * self.error
        verdict = (
            "Laplace is better than temperature"
            if self.better
            else "Laplace is worse than temperature"
            if self.gain < -half
            else "Laplace was not shown to be better or worse than temperature"
        )
        return f"{verdict}: it lowers the NLPD by {self.gain:.4f} ({self.gain - half:.4f} to {self.gain + half:.4f})"


def compare(vanilla: Tensor, temperature: Tensor, laplace: Tensor) -> Comparison:
    """From the losses of the same rows, [N] each, N > 1."""
    gains = temperature - laplace
    error = float(gains.std()) / math.sqrt(len(gains))
    return Comparison(float(vanilla.mean()), float(temperature.mean()), float(gains.mean()), error)

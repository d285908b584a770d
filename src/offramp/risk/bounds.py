"""P-values for "the risk is above `tolerance`", from one loss per prompt of independent prompts.

If the mean loss of new prompts is `tolerance` or more, a p-value is at most u with probability at most u; for every
number of prompts, with no approximation. A setting whose p-value is at most `failure` is certified (how to go through
several settings: `offramp.risk.search`). All bounds share one call signature, `Bound`:

    p = hoeffding_bentkus(losses, tolerance)

And, while a policy is in use, bets that its mean loss is above what was promised (`wealth`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import special

from offramp.risk.losses import TIE, Losses, checked
from offramp.values import check_level

_OfMean: TypeAlias = "Callable[[float, Any, float], Any]"  # mean, n, tolerance -> p, for one n or many

_SCANNED = 2**17  # numbers of prompts tried one by one
_MOST = 2**40
_MOST_GENERAL = 2**20  # for bounds that need the losses themselves
_SHUFFLES, _ENOUGH = 20, 18  # orders of repeated losses, and how many of them must pass


class Bound(Protocol):
    """A valid p-value for "the risk is above tolerance"; a plain function or a `functools.partial` of one."""

    def __call__(self, losses: Losses, tolerance: float, /) -> float:
        """Test losses.

        Args:
            losses: One per prompt, [N], in the bound's range.
            tolerance: Mean loss to be ruled out, in (0, 1).

        Returns:
            The p-value, in [0, 1].

        Raises:
            ValueError: A loss is NaN or outside the range, there are none, or the tolerance is outside (0, 1).
        """
        ...


# ---------------------------------------------------------------- from the mean


def _at_most(count: Any, n: Any, probability: float) -> Any:
    """P(Bin(n, probability) <= count), exactly, for whole numbers 0 <= count <= n."""
    below = np.minimum(count, n - 1)  # the integral is not defined for count = n
    return np.where(count >= n, 1.0, special.betaincc(below + 1.0, np.asarray(n - below, dtype=float), probability))


def _hoeffding(mean: float, n: Any, tolerance: float, width: float = 1.0) -> Any:
    return np.exp(-2.0 * n * (max(0.0, tolerance - mean) / width) ** 2)


_hoeffding_signed = partial(_hoeffding, width=2.0)


def _binomial(mean: float, n: Any, tolerance: float) -> Any:
    return _at_most(np.ceil(n * mean - TIE), n, tolerance)


def _hoeffding_bentkus(mean: float, n: Any, tolerance: float) -> Any:
    low = min(mean, tolerance)
    divergence = special.rel_entr(low, tolerance) + special.rel_entr(1 - low, 1 - tolerance)
    return np.minimum(np.exp(-n * max(0.0, divergence)), math.e * _binomial(mean, n, tolerance))


def _p(of_mean: _OfMean, losses: Losses, tolerance: float, low: float = 0) -> float:
    values = checked(losses, low, 1)
    check_level("tolerance", tolerance)
    n = len(values)
    return float(of_mean(math.fsum(values.tolist()) / n, n, tolerance))


def hoeffding(losses: Losses, tolerance: float) -> float:
    """Hoeffding (1963), exp(-2n·max(0, tolerance - mean)²), for losses in [0, 1]; what CALM uses."""
    return _p(_hoeffding, losses, tolerance)


def hoeffding_signed(losses: Losses, tolerance: float) -> float:
    """Hoeffding (1963) for losses in [-1, 1]: their range is 2, so exp(-n·max(0, tolerance - mean)²/2)."""
    return _p(_hoeffding_signed, losses, tolerance, low=-1)


def hoeffding_bentkus(losses: Losses, tolerance: float) -> float:
    """The smaller of Hoeffding's sharper and Bentkus's p-value, for losses in [0, 1].

    Bates et al. (2021), "Distribution-Free, Risk-Controlling Prediction Sets", and Angelopoulos et al. (2021), "Learn
    then Test": min(exp(-n·h(min(mean, t), t)), e·P(Bin(n, t) <= ⌈n·mean⌉)), with t the tolerance and h(a, b) the
    relative entropy of two coins. Differs in rounding n·mean down by 1e-9 before the ceiling: sums of losses are not
    exact in floats.

    Returns:
        The p-value, in [0, 1].
    """
    return _p(_hoeffding_bentkus, losses, tolerance)


def binomial(losses: Losses, tolerance: float) -> float:
    """The exact p-value of losses that are 0 or 1, none between: P(Bin(n, tolerance) <= number of ones)."""
    values = checked(losses, 0, 1)
    if (between := np.flatnonzero((values != 0) & (values != 1))).size:
        raise ValueError(
            f"losses[{between[0]}] is {values[between[0]]:g}; the binomial bound is for losses that are 0 or 1, "
            "use hoeffding_bentkus or wsr for others"
        )
    return _p(_binomial, values, tolerance)


# ---------------------------------------------------------------- from the losses in order


def wsr(losses: Losses, tolerance: float, *, failure: float = 0.05) -> float:
    """A bettor's wealth against "the risk is above tolerance"; adapts to losses of small variance.

    Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting", in the form of Bates et
    al. (2021), "Distribution-Free, Risk-Controlling Prediction Sets": with

        μ_i = (1/2 + Σ_{j<=i} x_j) / (i + 1),   σ²_i = (1/4 + Σ_{j<=i} (x_j - μ_j)²) / (i + 1),   σ²_0 = 1/4,
        ν_i = min(1, √(2 ln(1/failure) / (n·σ²_{i-1})))

    the p-value is min(1, 1 / max_i Π_{j<=i} (1 - ν_j·(x_j - tolerance))). Only losses <= 1 are asked for: no factor is
    below the tolerance, so negative (signed) losses are valid, too.

    The value depends on the order of the losses, which must be fixed before looking at them: shuffle the prompts once,
    with a seed.

    Args:
        losses: One per prompt, [N], at most 1.
        tolerance: Mean loss to be ruled out, in (0, 1).
        failure: Where the p-value is to be small; it is valid for every choice made before looking at the losses, and
            strongest if tested at that level.

    Returns:
        The p-value, in [0, 1].

    Raises:
        ValueError: A loss is NaN, infinite or above 1, there are none, or a level is outside (0, 1).
    """
    check_level("tolerance", tolerance)
    check_level("failure", failure)
    x = checked(losses, -math.inf, 1)
    bet = np.minimum(1.0, np.sqrt(2 * math.log(1 / failure) / (len(x) * spread_before(x))))
    wealth = np.cumsum(np.log1p(-bet * (x - tolerance)))
    return float(np.exp(-max(0.0, wealth.max())))


def spread_before(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Variance of the losses before each one, σ²_{i-1} of `wsr`: what a bet on it may know, [N]."""
    after = np.arange(2, len(x) + 2)  # i + 1
    mean = (0.5 + np.cumsum(x)) / after
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / after
    return np.concatenate(([0.25], variance[:-1]))


BOUNDS: dict[str, Bound] = {
    "hoeffding": hoeffding,
    "hoeffding-signed": hoeffding_signed,
    "hoeffding-bentkus": hoeffding_bentkus,
    "binomial": binomial,
    "wsr": wsr,
}
"""Where names enter: everything below takes the callable."""


# ---------------------------------------------------------------- how many prompts


_OF_MEAN: dict[str, tuple[_OfMean, float]] = {  # and the smallest mean
    "hoeffding": (_hoeffding, 0),
    "hoeffding-signed": (_hoeffding_signed, -1),
    "hoeffding-bentkus": (_hoeffding_bentkus, 0),
    "binomial": (_binomial, 0),
}


def samples_needed(bound: Bound, tolerance: float, failure: float, mean: float) -> int | None:
    """How many prompts make the p-value at most `failure`, if their mean loss turns out to be `mean`.

    Each larger number does, too; beyond 2^17, and for bounds that look at more than the mean (`wsr` and those from
    elsewhere), about so: p-values of coarse losses do not fall with every single prompt. There, the losses are thought
    to be 0 or 1, evenly spread: of all losses in [0, 1], these vary most. For `binomial`, n·mean is rounded up.

    Args:
        bound: One of this module, or any other of the same signature.
        tolerance: Mean loss to be ruled out, in (0, 1).
        failure: Level of the test, in (0, 1).
        mean: Empirical mean loss, in [0, 1]; in [-1, 1] for `hoeffding_signed` and `wsr`.

    Returns:
        The number; None if no number does (the mean is not below the tolerance), or one beyond all reason.

    Raises:
        ValueError: A level is outside (0, 1), or the mean is outside its range.
    """
    check_level("tolerance", tolerance)
    check_level("failure", failure)
    of_mean, low = next((_OF_MEAN[name] for name in _OF_MEAN if BOUNDS[name] is bound), (None, -1.0))
    if not low <= mean <= 1:
        raise ValueError(f"mean is {mean}; allowed are values in [{low:g}, 1]")
    if mean >= tolerance:
        return None
    if of_mean is None:
        return _bisect(lambda n: bound(_spread(n, mean), tolerance), failure, 1, _MOST_GENERAL)
    start, enough = 1, 1
    while start < _SCANNED:
        failed = np.flatnonzero(of_mean(mean, np.arange(start, 2 * start), tolerance) > failure)
        if not failed.size:  # the next steps of n·mean are smaller ones, compared with n
            return enough
        enough = start + int(failed[-1]) + 1 if failed.size else enough
        start *= 2
    return _bisect(lambda n: float(of_mean(mean, n, tolerance)), failure, enough - 1, _MOST)


def samples_needed_like(bound: Bound, losses: Losses, tolerance: float, failure: float, *, seed: int = 0) -> int | None:
    """About how many prompts make the p-value at most `failure`, if further losses are like the ones observed.

    For bounds that look at more than the mean: the losses are repeated as a whole, the last time in part, and shuffled;
    the number is where 18 of 20 shuffles pass, found by doubling and bisection to within 2 %. Like `samples_needed` it
    is for losses that keep their mean; of so many fresh prompts the mean may turn out higher, which about every other
    time it does.

    Args:
        bound: One of this module, or any other of the same signature.
        losses: Observed, [N].
        tolerance: Mean loss to be ruled out, in (0, 1).
        failure: Level of the test, in (0, 1).
        seed: Of the shuffles.

    Returns:
        The number; None if no number does (the mean is not below the tolerance), or none up to a million.

    Raises:
        ValueError: A level is outside (0, 1), or the losses are not what the bound allows.
    """
    check_level("failure", failure)
    values = np.asarray(losses, dtype=np.float64)
    bound(values, tolerance)  # checks both
    if values.mean() >= tolerance:
        return None

    def fails(n: int) -> float:
        draw, failed = np.random.default_rng([seed, n]), 0
        for _ in range(_SHUFFLES):
            rest = draw.choice(values, n % len(values), replace=False)
            failed += (
                bound(draw.permutation(np.concatenate([np.tile(values, n // len(values)), rest])), tolerance) > failure
            )
            if failed > _SHUFFLES - _ENOUGH:
                return 1.0
        return 0.0

    return _bisect(fails, 0.0, 1, _MOST_GENERAL, within=0.02)


def _spread(n: int, mean: float) -> NDArray[np.float64]:
    """N losses of 0 and 1 (0 and -1 if the mean is negative), as evenly as possible."""
    return np.diff(np.ceil(np.arange(n + 1) * mean - TIE))


def _bisect(p_of: Callable[[int], float], failure: float, start: int, most: int, within: float = 0) -> int | None:
    """Some n with p(n) <= failure < p(n - 1), or 1; None if there is none up to `most`. `start` fails, or is 1."""
    # `within`: instead of p(n - 1), some p(m) with m >= n·(1 - within) is above
    above = start
    while p_of(above) > failure:
        above *= 2
        if above > most:
            return None
    below = above // 2
    while above - below > max(1, within * above):
        middle = (above + below) // 2
        above, below = (middle, below) if p_of(middle) <= failure else (above, middle)
    return above


# ---------------------------------------------------------------- in use: the bet turned around

# Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting", arXiv 2010.09686. `wsr`
# bets, before a policy is used, that its mean loss is below the tolerance, on a number of losses that is known; these,
# while it is used, that the mean is above, on losses that keep coming, and may be looked at after every one.

_MOST_OF_IT = 0.75
"""Share of the wealth that one loss may take at most."""
_BISECTIONS = 30


def wealth(losses: Losses, tolerance: float, *, failure: float = 0.05) -> float:
    """The largest wealth so far of a bettor against "the mean loss is at most tolerance", who began with 1.

    With σ² as in `wsr` and the bets of the paper's equation 26,

        λ_i = min(√(2 ln(1/failure) / (σ²_{i-1}·i·ln(i + 1))), 3/(4·tolerance)),
        K_i = Π_{j<=i} (1 + λ_j·(x_j - tolerance)).

    As long as every loss is at most `tolerance` in expectation, given those before it, K is a nonnegative
    supermartingale, and by Ville's inequality it ever reaches 1 / failure with probability at most `failure`. So the
    first time that it does says that the mean is above.

    Args:
        losses: In the order they came, which they have no part in, [N] in [0, 1]; there may be none.
        tolerance: Promised mean loss, in (0, 1).
        failure: Probability of a false alarm that is allowed for; bets are made for it, and are valid for any other.

    Returns:
        max_i K_i, at least 1.

    Raises:
        ValueError: A loss is NaN or outside [0, 1], or a level is outside (0, 1).
    """
    check_level("tolerance", tolerance)
    check_level("failure", failure)
    if not len(losses):
        return 1.0
    x = checked(losses, 0, 1)
    count = np.arange(1, len(x) + 1)
    bet = np.sqrt(2 * math.log(1 / failure) / (spread_before(x) * count * np.log(count + 1)))
    bet = np.minimum(bet, _MOST_OF_IT / tolerance)
    return float(np.exp(min(max(0.0, np.cumsum(np.log1p(bet * (x - tolerance))).max()), 700.0)))


def lower_limit(losses: Losses, *, failure: float = 0.05) -> float:
    """What the mean loss is above, at all times together, with probability 1 - failure: a lower confidence sequence.

    Returns:
        The largest tolerance that `wealth` rules out, found by bisection; 0 if none is. Errors are those of `wealth`.
    """
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):  # wealth falls as the tolerance grows
        middle = (low + high) / 2
        low, high = (middle, high) if wealth(losses, middle, failure=failure) >= 1 / failure else (low, middle)
    return low

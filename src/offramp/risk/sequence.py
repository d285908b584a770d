"""Is the mean loss above what was promised? A bet that may be looked at after every loss, for as long as one likes.

Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting", arXiv 2010.09686. It is
`offramp.risk.wsr` turned around: that one bets, before a policy is used, that its mean loss is below the tolerance, on
a number of losses that is known; this one bets, while it is used, that the mean is above, on losses that keep coming.
"""

from __future__ import annotations

import math

import numpy as np

from offramp.risk.bounds import check_level, spread_before
from offramp.risk.losses import Losses, checked

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

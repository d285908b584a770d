"""How well a share of trials is known."""

from __future__ import annotations

from scipy import special


def exact_interval(count: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's (1934) interval of a probability.

    Args:
        count: Successes.
        trials: Independent trials.
        level: Probability with which it holds the true one, at least.

    Returns:
        Its ends, in [0, 1].
    """
    tail = (1 - level) / 2
    low = float(special.betaincinv(count, trials - count + 1, tail)) if count else 0.0
    high = float(special.betaincinv(count + 1, trials - count, 1 - tail)) if count < trials else 1.0
    return low, high

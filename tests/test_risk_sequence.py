"""Is the mean loss above the promise? Against a loop, and by simulation of what is promised of the alarm."""

import math

import numpy as np
import pytest
from scipy import stats

from offramp.risk import lower_limit, wealth

LAWS = {
    "coins": lambda draw, mean, n: (draw.random(n) < mean).astype(float),
    "even": lambda draw, mean, n: draw.uniform(0, 2 * mean, n),
    "rare and partial": lambda draw, mean, n: np.where(draw.random(n) < 2 * mean, draw.random(n), 0.0),
}


def test_the_wealth_is_that_of_the_paper():
    x, tolerance, failure = [0.0, 0.4, 1.0, 0.2, 0.9], 0.3, 0.1
    have, most, total, squares, spread = 1.0, 1.0, 0.5, 0.25, 0.25
    for i, loss in enumerate(x, 1):
        bet = min(math.sqrt(2 * math.log(1 / failure) / (spread * i * math.log(i + 1))), 0.75 / tolerance)
        have *= 1 + bet * (loss - tolerance)
        most = max(most, have)
        total += loss
        squares += (loss - total / (i + 1)) ** 2
        spread = squares / (i + 1)
    assert wealth(x, tolerance, failure=failure) == pytest.approx(most)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("tolerance", "failure"), [(0.05, 0.1), (0.2, 0.05)])
def test_a_kept_promise_is_hardly_ever_called_broken(law, tolerance, failure):
    """Looked at after each of 400 losses whose mean is exactly what was promised."""
    draw, runs = np.random.default_rng(0), 1000
    alarms = sum(
        wealth(LAWS[law](draw, tolerance, 400), tolerance, failure=failure) >= 1 / failure for _ in range(runs)
    )
    assert alarms <= stats.binom.ppf(0.999, runs, failure)


@pytest.mark.parametrize("law", LAWS)
def test_a_broken_promise_is_found(law):
    """Three times what was promised, within 400 losses."""
    draw = np.random.default_rng(1)
    found = [wealth(LAWS[law](draw, 0.15, 400), 0.05, failure=0.05) >= 20 for _ in range(100)]
    assert sum(found) >= 99


def test_the_lower_limit_is_below_the_mean_at_all_times_together():
    draw, runs, failure = np.random.default_rng(2), 200, 0.1
    wrong = sum(lower_limit(LAWS["coins"](draw, 0.3, 200), failure=failure) > 0.3 for _ in range(runs))
    assert wrong <= stats.binom.ppf(0.999, runs, failure)
    assert 0.2 < lower_limit(LAWS["coins"](draw, 0.3, 2000), failure=failure) < 0.3


def test_the_lower_limit_is_where_the_alarm_rings():
    losses = LAWS["even"](np.random.default_rng(3), 0.2, 300)
    low = lower_limit(losses, failure=0.05)
    assert wealth(losses, low, failure=0.05) >= 20
    assert wealth(losses, low + 1e-6, failure=0.05) < 20


def test_nothing_is_said_of_nothing_and_what_is_no_loss_is_refused():
    assert (wealth([], 0.1), lower_limit([])) == (1.0, 0.0)
    with pytest.raises(ValueError, match=r"losses\[1\]"):
        wealth([0.5, 1.5], 0.1)
    with pytest.raises(ValueError, match="tolerance is 0"):
        wealth([0.5], 0)

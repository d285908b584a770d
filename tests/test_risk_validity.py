"""The promises, kept in simulated calibrations.

Each simulation counts violations in RUNS calibrations whose truth is known and sits at the boundary: one setting's mean
loss is exactly `tolerance`, and the next one's is above it. A bound that keeps its promise violates it with probability
at most `failure` per run, so more than `most(..)` violations come by chance with a probability below 1e-5 per test, and
below 5e-4 over all of this file; seeds are fixed, so a passing test stays so. At 2000 runs and failure 0.1 that is 259
violations, so a bound that fails in more than 16 % of the calibrations is found with near certainty (> 99.9 %).
"""

import math
from functools import partial

import numpy as np
import pytest
from scipy import stats

from offramp.classifiers.certify import RowPromise
from offramp.risk import (
    binomial,
    conformal_risk_control,
    fixed_sequence,
    hoeffding,
    hoeffding_bentkus,
    hoeffding_signed,
    pareto_front,
    search,
    wsr,
)

RUNS, N, TOLERANCE, FAILURE = 2000, 300, 0.1, 0.1
CHANCE = 1e-5
MEANS = (0.02, TOLERANCE, 0.14)  # safe; exactly at the tolerance, not to be certified; above it
FIRST_WRONG = 1


def most(runs):
    return int(stats.binom.isf(CHANCE, runs, FAILURE))


# Each draws losses of a given mean: [runs, n].
LOSSES = {
    "coins": lambda rng, mean, size: (rng.random(size) < mean).astype(float),
    "beta": lambda rng, mean, size: rng.beta(2, 2 / mean - 2, size),
    "spiky beta": lambda rng, mean, size: rng.beta(0.1, 0.1 / mean - 0.1, size),
    "uniform": lambda rng, mean, size: rng.random(size) * 2 * mean,
    "rare halves": lambda rng, mean, size: (rng.random(size) < 2 * mean) / 2,
    "constant": lambda rng, mean, size: np.full(size, mean),
}
SIGNED = {
    "signed coins": lambda rng, mean, size: np.where(rng.random(size) < (1 + mean) / 2, 1.0, -1.0),
    "signed uniform": lambda rng, mean, size: rng.uniform(2 * mean - 1, 1, size),
    "mostly zero": lambda rng, mean, size: rng.choice([-1.0, 0.0, 1.0], size, p=[0.05, 0.9 - mean, 0.05 + mean]),
}
BETTING = partial(wsr, failure=FAILURE)


def violations(bound, draw, rng):
    """Calibrations that certify a setting whose mean is not below the tolerance."""
    size = (RUNS, N)
    drawn = [draw(rng, mean, size) for mean in MEANS]
    count = 0
    for run in range(RUNS):
        result = fixed_sequence((bound(losses[run], TOLERANCE) for losses in drawn), FAILURE)
        count += result.index is not None and result.index >= FIRST_WRONG
    return count


@pytest.mark.parametrize(
    ("bound", "kind"),
    [
        *((bound, kind) for bound in (hoeffding, hoeffding_bentkus, BETTING) for kind in LOSSES),
        (binomial, "coins"),
        *((bound, kind) for bound in (hoeffding_signed, BETTING) for kind in SIGNED),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", "wsr"),
)
def test_violations_are_as_rare_as_promised(bound, kind):
    count = violations(bound, (LOSSES | SIGNED)[kind], np.random.default_rng(20))
    assert count <= most(RUNS)


def test_the_simulation_finds_a_bound_that_lies():
    def too_sure(losses, tolerance):
        return hoeffding_bentkus(losses, tolerance) ** 8

    def with_hindsight(losses, tolerance):
        return binomial(np.sort(losses)[: len(losses) - 6], tolerance)

    for bound in (too_sure, with_hindsight):
        assert violations(bound, LOSSES["coins"], np.random.default_rng(20)) > most(RUNS)


def test_the_exact_bound_is_nearly_used_up():
    # The largest count that passes at n = 300 is fixed, and so is the chance to stay at or below it.
    counts = np.arange(N)
    count = counts[stats.binom.cdf(counts, N, TOLERANCE) <= FAILURE].max()
    expected = stats.binom.cdf(count, N, TOLERANCE)
    found = violations(binomial, LOSSES["coins"], np.random.default_rng(21))
    assert abs(found - expected * RUNS) < 5 * math.sqrt(RUNS * expected)
    assert expected > 0.069


def test_betting_is_valid_whatever_it_aims_at():
    rng = np.random.default_rng(22)
    for aim in (0.001, 0.9):
        count = violations(partial(wsr, failure=aim), LOSSES["coins"], rng)
        assert count <= most(RUNS)


# ---------------------------------------------------------------- choosing among several


CHAINS = [[2 * chain, 2 * chain + 1] for chain in range(5)]
COINS = RowPromise("coins", TOLERANCE, FAILURE, "binomial")


def test_chains_keep_the_promise_together():
    # Five chains; in each, the second setting is at the boundary, and cheaper.
    runs, groups = 1000, 5
    rng = np.random.default_rng(23)
    means = [(mean, TOLERANCE) for mean in (0.02, 0.03, 0.04, 0.05, TOLERANCE)]  # the last is wrong from its start
    drawn = rng.random((runs, groups, 2, N)) < np.array(means)[:, :, None]
    wrong = chosen = alone = 0
    for losses in drawn:
        flat = losses.reshape(-1, N).astype(float)
        selected = search(CHAINS, flat.__getitem__, lambda setting: -(setting % 2), COINS).selected
        chosen += selected is not None
        wrong += selected is not None and means[selected // 2][selected % 2] >= TOLERANCE
        alone += any(
            means[c][i] >= TOLERANCE
            for c, chain in enumerate(losses)
            for i in fixed_sequence([binomial(setting, TOLERANCE) for setting in chain], FAILURE).passed
        )
    assert wrong <= most(runs)
    assert alone > most(runs)  # without dividing `failure` it would not hold
    assert chosen > 0.9 * runs


def test_an_order_found_on_other_prompts_keeps_the_promise():
    """Laufer-Goldshtein et al. (2023), "Efficiently Controlling Multiple Risks with Pareto Testing"."""
    # A grid of 12: four good, eight at the boundary and cheaper; part 1 is small enough to be fooled often.
    runs, n = 1000, 400
    rng = np.random.default_rng(24)
    means = np.array([0.01, 0.02, 0.03, 0.04] + [TOLERANCE] * 8)
    costs = np.array([9.0, 8.0, 7.0, 6.0, *np.linspace(5, 1, 8)])
    wrong = chosen = fooled = 0
    for run in range(runs):
        losses = (rng.random((12, n)) < means[:, None]).astype(float)
        order = np.random.default_rng(run).permutation(n)
        first, second = order[: n // 2], order[n // 2 :]
        front = pareto_front(losses[:, first].mean(axis=1), costs)
        outcome = search(
            [front], lambda setting, second=second, losses=losses: losses[setting, second], costs.__getitem__, COINS
        )
        chosen += outcome.selected is not None
        wrong += any(means[test.setting] >= TOLERANCE for test in outcome.tests if test.passed)
        # On the same prompts, in the order they suggest, without parting them: choosing the best-looking.
        fooled += min(binomial(losses[setting], TOLERANCE) for setting in range(4, 12)) <= FAILURE
    assert wrong <= most(runs)
    assert fooled > most(runs)
    assert chosen > 0.9 * runs


# ---------------------------------------------------------------- on average


@pytest.mark.parametrize("shape", ["monotone", "bumpy"])
def test_the_mean_is_below_the_tolerance(shape):
    """The mean over 4000 calibrations of the chosen setting's loss on a new prompt is at most `tolerance`.

    Its standard error is that of `runs` losses in [0, 1]; 4.5 of them are allowed, so the test errs with probability
    below 1e-5. The true risk of each setting is known, so only the calibration draw is random.
    """
    runs, n, settings = 4000, 50, 40
    rng = np.random.default_rng(25)
    risks = np.linspace(0, 0.4, settings + 1)[1:]
    if shape == "bumpy":  # each prompt hurts only in a stretch of settings: not monotone
        stretch = 8
    true, above = [], 0
    for _ in range(runs):
        start = rng.random(n)[None, :]  # the loss is 1 from the setting on whose risk reaches this
        losses = (start < risks[:, None]).astype(float)
        if shape == "bumpy":
            losses -= np.concatenate([np.zeros((stretch, n)), losses[:-stretch]])
        index = conformal_risk_control(losses, TOLERANCE).index
        if index is None:
            true.append(0.0)
            continue
        risk = risks[index] - (risks[index - stretch] if shape == "bumpy" and index >= stretch else 0)
        true.append(risk)
        above += risk > TOLERANCE
    mean, error = np.mean(true), np.std(true) / math.sqrt(runs)
    assert mean <= TOLERANCE + 4.5 * error
    assert mean > 0.05 if shape == "monotone" else mean > 0  # and something is used of it
    if shape == "monotone":
        assert above > FAILURE * runs  # on average only: this is not a guarantee for one calibration


def test_the_mean_is_below_the_tolerance_at_the_finest_grid():
    # With a continuum of settings, the mean is at least tolerance - 1 / (n + 1) (the paper's lower bound: 2 / (n + 1)).
    runs, n = 2000, 49
    rng = np.random.default_rng(26)
    risks = np.linspace(0, 0.4, 400)
    true = []
    for _ in range(runs):
        index = conformal_risk_control(rng.random(n)[None, :] < risks[:, None], TOLERANCE).index
        true.append(0.0 if index is None else risks[index])
    error = np.std(true) / math.sqrt(runs)
    assert TOLERANCE - 2 / (n + 1) - 4.5 * error <= np.mean(true) <= TOLERANCE + 4.5 * error

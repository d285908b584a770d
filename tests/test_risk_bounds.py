"""P-values against closed forms, scipy's distributions and plain loops. Their validity: test_risk_validity.py."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offramp.risk import (
    BOUNDS,
    binomial,
    hoeffding,
    hoeffding_bentkus,
    hoeffding_signed,
    samples_needed,
    samples_needed_like,
    wsr,
)

OF_MEAN = {name: bound for name, bound in BOUNDS.items() if name != "wsr"}

tolerances = st.floats(0.01, 0.99)
coins = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60)
fractions = st.lists(st.floats(0, 1), min_size=1, max_size=60)


def losses_for(name):
    return coins if name == "binomial" else fractions


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("tolerance", "mean", "bentkus", "plain", "exact"),
    [
        (0.05, 0.0, 59, 600, 59),
        (0.05, 0.02, 240, 1665, 208),
        (0.10, 0.0, 29, 150, 29),
        (0.10, 0.05, 173, 600, 142),
        (0.25, 0.15, 97, 150, 70),
    ],
)
def test_samples_needed_for_five_percent(tolerance, mean, bentkus, plain, exact):
    assert samples_needed(hoeffding_bentkus, tolerance, 0.05, mean) == bentkus
    assert samples_needed(hoeffding, tolerance, 0.05, mean) == plain
    assert samples_needed(binomial, tolerance, 0.05, mean) == exact
    assert samples_needed(hoeffding_signed, tolerance, 0.05, mean) == pytest.approx(4 * plain, abs=4)


def test_no_loss_at_all_by_hand():
    # P(Bin(n, t) <= 0) = (1 - t)^n <= failure; h(0, t) = -ln(1 - t) gives the same.
    for tolerance, failure in [(0.05, 0.05), (0.1, 0.01), (0.5, 0.2)]:
        n = math.ceil(math.log(failure) / math.log(1 - tolerance))
        assert samples_needed(binomial, tolerance, failure, 0.0) == n
        assert samples_needed(hoeffding_bentkus, tolerance, failure, 0.0) == n
        assert hoeffding_bentkus(np.zeros(n), tolerance) == pytest.approx((1 - tolerance) ** n)


def test_hoeffding_by_hand():
    losses = [0.1, 0.3, 0.2, 0.0]
    assert hoeffding(losses, 0.25) == pytest.approx(math.exp(-2 * 4 * 0.1**2))
    assert hoeffding_signed(losses, 0.25) == pytest.approx(math.exp(-4 * 0.1**2 / 2))
    assert hoeffding_signed([-1.0, 0.5], 0.25) == pytest.approx(math.exp(-2 * 0.5**2 / 2))
    assert hoeffding(losses, 0.15) == hoeffding_signed(losses, 0.15) == hoeffding_bentkus(losses, 0.15) == 1


@pytest.mark.parametrize("n", [1, 2, 7, 300, 5000])
def test_binomial_equals_scipys_distribution(n):
    for tolerance in (0.01, 0.1, 0.5, 0.95):
        for ones in {0, 1, n // 20, n // 10, n // 2, n}:
            losses = np.repeat([1.0, 0.0], [ones, n - ones])
            expected = stats.binom.cdf(ones, n, tolerance)
            assert binomial(losses, tolerance) == pytest.approx(expected, rel=1e-9, abs=1e-300)
            assert binomial(losses, tolerance) == pytest.approx(
                stats.binomtest(ones, n, tolerance, alternative="less").pvalue, rel=1e-9, abs=1e-300
            )


@given(fractions, tolerances)
def test_hoeffding_bentkus_equals_its_formula(losses, tolerance):
    n, mean = len(losses), math.fsum(losses) / len(losses)
    low = min(mean, tolerance)
    h = (low * math.log(low / tolerance) if low else 0) + (1 - low) * (math.log((1 - low) / (1 - tolerance)))
    expected = min(math.exp(-n * h), math.e * stats.binom.cdf(math.ceil(n * mean - 1e-9), n, tolerance))
    assert hoeffding_bentkus(losses, tolerance) == pytest.approx(expected, rel=1e-9)


def test_a_whole_sum_is_not_rounded_up():
    ones, n = next((k, n) for n in range(2, 1000) for k in range(1, n) if n * (k / n) > k)  # in floats
    losses = np.repeat([1.0, 0.0], [ones, n - ones])
    tolerance = min(0.99, 1.5 * ones / n)
    exact = stats.binom.cdf(ones, n, tolerance)
    assert binomial(losses, tolerance) == pytest.approx(exact, rel=1e-9)
    assert hoeffding_bentkus(losses, tolerance) <= math.e * exact * (1 + 1e-9)
    # One in 590 at 5 %: the tail at 1 decides; the one at 2 is more than ten times as large.
    for losses in ([1 / 590] * 590, [1 / 3] * 3 + [0.0] * 587, [0.1] * 3 + [0.7] + [0.0] * 586):
        assert hoeffding_bentkus(losses, 0.05) == pytest.approx(math.e * stats.binom.cdf(1, 590, 0.05), rel=1e-9)


# ---------------------------------------------------------------- betting


def wealth_loop(losses, tolerance, failure):
    """The bettor, one loss at a time, with two passes for the variance."""
    n, seen, means, wealth, best = len(losses), [], [], 1.0, 1.0
    for x in losses:
        i = len(seen) + 1
        variance = (0.25 + sum((y - m) ** 2 for y, m in zip(seen, means, strict=True))) / i  # of i - 1 losses
        bet = min(1.0, math.sqrt(2 * math.log(1 / failure) / (n * variance)))
        wealth *= 1 - bet * (x - tolerance)
        best = max(best, wealth)
        seen.append(x)
        means.append((0.5 + sum(seen)) / (i + 1))
    return min(1.0, 1 / best)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=80), tolerances, st.sampled_from([0.01, 0.05, 0.3]))
def test_betting_equals_a_loop(losses, tolerance, failure):
    expected = wealth_loop(losses, tolerance, failure)
    assert wsr(losses, tolerance, failure=failure) == pytest.approx(expected, rel=1e-9)


def test_betting_by_hand():
    # One loss of 0: the bet is min(1, √(8 ln 20)) = 1, the wealth 1 + tolerance.
    assert wsr([0.0], 0.1) == pytest.approx(1 / 1.1)
    assert wsr([1.0], 0.1) == 1  # all but a tenth is lost; the maximum is the start


def test_betting_depends_on_the_order_and_on_what_it_aims_at():
    losses = np.repeat([0.0, 1.0], [95, 5])
    assert wsr(losses, 0.2) < wsr(losses[::-1], 0.2)
    assert wsr(losses, 0.2, failure=0.5) != wsr(losses, 0.2)


def test_betting_uses_small_variance_and_far_negative_losses():
    losses = np.full(100, 0.05)
    assert wsr(losses, 0.1) < hoeffding_bentkus(losses, 0.1) < hoeffding(losses, 0.1)
    assert 0 <= wsr([-50.0] * 4000, 0.1) < 1e-300  # no overflow


# ---------------------------------------------------------------- properties of all


@pytest.mark.parametrize("name", BOUNDS)
@given(data=st.data(), tolerance=tolerances, higher=tolerances)
def test_more_tolerance_never_raises_the_p_value(name, data, tolerance, higher):
    losses = data.draw(losses_for(name))
    low, high = sorted((tolerance, higher))
    p = BOUNDS[name](losses, low)
    assert 0 <= p <= 1
    assert BOUNDS[name](losses, high) <= p * (1 + 1e-9)


@pytest.mark.parametrize("name", OF_MEAN)
@given(data=st.data(), tolerance=tolerances)
def test_a_larger_loss_never_lowers_the_p_value(name, data, tolerance):
    losses = data.draw(losses_for(name))
    index = data.draw(st.integers(0, len(losses) - 1))
    larger = list(losses)
    larger[index] = 1.0 if name == "binomial" else data.draw(st.floats(losses[index], 1))
    assert BOUNDS[name](larger, tolerance) >= BOUNDS[name](losses, tolerance) * (1 - 1e-9)


@pytest.mark.parametrize("name", OF_MEAN)
@given(data=st.data(), tolerance=tolerances)
def test_order_does_not_matter_but_to_the_bettor(name, data, tolerance):
    losses = data.draw(losses_for(name))
    assert BOUNDS[name](data.draw(st.permutations(losses)), tolerance) == BOUNDS[name](losses, tolerance)


@pytest.mark.parametrize("name", BOUNDS)
def test_tensors_arrays_and_lists_are_the_same(name):
    losses = [0.0, 1.0, 0.0, 0.0, 0.0]
    expected = BOUNDS[name](losses, 0.4)
    assert isinstance(expected, float)
    for kind in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        assert BOUNDS[name](torch.tensor(losses, dtype=kind), 0.4) == expected
    assert BOUNDS[name](np.array(losses), 0.4) == expected
    assert BOUNDS[name](np.array(losses) > 0.5, 0.4) == expected


@given(coins, tolerances)
def test_exact_is_the_strongest_for_coins(losses, tolerance):
    assert binomial(losses, tolerance) <= hoeffding_bentkus(losses, tolerance) * (1 + 1e-9)
    assert hoeffding_bentkus(losses, tolerance) <= hoeffding(losses, tolerance) * (1 + 1e-9)
    assert hoeffding(losses, tolerance) <= hoeffding_signed(losses, tolerance)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([0.0, math.nan], r"losses\[1\] is nan"),
        ([math.inf], r"losses\[0\] is inf"),
        ([-math.inf], r"losses\[0\] is -inf"),
        ([0.0, 0.5, 1.01], r"losses\[(1|2)\] is "),
        ([], "losses is empty; at least one prompt is needed"),
        ([[0.0, 1.0]], r"losses has shape \[1, 2\]; it must have 1 dimension"),
    ],
)
def test_what_is_no_loss_is_refused(name, losses, message):
    with pytest.raises(ValueError, match=message):
        BOUNDS[name](losses, 0.1)


def test_the_range_is_the_bounds_own():
    for bound in (hoeffding, hoeffding_bentkus, binomial):
        with pytest.raises(ValueError, match=r"losses\[1\] is -0.1; allowed are finite values in \[0, 1\]"):
            bound([0.0, -0.1], 0.1)
    with pytest.raises(ValueError, match=r"losses\[0\] is -1.5; allowed are finite values in \[-1, 1\]"):
        hoeffding_signed([-1.5], 0.1)
    with pytest.raises(ValueError, match=r"losses\[2\] is 0.5; the binomial bound is for losses that are 0 or 1"):
        binomial([0.0, 1.0, 0.5], 0.1)
    assert wsr([-1.5], 0.1) < 1


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("tolerance", [0, 1, -0.1, 1.5, math.nan])
def test_a_tolerance_is_strictly_between_0_and_1(name, tolerance):
    with pytest.raises(ValueError, match=f"tolerance is {tolerance}; allowed are values strictly between 0 and 1"):
        BOUNDS[name]([0.0], tolerance)


def test_other_levels_are_checked():
    with pytest.raises(ValueError, match="failure is 0"):
        wsr([0.0], 0.1, failure=0)
    with pytest.raises(ValueError, match="failure is 1"):
        samples_needed(hoeffding, 0.1, 1, 0.0)
    with pytest.raises(ValueError, match="tolerance is 0"):
        samples_needed(hoeffding, 0, 0.1, 0.0)
    with pytest.raises(ValueError, match=r"mean is -0.1; allowed are values in \[0, 1\]"):
        samples_needed(binomial, 0.1, 0.1, -0.1)
    with pytest.raises(ValueError, match="mean is nan"):
        samples_needed(wsr, 0.1, 0.1, math.nan)


# ---------------------------------------------------------------- how many


def at_mean(name, n, mean, tolerance):
    """The p-value of n losses with that mean; for coins, with one more 1 where it is between two."""
    if name == "binomial":
        return stats.binom.cdf(math.ceil(n * mean - 1e-9), n, tolerance)
    return BOUNDS[name](np.full(n, mean), tolerance)


@pytest.mark.parametrize("name", OF_MEAN)
@given(tolerance=st.floats(0.1, 0.9), share=st.floats(0, 0.7), failure=st.floats(0.01, 0.5))
def test_so_many_are_enough_and_one_less_is_not(name, tolerance, share, failure):
    mean = share * tolerance
    n = samples_needed(BOUNDS[name], tolerance, failure, mean)
    if n > 1:
        assert at_mean(name, n - 1, mean, tolerance) > failure * (1 - 1e-6)
    for more in (0, 1, 2, 3, 5, 10, 20, 50, 100, 1000):
        assert at_mean(name, n + more, mean, tolerance) <= failure * (1 + 1e-6)


def test_a_mean_that_is_not_below_the_tolerance_never_suffices():
    for bound in BOUNDS.values():
        assert samples_needed(bound, 0.1, 0.05, 0.1) is None
        assert samples_needed(bound, 0.1, 0.05, 0.3) is None


def test_close_to_the_tolerance_many_are_needed():
    for bound in OF_MEAN.values():
        n = samples_needed(bound, 0.05, 0.05, 0.049)
        assert n > 100_000
    assert samples_needed(hoeffding, 0.05, 0.05, 0.049) == math.ceil(math.log(20) / (2 * 0.001**2))
    assert samples_needed(hoeffding, 0.05, 0.05, 0.05 - 1e-9) is None  # 10^18


def test_betting_needs_about_as_many_as_it_says():
    for mean in (0.0, 0.02, -0.2):
        n = samples_needed(partial(wsr, failure=0.01), 0.1, 0.01, mean)
        for count, enough in ((n, True), (n // 2, False)):
            losses = np.diff(np.ceil(np.arange(count + 1) * mean - 1e-9))
            assert losses.mean() == pytest.approx(mean, abs=1 / count)
            assert (wsr(losses, 0.1, failure=0.01) <= 0.01) is enough


@pytest.mark.parametrize("signed", [False, True])
def test_betting_on_losses_of_small_variance_needs_as_many_as_pass_when_they_are_repeated(signed):
    losses = np.random.default_rng(0).beta(0.4, 9, 150) - 0.2 * signed * (np.arange(150) % 9 == 0)
    tolerance, bound = losses.mean() + 0.007, partial(wsr, failure=0.05)
    n = samples_needed_like(bound, losses, tolerance, 0.05)
    assert n == samples_needed_like(bound, losses, tolerance, 0.05)
    assert n < samples_needed(bound, tolerance, 0.05, losses.mean()) / 2  # which takes them to be 0 or 1
    shuffle = np.random.default_rng(1)

    def passing(count):
        return np.mean([wsr(shuffle.permutation(np.resize(losses, count)), tolerance) <= 0.05 for _ in range(60)])

    # whole repetitions, which keep the mean: the next number of them, and half as many
    assert passing(150 * -(-n // 150)) > 0.8
    assert passing(150 * max(1, n // 300)) < 0.5


def test_bounds_of_the_mean_need_the_same_in_both_ways():
    losses = np.array([0.0] * 19 + [1.0])
    assert samples_needed_like(binomial, losses, 0.1, 0.05) == pytest.approx(
        samples_needed(binomial, 0.1, 0.05, 0.05), rel=0.1
    )
    assert samples_needed_like(wsr, losses, 0.05, 0.05) is None
    with pytest.raises(ValueError, match="failure is 0"):
        samples_needed_like(wsr, losses, 0.1, 0)
    with pytest.raises(ValueError, match="allowed are"):
        samples_needed_like(wsr, [2.0], 0.1, 0.1)

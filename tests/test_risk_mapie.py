"""P-values, fixed sequences and conformal risk control against MAPIE 1.6, to rounding (1e-12).

Where n·mean is a whole number, MAPIE takes it up by one if the float lies above; numbers of losses here are powers of 2
and losses eighths, so that sums and means are exact. Betting is not compared: MAPIE's bound adds the largest wealth of
the first half of the losses to that of the second, which is another number than the largest wealth along all of them.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.risk import binomial, conformal_risk_control, fixed_sequence, hoeffding_bentkus

mapie = pytest.importorskip("mapie.risk_control")
methods = pytest.importorskip("mapie.risk_control.methods")

EXACT = {"rtol": 1e-12, "atol": 1e-300}


def theirs(losses, tolerance, binary=False):
    means = np.asarray(losses).mean(axis=1)
    return methods.compute_hoeffding_bentkus_p_value(means, np.shape(losses)[1], tolerance, binary)[:, 0]


@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.1, 0.37, 0.9])
@pytest.mark.parametrize("n", [1, 2, 16, 128, 2048])
def test_p_values_of_every_mean(n, tolerance):
    counts = np.unique(np.linspace(0, n, min(n + 1, 65)).astype(int))
    coins = (np.arange(n) < counts[:, None]).astype(float)  # [counts, n]
    np.testing.assert_allclose([binomial(row, tolerance) for row in coins], theirs(coins, tolerance, True), **EXACT)
    ours = [hoeffding_bentkus(row, tolerance) for row in coins]
    np.testing.assert_allclose(ours, theirs(coins, tolerance), **EXACT)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9), st.floats(0.001, 0.999), st.floats(0, 1), st.integers(0, 2**31))
def test_p_values_of_losses_between_0_and_1(power, tolerance, ceiling, seed):
    eighths = np.random.default_rng(seed).integers(0, round(8 * ceiling) + 1, size=(1, 2**power)) / 8
    np.testing.assert_allclose(hoeffding_bentkus(eighths[0], tolerance), theirs(eighths, tolerance)[0], **EXACT)


@given(st.lists(st.sampled_from([0.0, 0.01, 0.05, 0.051, 0.5, 1.0]), min_size=1, max_size=12), st.floats(0.001, 0.99))
def test_fixed_sequences(p_values, failure):
    assert list(fixed_sequence(p_values, failure).passed) == mapie.control_fwer(
        np.array(p_values), failure, "fixed_sequence"
    ).tolist()  # fmt: skip


def test_learn_then_test_along_thresholds():
    """All of it together: losses of twenty thresholds to the threshold that may be used."""
    draw = np.random.default_rng(0)
    losses = (draw.random(1024) < np.linspace(0, 0.2, 20)[:, None]).astype(float)
    for tolerance, failure in [(0.05, 0.05), (0.1, 0.01), (0.001, 0.1)]:
        ours = fixed_sequence((hoeffding_bentkus(row, tolerance) for row in losses), failure)
        passed = mapie.control_fwer(theirs(losses, tolerance), failure, "fixed_sequence")
        assert list(ours.passed) == passed.tolist()


@pytest.mark.parametrize("n", [1, 20, 333])
@pytest.mark.parametrize("tolerance", [0.05, 0.2, 0.6])
def test_conformal_risk_control_of_monotone_losses(n, tolerance):
    draw = np.random.default_rng(n)
    losses = np.sort(draw.random((30, n)) ** 2, axis=0)  # grow from setting to setting
    settings_ = np.arange(30.0)
    _, risks = methods.get_r_hat_plus(losses.T, settings_, "crc", None, None, None)
    ours = conformal_risk_control(losses, tolerance)
    np.testing.assert_allclose(ours.p_values, risks[: len(ours.p_values)], rtol=1e-12)
    assert len(ours.p_values) == min(len(ours.passed) + 1, 30)
    if ours.index is not None:  # where none is allowed, MAPIE warns and returns the first
        assert settings_[ours.index] == methods.find_best_predict_param(settings_, risks, np.array([tolerance]))[0]

"""Bayesian regression against dense linear algebra, an optimiser of the evidence, and scikit-learn."""

import math
import warnings

import pytest
import torch
from scipy import optimize, stats

from offramp.uncertainty import bayesian_regression
from offramp.uncertainty.bayesian_regression import BayesianRegressionConfig
from offramp.uncertainty.outputs import augmented


def problem(rows=80, widths=(3, 6), noise=0.5, seed=0, location=0.0, scale=1.0):
    random = torch.Generator().manual_seed(seed)
    features = [torch.randn(rows, width, generator=random) for width in widths]
    truth = features[-1] @ torch.linspace(-1, 1, widths[-1]) + 0.3
    return features, location + scale * (truth + noise * torch.randn(rows, generator=random)).double()


def test_posterior_and_prediction_against_dense_algebra():
    features, y = problem(location=7.0, scale=3.0)
    state = bayesian_regression.fit(features, y)
    new = [f[:5] + 0.3 for f in features]
    prediction = bayesian_regression.apply(state, new)
    standard = (y - y.mean()) / y.std(correction=0)
    for e, layer in enumerate(state.exits):
        x, h = augmented(features[e]), augmented(new[e])
        beta, eta = 1 / layer.noise, layer.prior_precision
        covariance = torch.linalg.inv(eta * torch.eye(x.shape[1], dtype=torch.float64) + beta * x.mT @ x)
        mean = beta * covariance @ x.mT @ standard
        torch.testing.assert_close(layer.mean, mean, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(layer.root @ layer.root, covariance, rtol=1e-9, atol=1e-13)
        unit = float(y.std(correction=0))
        torch.testing.assert_close(prediction.mean[e], y.mean() + unit * (h @ mean))
        torch.testing.assert_close(prediction.epistemic[e], unit**2 * torch.einsum("nm,mk,nk->n", h, covariance, h))
        assert float(prediction.noise[e]) == pytest.approx(unit**2 / beta)


def test_evidence_is_that_of_a_gaussian_and_the_fixed_point_its_maximum():
    features, y = problem(rows=60, widths=(4,))
    layer = bayesian_regression.fit(features, y).exits[0]
    x = augmented(features[0]).numpy()
    standard = ((y - y.mean()) / y.std(correction=0)).numpy()

    def evidence(logs):
        eta, beta = (math.exp(value) for value in logs)
        return stats.multivariate_normal.logpdf(standard, cov=x @ x.T / eta + torch.eye(60).numpy() / beta)

    at = [math.log(layer.prior_precision), -math.log(layer.noise)]
    assert layer.evidence == pytest.approx(evidence(at), abs=1e-6)
    best = optimize.minimize(lambda logs: -evidence(logs), [0.0, 0.0], method="Nelder-Mead")
    assert layer.converged
    assert evidence(at) == pytest.approx(-best.fun, abs=1e-4)


def test_against_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    features, y = problem(rows=200)
    layer = bayesian_regression.fit(features, y).exits[1]
    x = augmented(features[1]).numpy()
    standard = ((y - y.mean()) / y.std(correction=0)).numpy()
    flat = dict.fromkeys(("alpha_1", "alpha_2", "lambda_1", "lambda_2"), 0.0)
    other = linear.BayesianRidge(max_iter=1000, tol=1e-10, fit_intercept=False, **flat).fit(x, standard)
    assert layer.noise == pytest.approx(1 / other.alpha_, rel=1e-3)
    assert layer.prior_precision == pytest.approx(other.lambda_, rel=1e-3)
    torch.testing.assert_close(layer.mean, torch.from_numpy(other.coef_), rtol=1e-3, atol=1e-4)


def test_units_of_targets_do_not_matter():
    features, y = problem()
    plain = bayesian_regression.apply(bayesian_regression.fit(features, y), features)
    moved = bayesian_regression.apply(bayesian_regression.fit(features, 1000 - 20 * y), features)
    torch.testing.assert_close(moved.mean, 1000 - 20 * plain.mean)
    torch.testing.assert_close(moved.total, 400 * plain.total)


def test_noise_and_weights_are_found_with_many_rows():
    features, y = problem(rows=20_000, widths=(5,), noise=0.5)
    state = bayesian_regression.fit(features, y)
    prediction = bayesian_regression.apply(state, features)
    assert float(prediction.noise[0]) == pytest.approx(0.25, rel=0.05)
    assert float(prediction.epistemic.mean()) == pytest.approx(0.25 * 6 / 20_000, rel=0.05)  # σ²·m/N for least squares


def test_a_prior_at_the_heads_keeps_them_where_there_is_little_data():
    features, y = problem(rows=12, widths=(8,))
    head = torch.arange(9.0)
    config = BayesianRegressionConfig(prior_mean="head")
    random = torch.Generator().manual_seed(1)
    y = augmented(features[0]) @ head.double() + 2 * torch.randn(12, generator=random)
    state = bayesian_regression.fit(features, y, config, heads=[head])
    new = [torch.randn(4, 8, generator=random)]
    expected = augmented(new[0]) @ head.double()
    error = (bayesian_regression.apply(state, new).mean[0] - expected).abs().max()
    zero = bayesian_regression.apply(bayesian_regression.fit(features, y), new)
    assert float(error) < 1 < float((zero.mean[0] - expected).abs().max())  # 12 rows say little about 9 weights


def test_rows_that_are_interpolated_are_told():
    features, _ = problem(rows=30, widths=(4,))
    exact = augmented(features[0]) @ torch.arange(5.0).double()
    with pytest.warns(UserWarning, match="exit 1 interpolates"):
        state = bayesian_regression.fit(features, exact)
    assert math.isfinite(state.exits[0].prior_precision)
    assert bool(bayesian_regression.apply(state, features).total.isfinite().all())


def test_fewer_rows_than_weights_and_constant_targets_stay_finite():
    features, y = problem(rows=5, widths=(20,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        few = bayesian_regression.fit(features, y)
        constant = bayesian_regression.fit(features, torch.full((5,), 3.0))
    assert bool(bayesian_regression.apply(few, features).total.isfinite().all())
    torch.testing.assert_close(bayesian_regression.apply(constant, features).mean[0], torch.full((5,), 3.0).double())


def test_steps_that_do_not_do_are_told():
    features, y = problem()
    with pytest.warns(UserWarning, match="did not settle in 2 steps"):
        state = bayesian_regression.fit(features, y, BayesianRegressionConfig(max_steps=2))
    assert not state.exits[0].converged


def test_wrong_input():
    features, y = problem()
    broken = [features[0], features[1].clone()]
    broken[1][3, 0] = torch.nan
    with pytest.raises(ValueError, match="row 3 at exit 2"):
        bayesian_regression.fit(broken, y)
    with pytest.raises(ValueError, match="target of row 1"):
        bayesian_regression.fit(features, y.clone().index_fill(0, torch.tensor([1]), torch.inf))
    with pytest.raises(ValueError, match="at least 2 rows"):
        bayesian_regression.fit([f[:1] for f in features], y[:1])
    with pytest.raises(ValueError, match="one matrix of 80 rows"):
        bayesian_regression.fit([f[:5] for f in features], y)
    with pytest.raises(ValueError, match=r"widths \[3\]"):
        bayesian_regression.apply(bayesian_regression.fit(features, y), features[:1])
    with pytest.raises(ValueError, match="prior_mean is 'zero' and heads"):
        bayesian_regression.fit(features, y, heads=[torch.zeros(4)])
    with pytest.raises(ValueError, match="'zero', 'head'"):
        BayesianRegressionConfig(prior_mean="mean")

"""Confidence sequences against root finding, plain loops and simulations of what they promise and what they do not."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from offramp.uncertainty import avcs_classification, avcs_regression, bayesian_regression
from offramp.uncertainty.avcs_classification import AVCSClassification, AVCSClassificationConfig
from offramp.uncertainty.avcs_regression import AVCSRegressionConfig
from offramp.uncertainty.bayesian_regression import RegressionPrediction
from offramp.uncertainty.outputs import ExitOutputs


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prediction(exits=4, rows=6, seed=0, ratio=0.3):
    random = generator(seed)
    noise = torch.rand(exits, generator=random, dtype=torch.float64) + 0.5
    epistemic = ratio * torch.rand(exits, rows, generator=random, dtype=torch.float64) * noise[:, None]
    mean = torch.randn(exits, rows, generator=random, dtype=torch.float64) * 0.3 + 100.0
    drawn = mean + epistemic.sqrt() * torch.randn(exits, rows, generator=random, dtype=torch.float64)
    return RegressionPrediction(mean, epistemic, noise), drawn.unsqueeze(1)


def log_ratio(given, drawn, y, e, n):
    """The definition, with scipy's densities."""
    return sum(
        stats.norm.logpdf(y, float(given.mean[i, n]), float(given.total[i, n].sqrt()))
        - stats.norm.logpdf(y, float(drawn[i, 0, n]), float(given.noise[i].sqrt()))
        for i in range(e + 1)
    )


# ---------------------------------------------------------------- regression: ends


def test_ends_solve_the_ratio_by_root_finding():
    given, drawn = prediction()
    sets = avcs_regression.intervals(given, drawn, 0.05)
    a, b, _ = avcs_regression.log_ratio(given, drawn)
    for e in range(4):
        for n in range(6):
            lowest = float(given.mean[0, n] - b[e, 0, n] / (2 * a[e, 0, n]))
            excess = lambda y, e=e, n=n: log_ratio(given, drawn, y, e, n) + math.log(0.05)  # noqa: E731
            assert excess(lowest) < 0
            assert float(sets.low[e, n]) == pytest.approx(optimize.brentq(excess, lowest - 1e3, lowest), abs=1e-6)
            assert float(sets.high[e, n]) == pytest.approx(optimize.brentq(excess, lowest, lowest + 1e3), abs=1e-6)


def test_the_quadratic_is_the_log_ratio():
    given, drawn = prediction(seed=1)
    a, b, c = avcs_regression.log_ratio(given, drawn)
    for y in (95.0, 100.0, 103.0):
        u = y - given.mean[0]
        for e, n in ((0, 0), (2, 3), (3, 5)):
            ours = float((a[e, 0] * u**2 + b[e, 0] * u + c[e, 0])[n])
            assert ours == pytest.approx(log_ratio(given, drawn, y, e, n), abs=1e-9)


def exactly(mean, epistemic, noise, drawn):
    as_column = lambda values: torch.tensor(values, dtype=torch.float64)[:, None]  # noqa: E731
    given = RegressionPrediction(as_column(mean), as_column(epistemic), torch.tensor(noise, dtype=torch.float64))
    return given, as_column(drawn).unsqueeze(1)


def test_unbounded_where_exits_know_their_weights():
    sets = avcs_regression.intervals(*exactly([0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]), 0.05)
    assert sets.low.flatten().tolist() == [-math.inf] * 2
    assert sets.high.flatten().tolist() == [math.inf] * 2
    assert bool(sets.unbounded.all())
    assert not bool(sets.empty.any())
    # No epistemic variance and yet another draw: ln R is a line, and R <= 20 a half-line.
    for drawn, side in ((1.0, "low"), (-1.0, "high")):
        line = avcs_regression.intervals(*exactly([0.0], [0.0], [1.0], [drawn]), 0.05)
        end = float(getattr(line, side))  # -y·drawn + drawn²/2 = ln 20
        assert end == pytest.approx((0.5 - math.log(20)) / drawn)
        assert bool(line.size.isinf())


def test_empty_where_the_draw_is_far_off():
    given, drawn = exactly([0.0, 5.0, 0.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [9.0, -9.0, 0.0])
    sets = avcs_regression.intervals(given, drawn, 0.05)
    excess = [log_ratio(given, drawn, np.linspace(-60, 60, 5000), e, 0).min() for e in range(3)]
    assert (sets.empty[:, 0]).tolist() == [value > math.log(20) for value in excess]
    assert bool(sets.empty.any())
    assert bool(sets.low[sets.empty].isnan().all())
    assert not bool(sets.contains(torch.zeros(1))[sets.empty].any())  # zero is not in an empty set
    assert bool(sets.running().empty[-1])  # for good


@given(st.integers(0, 10_000), st.floats(0.001, 5), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_intervals_hold_what_the_ratio_allows_and_nothing_else(seed, ratio, sequences):
    one, drawn = prediction(seed=seed, ratio=ratio)
    drawn = drawn + torch.randn(4, sequences, 6, generator=generator(seed), dtype=torch.float64) * 0.1
    sets = avcs_regression.intervals(one, drawn, 0.1)
    a, b, c = avcs_regression.log_ratio(one, drawn)
    for y in (98.0, 99.5, 100.0, 100.5, 104.0):
        u = y - one.mean[0]
        value = (a * u**2 + b * u + c).amax(dim=1)
        clear = (value - math.log(10)).abs() > 1e-9
        held = sets.contains(torch.full((6,), y, dtype=torch.float64))
        assert torch.equal(held[clear], (value <= math.log(10))[clear])


# ---------------------------------------------------------------- regression: promises


@pytest.mark.parametrize(("kappa", "expected"), [(0.01, 1.010), (0.05, 1.058), (0.1, 1.139)])
def test_mean_of_the_ratio_with_a_correct_model(kappa, expected):
    """Above 1: the weights do not come from a posterior that knows y, so Ville's inequality does not apply."""
    rows, random = 400_000, generator(3)
    normal = lambda: torch.randn(1, rows, generator=random, dtype=torch.float64)  # noqa: E731
    zero = torch.zeros(1, rows, dtype=torch.float64)
    given = RegressionPrediction(zero, zero + kappa, torch.ones(1, dtype=torch.float64))
    y = math.sqrt(1 + kappa) * normal()
    a, b, c = avcs_regression.log_ratio(given, (math.sqrt(kappa) * normal()).unsqueeze(1))
    ratios = (a[:, 0] * y**2 + b[:, 0] * y + c[:, 0]).exp()
    error = float(ratios.std()) / math.sqrt(rows)
    assert float(ratios.mean()) == pytest.approx(((1 + kappa) * (1 - 3 * kappa)) ** -0.5, abs=5 * error + 1e-3)
    assert float(ratios.mean()) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("total", "coverage", "width"), [(0.72, 0.967, 5.7), (2.4, 0.814, 3.2)])
def test_coverage_by_k_with_a_correct_model(total, coverage, width):
    exits, rows, random = 24, 20_000, generator(5)
    normal = lambda *size: torch.randn(*size, generator=random, dtype=torch.float64)  # noqa: E731
    v = total / exits
    mean = math.sqrt(v) * normal(exits, rows)
    given = RegressionPrediction(mean, torch.full_like(mean, v), torch.ones(exits, dtype=torch.float64))
    nested = avcs_regression.intervals(given, (mean + math.sqrt(v) * normal(exits, rows)).unsqueeze(1), 0.05).running()
    assert float(nested.contains(normal(rows))[-1].double().mean()) == pytest.approx(coverage, abs=0.02)
    assert float(nested.size[-1].mean()) == pytest.approx(width, abs=0.4)
    validity = avcs_regression.validity(given)
    assert validity.mean[-1] == pytest.approx(total)
    assert (validity.warning is None) == (total <= 0.7)


def test_k_against_a_loop():
    given, _ = prediction(exits=3, rows=11, ratio=1.0)
    validity = avcs_regression.validity(given)
    for e in range(3):
        ks = [sum(float(given.epistemic[i, n] / given.noise[i]) for i in range(e + 1)) for n in range(11)]
        assert validity.mean[e] == pytest.approx(np.mean(ks))
        assert validity.p90[e] == pytest.approx(np.quantile(ks, 0.9))
        assert validity.share[e] == pytest.approx(np.mean([k > 0.7 for k in ks]))


def test_what_the_warning_says():
    words = avcs_regression.Validity((0.1, 0.9), (0.2, 1.5), (0.0, 0.25)).warning
    assert "25% of the rows" in words
    assert "mean 0.90, 90th percentile 1.50" in words
    assert avcs_regression.Validity((0.1,), (0.2,), (0.0,)).warning is None


def fitted(sequences=1, seed=0, **options):
    random = generator(1)
    features = [torch.randn(60, width, generator=random) for width in (3, 5, 5)]
    y = features[2].sum(dim=1) + 0.5 * torch.randn(60, generator=random)
    posterior = bayesian_regression.fit(features, y)
    return avcs_regression.fit(posterior, AVCSRegressionConfig(n_sequences=sequences, seed=seed, **options)), features


def test_apply_uses_the_draws_in_units_of_the_targets():
    state, features = fitted(sequences=2)
    one = bayesian_regression.apply(state.posterior, features)
    drawn = torch.stack([
        torch.stack([torch.cat([f, torch.ones(60, 1)], 1).double() @ w for w in draws])
        for f, draws in zip(features, state.draws, strict=True)
    ])  # fmt: skip
    expected = avcs_regression.intervals(one, state.posterior.location + state.posterior.scale * drawn, 0.025)
    got = avcs_regression.apply(state, features)
    torch.testing.assert_close(got.low, expected.low, equal_nan=True)
    torch.testing.assert_close(got.high, expected.high, equal_nan=True)


def test_draws_have_the_posteriors_mean_and_covariance():
    state, _ = fitted(sequences=20_000)
    layer, draws = state.posterior.exits[1], state.draws[1]
    unit = torch.linalg.solve(layer.root, (draws - layer.mean).mT).mT  # standard normal
    torch.testing.assert_close(unit.mean(dim=0), torch.zeros(6).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(unit.mT.cov(), torch.eye(6).double(), atol=0.05, rtol=0)


def test_one_more_sequence_leaves_the_others_as_they_were_and_only_shrinks_sets():
    two, features = fitted(sequences=2, union_bound=False)
    three, _ = fitted(sequences=3, union_bound=False)
    for first, second in zip(two.draws, three.draws, strict=True):
        assert torch.equal(first, second[:2])
    assert bool((avcs_regression.apply(three, features).size <= avcs_regression.apply(two, features).size).all())
    bound, _ = fitted(sequences=3)
    assert bool((avcs_regression.apply(bound, features).size >= avcs_regression.apply(three, features).size).all())
    other, _ = fitted(sequences=3, seed=1)
    assert not torch.equal(other.draws[0], three.draws[0])


def test_batches_do_not_matter_for_intervals():
    state, features = fitted(sequences=3)
    whole = avcs_regression.apply(state, features)
    parts = [avcs_regression.apply(state, [f[i : i + 7] for f in features]) for i in range(0, 60, 7)]
    torch.testing.assert_close(torch.cat([p.low for p in parts], 1), whole.low, rtol=1e-9, atol=1e-9, equal_nan=True)


# ---------------------------------------------------------------- classification


def classes(exits=3, rows=200, count=5, seed=0, strength=6.0):
    random = generator(seed)
    labels = torch.randint(count, (rows,), generator=random)
    logits = torch.randn(exits, rows, count, generator=random)
    logits += strength * torch.nn.functional.one_hot(labels, count)
    ids = tuple(f"row {i}" for i in range(rows))
    features = [torch.zeros(rows, 1)] * exits
    return ExitOutputs(features, logits, labels, torch.arange(1.0, exits + 1).double(), ids)


def test_ratios_against_the_definition():
    evidence = torch.tensor([[[2.0, 3.0, 0.0, 1.5]], [[4.0, 0.0, 5.0, 2.0]]], dtype=torch.float64)
    gammas = torch.tensor([[[1.0, 4.0, 9.0, 2.0]], [[3.0, 7.0, 1.0, 1.0]]], dtype=torch.float64)
    got = avcs_classification.log_ratios(evidence, gammas.log()).exp()[:, 0]
    first = [2 / 6.5 / (1 / 7), 3 / 6.5 / (4 / 7), math.inf, 1.5 / 6.5 / (2 / 7)]
    second = [4 / 11 / (3 / 5), math.inf, 5 / 11 / (1 / 5), 2 / 11 / (1 / 5)]
    assert got[0].tolist() == pytest.approx(first)
    assert got[1].tolist() == pytest.approx([a * b for a, b in zip(first, second, strict=True)])


def test_no_evidence_is_empty_and_evidence_lost_is_lost():
    state = AVCSClassification(torch.tensor([1.0, 1.0, 1.0]).double(), torch.ones(3), 1, AVCSClassificationConfig())
    logits = torch.tensor([[[6.0, 3.0, -9.0]], [[0.4, 0.0, -0.4]], [[6.0, 3.0, -9.0]]])
    sets = avcs_classification.apply(state, logits)
    assert sets.empty[:, 0].tolist() == [False, True, True]
    assert sets.running().empty[:, 0].tolist() == [False, True, True]


def test_the_threshold_is_hard_and_the_offset_does_not_matter():
    logits = torch.tensor([[[2.0, 1.0, -3.0]]])
    for tau, supported in ((0.5, 2), (1.0, 2), (1.5, 1), (2.5, 0)):
        state = AVCSClassification(torch.tensor([tau]).double(), torch.ones(1), 1, AVCSClassificationConfig(alpha=1e-9))
        sets = avcs_classification.apply(state, logits)
        assert float(sets.size) == supported
        assert torch.equal(sets.members, avcs_classification.apply(state, logits + 64).members)


def test_mean_of_the_dirichlet_ratio():
    evidence = torch.tensor([9.0, 6.0, 5.0]).double().expand(1, 100_000, 3)
    names = [str(i) for i in range(100_000)]
    small = 20_000  # of independent rows; the rest of the precision is not needed
    gammas = avcs_classification._log_gammas(evidence[:, :small], 0, names[:small])
    got = avcs_classification.log_ratios(evidence[:, :small], gammas).exp().mean(dim=1)[0]
    expected = [(1 - 1 / 20) / (1 - 1 / a) for a in (9.0, 6.0, 5.0)]
    assert got.tolist() == pytest.approx(expected, rel=0.02)
    draws = gammas[0].softmax(dim=-1)  # and the draws are those of a Dirichlet: marginals are beta
    for place, a in enumerate((9.0, 6.0, 5.0)):
        assert stats.kstest(draws[:, place].numpy(), stats.beta(a, 20 - a).cdf).pvalue > 1e-4


def test_tiny_evidence_does_not_underflow():
    evidence = torch.full((1, 500, 2), 1e-4).double()
    gammas = avcs_classification._log_gammas(evidence, 0, [str(i) for i in range(500)])
    assert bool(gammas.isfinite().all())
    # Gamma(a) for small a: a·ln(1/x) is about exponential with mean 1
    assert float((-1e-4 * gammas).mean()) == pytest.approx(1, abs=0.15)


def test_sets_belong_to_rows_not_to_batches():
    given = classes(strength=4.0)
    state = avcs_classification.fit(given)
    whole = avcs_classification.apply(state, given).members
    order = torch.randperm(200, generator=generator(2))
    assert torch.equal(avcs_classification.apply(state, given.take(order)).members, whole[:, order])
    for start in range(0, 200, 64):
        rows = torch.arange(start, min(start + 64, 200))
        assert torch.equal(avcs_classification.apply(state, given.take(rows)).members, whole[:, rows])
    by_logits = avcs_classification.apply(state, given.logits, ids=given.ids)
    assert torch.equal(by_logits.members, whole)
    other = avcs_classification.apply(
        AVCSClassification(state.thresholds, state.coverage, 200, AVCSClassificationConfig(seed=1)), given
    )
    assert not torch.equal(other.members, whole)


def test_tau_is_the_last_that_keeps_coverage_exit_by_exit():
    given = classes(rows=400, strength=4.0)
    config = AVCSClassificationConfig(alpha=0.1)
    state = avcs_classification.fit(given, config=config)

    def covered(thresholds):
        trial = AVCSClassification(torch.tensor(thresholds).double(), torch.ones(3), 400, config)
        return avcs_classification.apply(trial, given).running().contains(given.labels).double().mean(dim=1)

    thresholds = [1.0, 1.0, 1.0]
    for e in range(3):
        while bool((covered([*thresholds[:e], thresholds[e] + 0.5, *thresholds[e + 1 :]]) > 0.9).all()):
            thresholds[e] += 0.5
    assert state.thresholds.tolist() == thresholds
    assert max(thresholds) > 1
    torch.testing.assert_close(state.coverage, covered(thresholds))
    assert bool((state.coverage > 0.9).all())


def test_a_start_that_covers_too_little_is_told():
    weak = classes(strength=0.0)
    with pytest.warns(UserWarning, match="lower start"):
        state = avcs_classification.fit(weak)
    assert state.thresholds.tolist() == [1.0] * 3


def unsure_at_first(rows=400):
    """No centred logit reaches 1 at the first exit, as at the first exits of fine-tuned encoders."""
    given = classes(rows=rows, strength=5.0)
    poor = given.logits[:1] / given.logits[0].abs().max() / 2
    return ExitOutputs(given.features, torch.cat([poor, given.logits[1:]]), given.labels, given.costs, given.ids)


@pytest.mark.parametrize(("start", "first"), [(1.0, 0), (0.01, 0), (1.0, 1)])
def test_causes_of_too_little_coverage_are_counted(start, first):
    given = classes(rows=300, strength=2.0)
    given.logits[0] /= 8
    config = AVCSClassificationConfig(start=start, first_exit=first)
    with pytest.warns(UserWarning, match="tau stays there") as told:
        state = avcs_classification.fit(given, config=config)
    below, small = [], []
    for row, label in enumerate(given.labels.tolist()):
        own = [float(z[row, label] - z[row].mean()) for z in given.logits[first:]]
        below.append([value <= 0 for value in own])
        small.append(any(value < start for value in own) and not any(below[-1]))
    poor, hard = np.any(below, axis=1).mean(), np.mean(small)
    drawn = 1 - float(state.coverage.min()) - poor - hard
    worst = int(np.argmax(np.mean(below, axis=0)))
    said = [float(share) / 100 for share in re.findall(r"([\d.]+)%", str(told[0].message))]
    assert said == pytest.approx([poor, np.mean(below, axis=0)[worst], hard, drawn], abs=6e-4)
    assert f"most at exit {first + worst + 1}:" in str(told[0].message)
    assert min(poor, drawn if start < 1 else hard) > 0.005, "else this tests too little"


def test_of_two_classes_no_set_holds_both():
    given = classes(count=2, strength=1.0)
    config = AVCSClassificationConfig(alpha=1e-9, start=1e-6)
    with pytest.warns(UserWarning, match="a later first_exit or a larger alpha"):
        state = avcs_classification.fit(given, config=config)
    assert float(avcs_classification.apply(state, given).size.max()) == 1


def test_a_first_exit_leaves_poor_exits_out():
    given = unsure_at_first()
    state = avcs_classification.fit(given, config=AVCSClassificationConfig(first_exit=1))  # and no warning
    sets = avcs_classification.apply(state, given)
    assert bool(sets.members[0].all())
    assert float(state.coverage[0]) == 1
    assert float(state.coverage.min()) > 0.95
    assert float(state.thresholds[0]) == 1
    # What a rule without the first exit says of the same draws: nothing of the first exit is left.
    evidence = avcs_classification._evidence(given.logits, state.config)
    gammas = avcs_classification._log_gammas(evidence, 0, given.ids)[1:]
    kept = evidence[1:].masked_fill(evidence[1:] < state.thresholds[1:, None, None], 0)
    assert torch.equal(sets.members[1:], avcs_classification.log_ratios(kept, gammas) <= math.log(20))


def test_first_exits_that_there_are_not():
    with pytest.raises(ValueError, match="first_exit is 3; there are exits 0..2"):
        avcs_classification.fit(classes(), config=AVCSClassificationConfig(first_exit=3))
    with pytest.raises(ValueError, match="first_exit is -1"):
        AVCSClassificationConfig(first_exit=-1)


def test_wrong_input():
    given = classes()
    with pytest.raises(ValueError, match="labels are missing"):
        avcs_classification.fit(given.logits)
    with pytest.raises(ValueError, match="labels in 0..4"):
        avcs_classification.fit(given.logits, given.labels + 1)
    with pytest.raises(ValueError, match="row 3 are not finite"):
        avcs_classification.fit(given.logits.index_fill(1, torch.tensor([3]), torch.nan), given.labels)
    state = avcs_classification.fit(given)
    with pytest.raises(ValueError, match="tau was tuned for 3"):
        avcs_classification.apply(state, given.logits[:2])
    with pytest.raises(ValueError, match="4 ids for 200 rows"):
        avcs_classification.apply(state, given.logits, ids=list("abcd"))
    for wrong in ({"alpha": 0.0}, {"n_sequences": 0}):
        with pytest.raises(ValueError, match=str(next(iter(wrong)))):
            AVCSRegressionConfig(**wrong)
    with pytest.raises(ValueError, match="alpha is 1"):
        AVCSClassificationConfig(alpha=1)

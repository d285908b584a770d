"""Nested conformal sets: their guarantee by simulation, against MAPIE, plain loops and hypothesis."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import stats

from offramp.uncertainty import nested_conformal, per_exit
from offramp.uncertainty.bayesian_regression import RegressionPrediction
from offramp.uncertainty.nested_conformal import NestedConformalConfig
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.per_exit import PerExitConfig, class_scores, conformal_quantile, label_scores, raps, residuals

RAW = NestedConformalConfig(equalise=False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def outputs(rows, seed=0, exits=4, classes=10, prefix="row"):
    """Exits that get better with depth; the first ones are poor."""
    random = generator(seed)
    labels = torch.randint(classes, (rows,), generator=random)
    strength = torch.linspace(0.5, 5.0, exits)[:, None, None]
    logits = torch.randn(exits, rows, classes, generator=random)
    logits = logits + strength * torch.nn.functional.one_hot(labels, classes)
    ids = tuple(f"{prefix} {i}" for i in range(rows))
    costs = torch.arange(1.0, exits + 1).double()
    return ExitOutputs([torch.zeros(rows, 1)] * exits, logits, labels, costs, ids, labels % 2)


def scores_of(given, kind="complement"):
    return label_scores(class_scores(given, kind), given.labels)


# ---------------------------------------------------------------- scores


def test_raps_against_the_definition():
    probabilities = torch.rand(2, 3, 8, generator=generator()).softmax(-1)
    got = raps(probabilities)
    for e in range(2):
        for n in range(3):
            order = sorted(range(8), key=lambda c: (-float(probabilities[e, n, c]), c))
            mass = 0.0
            for rank, c in enumerate(order, start=1):
                mass += float(probabilities[e, n, c])
                assert float(got[e, n, c]) == pytest.approx(mass + 0.01 * max(0, rank - 5), abs=1e-6)


def test_ties_of_raps_go_to_the_lower_class():
    assert raps(torch.tensor([0.25, 0.5, 0.25])).tolist() == [0.75, 0.5, 1.0]


@pytest.mark.parametrize(("n", "alpha", "place"), [(19, 0.05, 19), (20, 0.05, 20), (99, 0.1, 90), (9, 0.1, 9)])
def test_the_place_of_the_quantile(n, alpha, place):
    scores = torch.randperm(n, generator=generator()).double() + 1
    assert conformal_quantile(scores, alpha) == place


@pytest.mark.parametrize(("n", "alpha", "needed"), [(18, 0.05, 19), (8, 0.1, 9), (1, 0.01, 99)])
def test_too_few_rows_make_sets_of_everything_and_say_how_many_are_needed(n, alpha, needed):
    with pytest.warns(UserWarning, match=f"at least {needed} rows"):
        assert conformal_quantile(torch.zeros(n), alpha) == math.inf
    conformal_quantile(torch.zeros(needed), alpha)  # no warning
    config = NestedConformalConfig(alpha=alpha, equalise=False)
    with pytest.warns(UserWarning, match="too few"):
        state = nested_conformal.fit(torch.rand(3, n), config)
    assert state.quantiles.tolist() == [math.inf]
    assert bool(nested_conformal.apply_classes(state, torch.rand(3, 4, 5).softmax(-1)).members.all())
    one = RegressionPrediction(torch.zeros(3, 4), torch.ones(3, 4), torch.ones(3))
    assert bool(nested_conformal.apply_intervals(state, one).unbounded.all())
    with pytest.warns(UserWarning, match="too few"):
        equal = nested_conformal.fit(torch.rand(3, n), NestedConformalConfig(alpha=alpha), tune=torch.rand(3, 50))
    assert bool(nested_conformal.apply_intervals(equal, one).unbounded.all())


# ---------------------------------------------------------------- guarantee


@pytest.mark.parametrize("equalise", [False, True])
@pytest.mark.parametrize("score", ["complement", "raps"])
def test_simultaneous_coverage_of_classes(equalise, score):
    """1000 draws of 99 calibration rows and a new one; P(all exits cover) is 0.9 here, so a count below the 1e-6
    quantile of Bin(1000, 0.9) comes by chance once in a million runs; seeds are fixed."""
    draws, n, alpha, covered, missed_alone = 1000, 99, 0.1, 0, 0
    config = NestedConformalConfig(alpha=alpha, score=score, equalise=equalise)
    tune = scores_of(outputs(200, seed=1), score)
    pool = outputs(draws * (n + 1), seed=2)
    scores, label = class_scores(pool, score), scores_of(pool, score)
    for draw in range(draws):
        rows = slice(draw * (n + 1), draw * (n + 1) + n)
        new = rows.stop
        state = nested_conformal.fit(label[:, rows], config, tune=tune if equalise else None)
        largest = nested_conformal._largest(scores[:, new : new + 1], state.equaliser, config)
        holds = (largest <= state.quantiles)[:, 0, pool.labels[new]]
        covered += bool(holds.all())
        alone = per_exit.fit(label[:, rows], PerExitConfig(alpha=alpha, score=score))
        missed_alone += bool((label[:, new] > alone.quantiles).any())
    low, high = stats.binom.ppf([1e-6, 1 - 1e-6], draws, 1 - alpha)
    assert low <= covered <= high  # continuous scores: the claim holds with equality
    assert missed_alone > draws - low  # sets of single exits do not promise it, and do not keep it


@pytest.mark.parametrize("equalise", [False, True])
def test_simultaneous_coverage_of_numbers(equalise):
    draws, n, alpha, covered = 1000, 49, 0.1, 0
    random = generator(4)
    widths = torch.tensor([3.0, 1.0, 0.5])[:, None].double()
    config = NestedConformalConfig(alpha=alpha, equalise=equalise)

    def world(rows):
        truth = torch.randn(rows, generator=random, dtype=torch.float64)
        mean = truth + widths * torch.randn(3, rows, generator=random, dtype=torch.float64) ** 3  # heavy tails
        return truth, RegressionPrediction(mean, torch.ones_like(mean), torch.ones(3).double())  # wrong variances

    tune = residuals(*world(60)[::-1])
    truth, one = world(draws * (n + 1))
    scores = residuals(one, truth)
    for draw in range(draws):
        rows = slice(draw * (n + 1), draw * (n + 1) + n)
        new = slice(rows.stop, rows.stop + 1)
        state = nested_conformal.fit(scores[:, rows], config, tune=tune if equalise else None)
        single = RegressionPrediction(one.mean[:, new], one.epistemic[:, new], one.noise)
        sets = nested_conformal.apply_intervals(state, single)
        covered += bool(sets.contains(truth[new]).all())
    low, high = stats.binom.ppf([1e-6, 1 - 1e-6], draws, 1 - alpha)
    assert low <= covered <= high


def test_equalised_scores_reach_more_singletons():
    """The weakest exit dominates the maximum of raw scores."""
    tune, calibrate, test = (outputs(2000, seed=s, exits=6, classes=50, prefix=str(s)) for s in (1, 2, 3))
    shares = {}
    for equalise in (False, True):
        config = NestedConformalConfig(alpha=0.1, equalise=equalise)
        state = nested_conformal.fit_classes(calibrate, config, tune=tune if equalise else None)
        sets = nested_conformal.apply_classes(state, test)
        assert float(sets.contains(test.labels)[-1].double().mean()) == pytest.approx(0.9, abs=0.03)
        shares[equalise] = float((sets.size[-1] == 1).double().mean())
    assert shares[True] > shares[False] + 0.2


def test_cells_get_their_own_guarantee():
    calibrate, test = outputs(4000, seed=1), outputs(4000, seed=2)
    worse = calibrate.logits * (1 - 0.9 * calibrate.groups[None, :, None])  # group 1 is told much less
    calibrate = ExitOutputs(calibrate.features, worse, calibrate.labels, calibrate.costs, (), calibrate.groups)
    test_logits = test.logits * (1 - 0.9 * test.groups[None, :, None])
    test = ExitOutputs(test.features, test_logits, test.labels, test.costs, (), test.groups)

    def coverage(cells, by):
        config = NestedConformalConfig(alpha=0.1, equalise=False, cells=cells)
        state = nested_conformal.fit_classes(calibrate, config)
        holds = nested_conformal.apply_classes(state, test).contains(test.labels)[-1].double()
        return [float(holds[by == cell].mean()) for cell in by.unique()]

    assert coverage("group", test.groups) == pytest.approx([0.9, 0.9], abs=0.03)
    assert coverage("class", test.labels) == pytest.approx([0.9] * 10, abs=0.08)
    assert min(coverage("all", test.groups)) < 0.85


def test_a_cell_without_calibration_rows_holds_everything():
    config = NestedConformalConfig(alpha=0.1, equalise=False, cells="group")
    state = nested_conformal.fit(torch.rand(2, 30), config, cells=torch.zeros(30, dtype=torch.int64))
    sets = nested_conformal.apply_classes(state, torch.rand(2, 2, 4).softmax(-1), groups=torch.tensor([0, 7]))
    assert bool(sets.members[:, 1].all())


# ---------------------------------------------------------------- sets


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=25, deadline=None)
def test_sets_are_nested_for_random_scores(seed, equalise):
    random = generator(seed)
    probabilities = torch.randn(4, 20, 6, generator=random).softmax(-1)
    calibrate, tune = torch.rand(4, 30, generator=random), torch.rand(4, 12, generator=random)
    config = NestedConformalConfig(alpha=0.3, equalise=equalise)
    state = nested_conformal.fit(calibrate, config, tune=tune if equalise else None)
    members = nested_conformal.apply_classes(state, probabilities).members
    assert not bool((members[1:] & ~members[:-1]).any())
    mean = torch.randn(4, 20, generator=random).double()
    one = RegressionPrediction(mean, mean**2, torch.ones(4).double())
    sets = nested_conformal.apply_intervals(state, one)
    assert bool((sets.empty[1:] >= sets.empty[:-1]).all())
    both = ~sets.empty[1:]
    assert bool((sets.low[1:] >= sets.low[:-1])[both].all())
    assert bool((sets.high[1:] <= sets.high[:-1])[both].all())


@pytest.mark.parametrize("equalise", [False, True])
def test_sets_hold_what_the_largest_score_allows(equalise):
    given, calibrate, tune = outputs(15), outputs(60, seed=1, prefix="c"), outputs(40, seed=2, prefix="t")
    config = NestedConformalConfig(alpha=0.1, equalise=equalise)
    state = nested_conformal.fit_classes(calibrate, config, tune=tune if equalise else None)

    def score(e, probability):
        value = 1 - probability
        if not equalise:
            return value
        return float(nested_conformal.equalise(state.equaliser, torch.full((4, 1), value, dtype=torch.float64))[e])

    def largest(probabilities, e):
        return max(score(i, float(probabilities[i])) for i in range(e + 1))

    p = calibrate.logits.double().softmax(-1)
    ms = sorted(largest(p[:, n, calibrate.labels[n]], 3) for n in range(60))
    assert float(state.quantiles) == pytest.approx(ms[math.ceil(61 * 0.9) - 1])
    p, got = given.logits.double().softmax(-1), nested_conformal.apply_classes(state, given).members
    for n in range(15):
        for c in range(10):
            for e in range(4):
                assert bool(got[e, n, c]) == (largest(p[:, n, c], e) <= float(state.quantiles) + 1e-12)


def test_intervals_are_the_numbers_with_small_scores():
    random = generator(6)
    mean = torch.randn(3, 9, generator=random).double()
    one = RegressionPrediction(mean, mean**2, torch.tensor([1.0, 0.5, 2.0]).double())
    calibrate, tune = (torch.randn(3, size, generator=random).abs() for size in (40, 25))
    state = nested_conformal.fit(calibrate, NestedConformalConfig(alpha=0.2), tune=tune)
    sets = nested_conformal.apply_intervals(state, one)
    for y in torch.linspace(-4, 4, 81).double():
        scores = nested_conformal.equalise(state.equaliser, residuals(one, y.expand(9))).cummax(0).values
        assert torch.equal(sets.contains(y.expand(9)), scores <= state.quantiles)


def test_first_exit_leaves_out_the_exits_before_it():
    given, calibrate = outputs(50), outputs(200, seed=1)
    state = nested_conformal.fit_classes(calibrate, NestedConformalConfig(equalise=False, first_exit=2))
    sets = nested_conformal.apply_classes(state, given)
    assert bool(sets.members[:2].all())
    alone = nested_conformal.fit(scores_of(calibrate)[2:], RAW)
    later = nested_conformal.apply_classes(alone, given.logits[2:].double().softmax(-1))
    assert torch.equal(sets.members[2:], later.members)
    one = RegressionPrediction(torch.zeros(4, 3), torch.ones(4, 3), torch.ones(4))
    intervals = nested_conformal.apply_intervals(state, one)
    assert intervals.unbounded.any(dim=1).tolist() == [True, True, False, False]


def test_the_running_intersection_of_single_exits_covers_less():
    calibrate, test = outputs(4000, seed=1), outputs(8000, seed=2)
    state = per_exit.fit(scores_of(calibrate, "raps"), PerExitConfig(alpha=0.1))
    sets = per_exit.apply_classes(state, test)
    each = sets.contains(test.labels).double().mean(dim=1)
    assert each.tolist() == pytest.approx([0.9] * 4, abs=0.02)
    assert float(sets.running().contains(test.labels)[-1].double().mean()) < 0.85


def test_bayes_intervals_by_hand():
    one = RegressionPrediction(torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([1.0]))
    sets = per_exit.bayes_intervals(one)
    assert (float(sets.low), float(sets.high)) == (-3.0, 5.0)


# ---------------------------------------------------------------- equaliser


@given(npst.arrays(float, (2, 12), elements=st.integers(0, 6).map(float)), st.floats(-3, 9), st.floats(-3, 9))
@settings(deadline=None)
def test_equaliser_increases_and_is_inverted(scores, first, second):
    state = nested_conformal.fit_equaliser(torch.from_numpy(scores))
    low, high = sorted((first, second))
    levels = nested_conformal.equalise(state, torch.tensor([[low, high]] * 2, dtype=torch.float64))
    assert bool((levels[:, 1] >= levels[:, 0]).all())
    if high - low > 1e-6:
        assert bool((levels[:, 1] > levels[:, 0]).all())
    for e in range(2):
        back = nested_conformal.equaliser_inverse(state, levels[e])[e]
        assert back.tolist() == pytest.approx([low, high], abs=1e-6)


def test_equaliser_is_the_share_of_rows_at_their_own_scores():
    scores = torch.tensor([[3.0, 1.0, 1.0, 7.0]])
    state = nested_conformal.fit_equaliser(scores)
    assert nested_conformal.equalise(state, scores)[0].tolist() == pytest.approx([3 / 5, 2 / 5, 2 / 5, 4 / 5])
    assert nested_conformal.equalise(state, torch.tensor([[math.inf, -math.inf]])).tolist() == [[math.inf, -math.inf]]


# ---------------------------------------------------------------- MAPIE


def test_sets_of_one_exit_are_those_of_mapie():
    classification = pytest.importorskip("mapie.classification")
    given, calibrate = outputs(40, exits=1, classes=4), outputs(101, seed=1, exits=1, classes=4)

    class Softmax(_Fitted):
        classes_ = np.arange(4)

        def predict_proba(self, x):
            return x

        def predict(self, x):
            return x.argmax(1)

    p = calibrate.logits[0].double().softmax(-1).numpy()
    q = given.logits[0].double().softmax(-1).numpy()
    for alpha in (0.05, 0.1, 0.2):
        mapie = classification.SplitConformalClassifier(
            Softmax(), confidence_level=1 - alpha, conformity_score="lac", prefit=True
        ).conformalize(p, calibrate.labels.numpy())
        expected = mapie.predict_set(q)[1][:, :, 0]
        state = nested_conformal.fit_classes(calibrate, NestedConformalConfig(alpha=alpha, equalise=False))
        assert np.array_equal(nested_conformal.apply_classes(state, given).members[0].numpy(), expected)


def test_intervals_of_one_exit_are_those_of_mapie():
    regression = pytest.importorskip("mapie.regression")

    class Identity(_Fitted):
        def predict(self, x):
            return x[:, 0]

    random = np.random.default_rng(0)
    x, new = random.normal(size=(87, 1)), random.normal(size=(9, 1))
    y = x[:, 0] + random.normal(size=87)
    mapie = regression.SplitConformalRegressor(Identity(), confidence_level=0.9, prefit=True).conformalize(x, y)
    expected = mapie.predict_interval(new)[1][:, :, 0]

    def predicted(values):
        mean = torch.from_numpy(values.T)
        return RegressionPrediction(mean, torch.zeros_like(mean), torch.ones(1).double())

    scores = residuals(predicted(x), torch.from_numpy(y))
    state = nested_conformal.fit(scores, NestedConformalConfig(alpha=0.1, equalise=False))
    sets = nested_conformal.apply_intervals(state, predicted(new))
    assert np.stack([sets.low[0], sets.high[0]], 1) == pytest.approx(expected)
    alone = per_exit.apply_intervals(per_exit.fit(scores, PerExitConfig(alpha=0.1)), predicted(new))
    assert torch.equal(alone.low, sets.low)


class _Fitted:
    """What scikit-learn's checks ask of a model."""

    fitted_ = True

    def fit(self, x, y):
        return self

    def __sklearn_is_fitted__(self):
        return True

    def get_params(self, deep=True):
        return {}

    def set_params(self, **options):
        return self


# ---------------------------------------------------------------- wrong input


def test_wrong_input():
    calibrate, tune = outputs(30), outputs(30, seed=1, prefix="tune")
    with pytest.raises(ValueError, match="share 30 rows"):
        nested_conformal.fit_classes(calibrate, tune=calibrate)
    with pytest.raises(ValueError, match="need tune="):
        nested_conformal.fit_classes(calibrate)
    with pytest.raises(ValueError, match="leave out one"):
        nested_conformal.fit_classes(calibrate, RAW, tune=tune)
    bare = ExitOutputs(calibrate.features, calibrate.logits, calibrate.labels, calibrate.costs)
    with pytest.raises(ValueError, match="no groups"):
        nested_conformal.fit_classes(bare, NestedConformalConfig(cells="group", equalise=False))
    with pytest.raises(ValueError, match="needs no cells="):
        nested_conformal.fit(torch.rand(2, 30), RAW, cells=torch.zeros(30))
    with pytest.raises(ValueError, match="at least one row"):
        nested_conformal.fit(torch.rand(2, 0), RAW)
    with pytest.raises(ValueError, match="exits 0..1"):
        nested_conformal.fit(torch.rand(2, 30), NestedConformalConfig(equalise=False, first_exit=2))
    with pytest.raises(ValueError, match="softmax"):
        nested_conformal.apply_classes(nested_conformal.fit(torch.rand(2, 30), RAW), torch.randn(2, 3, 4))
    grouped = nested_conformal.fit(
        torch.rand(2, 60), NestedConformalConfig(equalise=False, cells="group"), cells=torch.arange(60) % 2
    )
    with pytest.raises(ValueError, match="a group for each of the 3 rows"):
        nested_conformal.apply_classes(grouped, torch.rand(2, 3, 4).softmax(-1))
    by_class = NestedConformalConfig(equalise=False, cells="class")
    state = nested_conformal.fit(torch.rand(2, 60), by_class, cells=torch.arange(60) % 2)
    one = RegressionPrediction(torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="numbers have none"):
        nested_conformal.apply_intervals(state, one)
    for wrong in ({"alpha": 0}, {"cells": "rows"}, {"score": "aps"}, {"first_exit": -1}):
        with pytest.raises(ValueError, match=str(next(iter(wrong)))):
            NestedConformalConfig(**wrong)
    with pytest.raises(ValueError, match="finite"):
        nested_conformal.fit_equaliser(torch.tensor([[math.nan]]))

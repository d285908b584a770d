"""Nested sets of tokens: coverage by simulation, nestedness, singletons, draws that belong to a place."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from offramp.hub.exit_posterior import RunningSet
from offramp.uncertainty import token_sets as ts
from offramp.uncertainty.candidates import shortlist

SETTINGS = settings(derandomize=True, deadline=None, max_examples=40, database=None)
LAYERS = (2, 4, 6)


def exits(rows, seed, vocabulary=30, noise=(4.0, 1.5, 0.5), scale=2.5):
    """Logits of three exits, the shallow ones noisy, and true tokens drawn from clean ones."""
    g = torch.Generator().manual_seed(seed)
    clean = scale * torch.randn(rows, vocabulary, generator=g)
    target = torch.multinomial(clean.softmax(-1), 1, generator=g)[:, 0]
    noisy = {e: clean + s * torch.randn(rows, vocabulary, generator=g) for e, s in zip(LAYERS, noise, strict=True)}
    return noisy, target


def seen(logits, target, k):
    """The first exit's candidates, their logits and normalisers by exit, and the true token's column."""
    ids = shortlist(logits[LAYERS[0]], k).ids
    same = ids == target[:, None]
    place = torch.where(same.any(-1), same.int().argmax(-1), k)
    z = {e: x.gather(1, ids) for e, x in logits.items()}
    return ids, z, {e: x.logsumexp(-1) for e, x in logits.items()}, place


def surprise(logits, target, k):
    ids, z, normaliser, place = seen(logits, target, k)
    column = place.clamp(max=k - 1)[:, None]
    return {e: torch.where(place < k, normaliser[e] - z[e].gather(1, column)[:, 0], math.inf) for e in z}


def calibrated(seed=0, k=20, alpha=0.1, rows=400, equalise=True):
    tuning, calibration = (surprise(*exits(rows, seed + i), k) for i in (1000, 2000))
    return ts.conformal(tuning, calibration, alpha, equalise=equalise)


def states(sets, logits, target, k):
    ids, z, normaliser, _ = seen(logits, target, k)
    return ts.walk(sets, ids, z, normaliser, torch.arange(len(ids)))


def covers(running, target):
    return (running.active & (running.ids == target[:, None])).any(-1)


# ------------------------------------------------------------ conformal


@pytest.mark.parametrize("equalise", [True, False])
def test_simultaneous_coverage_is_at_least_one_minus_alpha(equalise):
    alpha, k, repeats, rows = 0.15, 25, 150, 60
    hits = 0
    for seed in range(repeats):
        sets = calibrated(seed, k, alpha, rows=80, equalise=equalise)
        logits, target = exits(rows, seed + 5000)
        hits += int(covers(states(sets, logits, target, k)[-1], target).sum())
    count = repeats * rows
    slack = 4 * math.sqrt(alpha * (1 - alpha) / count * 2)  # calibration varies too
    assert hits / count >= 1 - alpha - slack
    assert hits / count < 1, "sets that hold everything would be no test"


def test_equalising_keeps_the_weakest_exit_from_dominating():
    logits, target = exits(2000, 77, noise=(9.0, 1.0, 0.2), scale=7)
    single = {}
    for equalise in (True, False):
        tuning, calibration = (surprise(*exits(2000, s, noise=(9.0, 1.0, 0.2), scale=7), 28) for s in (1, 2))
        sets = ts.conformal(tuning, calibration, 0.15, equalise=equalise)
        last = states(sets, logits, target, 28)[-1]
        single[equalise] = float((last.active.sum(-1) == 1).float().mean())
    assert single[True] > single[False] + 0.1


@SETTINGS
@given(st.integers(0, 10_000), st.sampled_from(["conformal", "avcs"]))
def test_sets_only_shrink(seed, kind):
    logits, target = exits(30, seed)
    sets = calibrated() if kind == "conformal" else ts.EvidenceSets(0.1, dict.fromkeys(LAYERS, 1.0), seed)
    before = torch.ones(30, 20, dtype=torch.bool)
    for running in states(sets, logits, target, 20):
        assert not bool((running.active & ~before).any())
        before = running.active


@pytest.mark.parametrize(
    ("rows", "alpha", "finite"), [(8, 0.1, False), (9, 0.1, True), (98, 0.01, False), (99, 0.01, True)]
)
def test_the_quantile_counts_the_token_to_come(rows, alpha, finite):
    scores = {2: torch.arange(rows).float()}
    sets = ts.conformal({}, scores, alpha, equalise=False)
    assert math.isfinite(sets.limit) == finite
    if finite:
        assert sets.limit == rows - 1


def test_too_many_targets_outside_the_candidates_exclude_nothing():
    scores = torch.arange(100).float()
    scores[:11] = math.inf
    assert ts.conformal({}, {2: scores}, 0.1, equalise=False).limit == math.inf
    scores[:3] = 1.0
    sets = ts.conformal({}, {2: scores}, 0.1, equalise=False)
    assert sets.limit < math.inf


@SETTINGS
@given(st.lists(st.floats(0, 50, width=32) | st.just(math.inf), min_size=1, max_size=400), st.integers(0, 100))
def test_an_equaliser_never_changes_the_order_of_scores(values, seed):
    knots = ts.equaliser(torch.tensor(values))
    other = torch.cat([torch.tensor(values), 60 * torch.rand(50, generator=torch.Generator().manual_seed(seed))])
    other = other[other.isfinite()].double().sort().values
    out = ts.equalised(other, knots)
    assert bool((out.diff() >= 0).all())
    assert ts.equalised(torch.tensor([math.inf]), knots).item() == math.inf
    if knots.shape[1]:
        assert bool((knots.diff(dim=1) > 0).all())


def test_an_equaliser_is_the_distribution_function_at_its_points():
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(1000, generator=g) * 9
    scores[:100] = math.inf
    knots = ts.equaliser(scores)
    assert knots.shape[1] == ts.KNOTS
    for x, level in knots.T[::20].tolist():
        assert level == pytest.approx(float((scores <= x).double().mean()), abs=1e-6)


# ------------------------------------------------------------ evidence


def test_gamma_draws_are_gamma_and_belong_to_their_place():
    ids = torch.arange(8000)[None]
    for a in (1.0, 2.5, 30.0):
        draws = ts._gamma(torch.full((1, 8000), a, dtype=torch.float64), ts._uniforms(ids, 3, 7, 0))[0]
        assert stats.kstest(draws.numpy(), stats.gamma(a).cdf).pvalue > 1e-3
    base = ts._uniforms(ids, 3, 7, 0)
    order = torch.randperm(8000)
    assert torch.equal(ts._uniforms(ids[:, order], 3, 7, 0), base[:, order])
    assert torch.equal(ts._uniforms(ids, 3, torch.tensor([7]), 0), base)
    for layer, position, seed in ((4, 7, 0), (3, 8, 0), (3, 7, 1)):
        other = ts._uniforms(ids, layer, position, seed)
        assert abs(float(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1])) < 0.02


def test_the_ratio_has_the_expectation_of_the_formula():
    """E[(a_y / Σa) / π_y] = (1 - 1/Σa) / (1 - 1/a_y) for a_y > 1 (design, section 13)."""
    z = torch.tensor([[9.0, 6.0, 5.0, -20.0]])
    a = (z - z.mean())[0]
    positions = torch.arange(40_000)
    ratio = ts.log_ratio(torch.arange(4).expand(40_000, 4), z.expand(40_000, 4), 1.0, 2, positions, 0).exp()
    total = float(a[:3].sum())
    for y in range(3):
        expected = (1 - 1 / total) / (1 - 1 / float(a[y]))
        assert float(ratio[:, y].mean()) == pytest.approx(expected, rel=0.03)
    assert bool(ratio[:, 3].isinf().all()), "no evidence: outside for good"


def test_evidence_does_not_depend_on_the_offset_of_logits_nor_on_dropped_tokens():
    ids, z = torch.tensor([[5, 9, 2]]), torch.tensor([[6.0, 4.0, -7.0]])
    one, other = (ts.log_ratio(ids, logits, 1.0, 2, 3, 0) for logits in (z, z + 40))
    torch.testing.assert_close(one, other)
    dropped = torch.tensor([[6.0, 4.0, -7.0, -math.inf]])
    got = ts.log_ratio(torch.tensor([[5, 9, 2, 1]]), dropped, 1.0, 2, 3, 0)
    torch.testing.assert_close(got[:, :3], one)
    assert got[0, 3] == math.inf


def test_without_any_evidence_the_set_is_empty_for_good():
    sets = ts.EvidenceSets(0.1, {2: 1.0, 4: 1.0, 6: 1.0})
    running = ts.start(torch.tensor([[1, 2, 3]]))
    running = sets.step(running, 2, torch.zeros(1, 3), torch.zeros(1), 0)
    assert not bool(running.active.any())
    running = sets.step(running, 4, torch.tensor([[9.0, 0.0, 0.0]]), torch.zeros(1), 0)
    assert not bool(running.active.any())


def test_thresholds_rise_as_far_as_the_coverage_of_the_tuning_tokens_allows():
    logits, target = exits(500, 5, noise=(0.5, 0.3, 0.1))
    ids, z, normaliser, place = seen(logits, target, 30)
    positions = torch.arange(500)
    sets = ts.evidence_sets(ids, z, place, positions, 0.4)
    assert all(tau >= 1 and (2 * tau) % 1 == 0 for tau in sets.thresholds.values())

    def coverage(thresholds):
        walked = ts.walk(ts.EvidenceSets(0.4, thresholds), ids, z, normaliser, positions)
        return float(covers(walked[-1], target).float().mean())

    start = coverage(dict.fromkeys(LAYERS, 1.0))
    if start > 0.6:
        assert coverage(sets.thresholds) > 0.6
        assert coverage({**sets.thresholds, 6: sets.thresholds[6] + 0.5}) <= 0.6
    else:
        assert set(sets.thresholds.values()) == {1.0}
    assert sets.coverage == pytest.approx(coverage(sets.thresholds))


def test_sets_that_cover_too_little_at_the_start_say_how_much():
    logits, target = exits(400, 5, scale=0.3)
    ids, z, normaliser, place = seen(logits, target, 30)
    positions = torch.arange(400)
    sets = ts.evidence_sets(ids, z, place, positions, 0.1)
    assert set(sets.thresholds.values()) == {1.0}
    last = ts.walk(ts.EvidenceSets(0.1, dict.fromkeys(LAYERS, 1.0)), ids, z, normaliser, positions)[-1]
    assert sets.coverage == pytest.approx(float(covers(last, target).double().mean()))
    assert sets.coverage < 0.9


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match="alpha is"):
        ts.conformal({}, {2: torch.zeros(3)}, alpha)
    with pytest.raises(ValueError, match="alpha is"):
        ts.evidence_sets(torch.zeros(1, 2), {}, torch.zeros(1), torch.zeros(1), alpha)


# ------------------------------------------------------------ what is made of them


@SETTINGS
@given(st.integers(0, 10_000))
def test_scores_among_a_set_keep_its_tokens_only(seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(12, generator=g)[:5] for _ in range(4)])
    active = torch.rand(4, 5, generator=g) < 0.4
    active[0] = False
    scores = torch.randn(4, 12, generator=g)
    got = ts.Running(ids, torch.zeros(4, 5), active).among(scores)
    for row in range(4):
        inside = {int(i) for i, a in zip(ids[row], active[row], strict=True) if a} or set(range(12))
        expected = [scores[row, v].item() if v in inside else -math.inf for v in range(12)]
        assert got[row].tolist() == expected


@pytest.mark.parametrize("most", range(1, 70))
def test_a_threshold_of_one_over_n_plus_one_asks_for_at_most_n_tokens(most):
    class Sets:
        def step(self, running, *rest):
            return running._replace(active=torch.arange(100)[None] < torch.arange(100)[:, None])

    class Reading:
        layer, position, ids, logits = 1, 0, None, torch.zeros(100, 100)

        def of(self, ids):
            return self.logits.gather(1, ids)

    confidence = RunningSet(SimpleNamespace(candidates=100), Sets())(Reading())
    leaving = [size for size, c in enumerate(confidence.tolist()) if c > 1 / (most + 1)]
    assert leaving == list(range(1, most + 1))
    single = [size for size, c in enumerate(confidence.tolist()) if c > 0.9]
    assert single == [1]
    assert not bool((confidence > 1).any())

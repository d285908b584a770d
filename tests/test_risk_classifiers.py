"""Losses of classifiers by hand, thresholds that are certified, and promises kept in simulations with known truth.

A simulated promise may be broken with probability `failure` per run: more than `most(runs)` violations come by chance
with a probability below 1e-4; seeds are fixed. CRC promises a mean: it is compared with its standard error.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from scipy import stats

from offramp.calibration import Promise
from offramp.classifiers.certify import (
    RowPromise,
    Trials,
    certify,
    certify_groups,
    threshold_grid,
    try_thresholds,
)
from offramp.risk import binomial, hoeffding_bentkus, search, wsr
from offramp.risk.budgets import leave
from offramp.risk.losses import brier_gap, consistency, exits_under, losses_under, performance_gap

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from classifier_validity import validate  # noqa: E402 - no package: it is found by the line above

INF = math.inf

# ---------------------------------------------------------------- losses by hand

P = torch.tensor(
    [
        [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2]],
        [[0.1, 0.8, 0.1], [0.1, 0.7, 0.2], [0.9, 0.1, 0.0]],
    ],
    dtype=torch.float64,
)  # classes of the exits: 0 1 0 (a tie goes to the lower class) and 1 1 0
Y = torch.tensor([0, 1, 2])


def test_consistency_and_gap_by_hand():
    assert consistency(P).tolist() == [[1, 0, 0], [0, 0, 0]]
    assert performance_gap(P, Y).tolist() == [[-1, 0, 0], [0, 0, 0]]  # the first row is right early and wrong late
    assert performance_gap(P, torch.tensor([1, 1, 1])).tolist() == [[1, 0, 0], [0, 0, 0]]


def test_brier_gap_by_hand():
    def brier(p, y):
        return sum((v - (c == y)) ** 2 for c, v in enumerate(p))

    for labels, target in ((Y, Y.tolist()), (None, [1, 1, 0])):
        gaps = brier_gap(P, labels)
        expected = [[(brier(P[e, i].tolist(), target[i]) - brier(P[1, i].tolist(), target[i])) / 2 for i in range(3)] for e in range(2)]  # fmt: skip  # noqa: E501
        torch.testing.assert_close(gaps, torch.tensor(expected, dtype=torch.float64))
    assert brier_gap(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([1])).tolist() == [[1], [0]]


def test_losses_against_a_reference_by_hand():
    """Such as the network's own last exit, where those at hand are an ensemble's: the last loses, too."""
    other = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)  # classes 0 2 2
    assert consistency(P, other).tolist() == [[0, 1, 1], [1, 1, 1]]
    assert performance_gap(P, Y, other).tolist() == [[0, -1, 1], [1, -1, 1]]
    gaps = brier_gap(P, Y, other)
    of_other = [0.02, 2.0, 0.0]
    of_first = [0.16 + 0.09 + 0.01, 0.04 + 0.25 + 0.09, 0.16 + 0.16 + 0.64]
    assert gaps[0].tolist() == pytest.approx([(a - b) / 2 for a, b in zip(of_first, of_other, strict=True)])
    assert brier_gap(P, None, other).tolist() == brier_gap(P, torch.tensor([0, 2, 2]), other).tolist()
    assert brier_gap(P, Y, P[-1]).tolist() == brier_gap(P, Y).tolist()
    with pytest.raises(ValueError, match=r"the reference has shape \[2, 3\]; rows x classes are needed, \[3, 3\]"):
        consistency(P, other[:2])


def test_losses_follow_the_exits():
    confidences = torch.tensor([[0.9, 0.5, 0.7], [0.95, 0.8, 0.1], [0.1, 0.2, 0.3]])
    exits = exits_under([INF, 0.9, 0.75, 0.0], confidences)
    # float32's 0.9 is not above itself
    assert exits.tolist() == [[2, 2, 2], [1, 2, 2], [0, 1, 2], [0, 0, 0]]
    losses = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert losses_under(losses, exits).tolist() == [[7, 8, 9], [4, 8, 9], [1, 5, 9], [1, 2, 3]]


def test_exits_under_a_threshold_are_those_of_the_budgets():
    confidences = torch.rand(5, 200, generator=torch.Generator().manual_seed(0))
    thresholds = [INF, 0.9, 0.5, 0.1, -INF]
    expected = [leave(confidences, torch.full((5,), t)).tolist() for t in thresholds]
    assert exits_under(thresholds, confidences).tolist() == expected
    assert exits_under([INF, 0.2], confidences[:1]).tolist() == [[0] * 200] * 2


def test_never_leaving_is_not_threshold_one():
    saturated = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert exits_under([INF, 0.9999], saturated).tolist() == [[1, 1], [0, 0]]
    trials = try_thresholds([0.5], saturated, torch.ones(2, 2), torch.tensor([1.0, 2.0]))
    assert trials.thresholds == (INF, 0.5)


def test_bad_losses_are_refused():
    with pytest.raises(ValueError, match="exits x rows x classes"):
        consistency(P[0])
    bad = P.clone()
    bad[1, 1] *= 2
    with pytest.raises(ValueError, match="row 1 at exit 2 has no probabilities"):
        consistency(bad)
    with pytest.raises(ValueError, match=r"3 numbers in 0\.\.2"):
        performance_gap(P, torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="so descending"):
        exits_under([0.5, 0.5], torch.rand(2, 3))
    with pytest.raises(ValueError, match="so descending"):
        exits_under([], torch.rand(2, 3))


# ---------------------------------------------------------------- certificates


def scripted(means, n=200, levels=None):
    """Losses of 0 and 1 with exactly these shares of ones, from "never leave early" on."""
    losses = torch.stack([(torch.arange(n) < round(mean * n)).double() for mean in means])
    exits = torch.arange(len(means)).flip(0)[:, None].expand(-1, n)
    thresholds = (INF, *torch.linspace(0.9, 0.1, len(means) - 1).tolist())
    return Trials(thresholds, losses, exits, torch.arange(1, len(means) + 1).double())


@pytest.mark.parametrize(("bound", "p_value"), [("hoeffding-bentkus", hoeffding_bentkus), ("binomial", binomial)])
def test_the_last_before_the_first_failure(bound, p_value):
    trials = scripted([0, 0.01, 0.04, 0.2, 0.0])  # a gap: the last is fine again, and not reached
    certificate = certify(trials, RowPromise("consistency", 0.1, 0.05, bound))
    assert certificate.index == 2
    assert certificate.certified
    assert certificate.threshold == trials.thresholds[2]
    assert [test["p_value"] for test in certificate.tests] == pytest.approx(
        [p_value(row, 0.1) for row in trials.losses[:4]]
    )
    assert [test["passed"] for test in certificate.tests] == [True, True, True, False]
    assert certificate.saving == pytest.approx(1 - 3 / 5)
    assert certificate.exit_shares == (0, 0, 1, 0, 0)
    json.dumps(certificate.to_dict(), allow_nan=False)
    assert "at least 0.95 over the draw of the 200" in certificate.words()


def test_no_certificate():
    certificate = certify(scripted([0, 0.0], n=10), RowPromise("consistency", 0.05, 0.05, "binomial"))
    assert not certificate.certified
    assert certificate.threshold == INF
    assert certificate.needed == 59  # 0.95^59 < 0.05
    assert certificate.saving == 0
    assert certificate.to_dict()["threshold"] is None
    assert "for no setting" in certificate.words()
    assert "about 59 rows" in certificate.words()
    certificate = certify(scripted([0, 0.5]), RowPromise("consistency", 0.05))
    assert certificate.certified
    assert certificate.index == 0
    assert certificate.needed is None
    assert "only for never leaving early" in certificate.words()


def test_conformal_risk_control_takes_no_later_one_behind_a_gap():
    # Half of the rows lose at the third setting, others at the fourth: its own mean is small, not the monotone one.
    losses = torch.zeros(4, 100)
    losses[2, :50] = 1
    losses[3, 50:55] = 1
    trials = Trials((INF, 0.9, 0.5, 0.1), losses, torch.zeros(4, 100).long(), torch.tensor([1.0]))
    certificate = certify(trials, RowPromise("coverage", 0.1, bound="crc"))
    assert certificate.index == 1
    assert [test["p_value"] for test in certificate.tests] == pytest.approx([1 / 101, 1 / 101, 51 / 101])
    assert certificate.to_dict()["promise"]["failure"] is None
    assert "on average over calibrations" in certificate.words()


def test_a_generic_loss_may_fail_at_the_full_model_already():
    misses = torch.ones(2, 300)
    trials = Trials((INF, 0.5), misses, torch.zeros(2, 300).long(), torch.tensor([1.0, 2.0]))
    for bound in ("wsr", "crc", "hoeffding-bentkus"):
        assert not certify(trials, RowPromise("coverage", 0.1, bound=bound)).certified


def test_gains_count_for_betting_only():
    losses = torch.zeros(2, 400)
    losses[1, :40], losses[1, 40:80] = 1, -1  # 10 % lose, 10 % gain
    trials = Trials((INF, 0.5), losses, torch.zeros(2, 400).long(), torch.tensor([1.0, 2.0]))
    betting = certify(trials, RowPromise("gap", 0.08))
    assert betting.index == 1
    assert not betting.clipped
    order = np.random.default_rng(0).permutation(400)
    assert betting.tests[1]["p_value"] == wsr(losses[1][order], 0.08)
    clipping = certify(trials, RowPromise("gap", 0.08, bound="hoeffding-bentkus"))
    assert clipping.index == 0
    assert clipping.clipped


@pytest.mark.parametrize("bound", ["wsr", "hoeffding-bentkus", "binomial", "crc"])
def test_rows_and_prompts_are_certified_alike(bound):
    """The same losses, once of rows and once of prompts whose answers are more than `margin` worse."""
    coins = np.random.default_rng(4).random((12, 150)) < np.linspace(0, 0.3, 12)[:, None]
    of_rows = certify(
        Trials((INF, *range(11)), torch.tensor(coins).double(), torch.zeros(12, 150).long(), torch.ones(1)),
        RowPromise("consistency", 0.2, 0.1, bound), seed=3,
    )  # fmt: skip
    promise = Promise("f1", 0.2, 0.1, "tail", 0.0, bound)

    def losses(setting):
        early, full = (
            [Namespace(id="", scores={"f1": 1.0 - x}) for x in lost] for lost in (coins[setting], 0 * coins[0])
        )
        return promise.units(promise.losses(early, full), [""] * 150, seed=3)

    outcome = search([range(12)], losses, lambda setting: -setting, promise)
    assert 0 < outcome.selected == of_rows.index < 11
    assert [(t.loss, t.p_value, t.passed) for t in outcome.tests] == [
        (t["loss"], t["p_value"], t["passed"]) for t in of_rows.tests
    ]


def test_groups_share_the_failure():
    trials = scripted([0, 0.02], n=200)
    groups = (torch.arange(200) < 100).long()  # the losses are all in group 1
    certificates = certify_groups(trials, groups, RowPromise("consistency", 0.05, 0.1, "binomial"))
    assert set(certificates) == {0, 1}
    assert all(c.promise.failure == 0.05 for c in certificates.values())
    assert [certificates[g].index for g in (0, 1)] == [1, 0]


def test_ladder_descends_to_all_leave():
    confidences = torch.tensor([[0.2, 0.9, 0.9], [0.3, 0.5, 1.0], [0.0, 0.0, 0.0]])
    steps = threshold_grid(confidences, 6)
    assert steps[:4] == pytest.approx((1.0, 0.9, 0.5, 0.3))  # six ranks of six, of which two are equal
    assert len(steps) == 5
    assert steps[4] == np.nextafter(np.float32(0.2), np.float32(0))
    assert all(a > b for a, b in zip(steps, steps[1:], strict=False))
    assert exits_under(steps, confidences)[-1].tolist() == [0, 0, 0]
    assert len(threshold_grid(torch.rand(3, 1000), 50)) == 50
    with pytest.raises(ValueError, match="at least 2 exits"):
        threshold_grid(confidences[:1])


def test_bad_trials_are_refused():
    losses, exits, costs = torch.zeros(2, 3), torch.zeros(2, 3).long(), torch.ones(1)
    with pytest.raises(ValueError, match="must be infinity"):
        Trials((0.9, 0.5), losses, exits, costs)
    with pytest.raises(ValueError, match="3 thresholds"):
        Trials((INF, 0.5, 0.1), losses, exits, costs)
    with pytest.raises(ValueError, match="bound is 'hoeffding'"):
        RowPromise("gap", bound="hoeffding")
    with pytest.raises(ValueError, match="tolerance is 0"):
        RowPromise("gap", 0)
    with pytest.raises(ValueError, match="losses that are 0 or 1"):
        certify(Trials((INF,), losses[:1] + 0.5, exits[:1], costs), RowPromise("gap", bound="binomial"))
    with pytest.raises(ValueError, match="repeats is 0"):
        validate(Trials((INF, 0.5), losses, exits, costs), RowPromise("gap"), repeats=0)


# ---------------------------------------------------------------- promises are kept

RUNS, N = 300, 300
TOLERANCE, FAILURE = 0.1, 0.1


def most(runs):
    return int(stats.binom.isf(1e-4, runs, FAILURE))


def rows(generator, n):
    """A classifier of two exits and two classes: the surer the first exit, the likelier it is right; the last is right.

    Returns confidences, losses of the first exit, and the true risk of a threshold t: P(conf > t and wrong).
    """
    sure = torch.rand(2, n, generator=generator, dtype=torch.float64) / 2 + 0.5
    wrong = torch.rand(n, generator=generator, dtype=torch.float64) > sure[0]
    return sure, torch.stack([wrong.double(), torch.zeros(n, dtype=torch.float64)])


def risk(threshold):
    """∫ over c in (t, 1) of (1 - c) · 2 dc, for c uniform on (1/2, 1)."""
    return 0.0 if threshold == INF else (1 - max(threshold, 0.5)) ** 2


def gains(losses, generator, share=0.1):
    """Losses of the first exit, some of them replaced by 1 or -1 at random."""
    move = torch.rand(losses.shape[1], generator=generator) < share
    signs = torch.where(torch.rand(losses.shape[1], generator=generator) < 0.5, 1.0, -1.0).double()
    return torch.stack([torch.where(move, signs, losses[0] * 1.0), losses[1]])


STEPS = tuple(torch.linspace(0.99, 0.5, 30).tolist())  # the true risk passes 0.1 at 0.684


@pytest.mark.parametrize("bound", ["wsr", "hoeffding-bentkus", "binomial"])
def test_violations_are_as_rare_as_promised(bound):
    generator, costs = torch.Generator().manual_seed(5), torch.tensor([1.0, 4.0])
    found = []
    for run in range(RUNS):
        sure, losses = rows(generator, N)
        trials = try_thresholds(STEPS, sure, losses, costs)
        found.append(certify(trials, RowPromise("consistency", TOLERANCE, FAILURE, bound), seed=run).threshold)
    assert sum(risk(t) > TOLERANCE for t in found) <= most(RUNS)
    assert np.mean([risk(t) for t in found]) > 0.02  # and it is not kept by never leaving


def test_signed_violations_are_as_rare_as_promised():
    # A tenth of the rows, whatever their confidence, is moved to 1 or -1, with mean 0: 0.9 · risk(t) remains.
    generator, costs = torch.Generator().manual_seed(6), torch.tensor([1.0, 4.0])
    violated = saved = 0
    for run in range(RUNS):
        sure, losses = rows(generator, N)
        trials = try_thresholds(STEPS, sure, gains(losses, generator), costs)
        certificate = certify(trials, RowPromise("gap", TOLERANCE, FAILURE), seed=run)
        violated += 0.9 * risk(certificate.threshold) > TOLERANCE
        saved += certificate.saving > 0.1
    assert violated <= most(RUNS)
    assert saved > RUNS / 2


@pytest.mark.parametrize("monotone", [True, False])
def test_conformal_risk_control_keeps_the_mean(monotone):
    generator, costs = torch.Generator().manual_seed(7), torch.tensor([1.0, 4.0])
    n, found = 60, []
    for run in range(RUNS):
        sure, losses = rows(generator, n)
        trials = try_thresholds(STEPS, sure, losses, costs)
        if not monotone:  # every other setting loses nothing, so means go up and down
            trials.losses[2::2] = 0
        certificate = certify(trials, RowPromise("consistency", TOLERANCE, bound="crc"), seed=run)
        zero = not monotone and certificate.index % 2 == 0
        found.append(0.0 if zero else risk(certificate.threshold))
    assert np.mean(found) <= TOLERANCE + 4 * np.std(found) / math.sqrt(RUNS)
    if monotone:
        assert np.mean(found) > 0.6 * TOLERANCE
        assert np.mean(np.array(found) > TOLERANCE) > 0.1  # a single calibration is not promised anything


@pytest.mark.parametrize("failure", [0.05, 0.11])
def test_a_promise_about_a_pool_is_broken_as_often_as_it_may_be(failure):
    """The pool's risk is just above the tolerance: an exact test fails as often as a binomial count is that small."""
    rows, ones, repeats = 872, 45, 1000
    trials = scripted([0, 0, ones / rows], n=rows)  # the second always passes
    promise = RowPromise("consistency", 0.05, failure, "binomial")
    most_losses = max(k for k in range(60) if stats.binom.cdf(k, 436, 0.05) <= failure)
    expected = stats.binom.cdf(most_losses, 436, ones / rows)
    assert 0.5 * failure < expected <= failure
    validity = validate(trials, promise, repeats=repeats)
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], repeats, expected)
    assert low <= validity.above_pool <= high
    assert validity.certifying == 436


def test_validity_counts_agree_with_a_loop():
    sure, losses = rows(torch.Generator().manual_seed(8), 1000)
    trials = try_thresholds(STEPS, sure, losses, torch.tensor([1.0, 4.0]))
    promise = RowPromise("consistency", TOLERANCE, FAILURE, "hoeffding-bentkus")
    validity = validate(trials, promise, share=0.4, repeats=120, seed=3)
    above = 0
    for repeat in range(120):
        drawn = np.random.default_rng(3 + repeat).integers(0, 1000, 400)
        index = certify(trials.take(drawn), promise).index
        others = [row for row in range(1000) if row not in drawn]
        above += float(losses_under(losses, trials.exits)[index][others].mean()) > TOLERANCE
    assert validity.above_held_out == above
    assert validity.above_pool <= most(120)
    assert (validity.rows, validity.certifying, validity.repeats) == (1000, 400, 120)
    assert 0 < validity.loss < TOLERANCE
    assert 0 < validity.saving < 0.75
    values = validity.to_dict()
    json.dumps(values, allow_nan=False)
    low, high = values["above_pool_interval"]
    assert low <= validity.above_pool / 120 <= high

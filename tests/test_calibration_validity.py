"""The promise, kept by the whole pipeline: splits, losses, orders, tests, the choice.

In every calibration the truth is known: some settings are safe, others lose exactly the tolerance on average (not to be
certified), others more. With probability at most FAILURE a calibration may certify one of those. More than `MOST` wrong
ones in RUNS calibrations come by chance with a probability below 1e-4 per test, and below 0.002 over this file; seeds
are fixed, so a passing test stays so. Bounds are tried harder, on numbers alone, in `test_risk_validity.py`.
"""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from scipy import stats

from offramp.calibration import Promise, decoded
from offramp.calibration import calibrate as pipeline
from offramp.calibration.result import Calibration
from offramp.risk import Outcome, search
from scripted_calibration import BASE, GRID, JOINT, TASK, Script, betas, coins, examples, model, ups_and_downs

TOLERANCE, FAILURE, RUNS, N = 0.2, 0.2, 30, 100
MOST = int(stats.binom.isf(1e-4, RUNS, FAILURE))
SAFE = 0.02
COINS = {"kind": "tail", "margin": 0.25}


def truth(policy):
    """Thresholds of 0.9 are safe, others are not; from layer 1, nothing is."""
    bad = policy.min_layer == 1 or policy.threshold < 0.6
    return {True: TOLERANCE + 0.1 * (policy.threshold < 0.3), False: SAFE}[bad]


def wrong(monkeypatch, tmp_path, draw=coins, order="path", grid=GRID, **options):
    """How many calibrations certify what they must not, how many certify anything, and the mean true loss chosen."""
    monkeypatch.setattr(Calibration, "save", lambda self, folder: [])
    lm, made, promise = model(), examples(N), Promise("f1", TOLERANCE, FAILURE, **options)
    broken, losses = 0, []
    for seed in range(RUNS):
        monkeypatch.setattr(decoded, "decode_arms", Script(truth, seed, draw).together)
        result = pipeline(
            lm, TASK, made, BASE, promise, tmp_path, grid=grid, order=order, test=0.0, seed=seed, resamples=1
        )
        tested = [result.settings[test.setting] for test in result.outcome.tests if test.passed]
        broken += any(truth(setting.policy) >= TOLERANCE for setting in tested)
        losses.append(0.0 if result.outcome.selected is None else truth(result.policy))
    return broken, sum(loss > 0 for loss in losses), losses


@pytest.mark.parametrize("order", ["path", "chains", "pareto"])
@pytest.mark.parametrize(
    ("draw", "options"),
    [
        (betas, {"bound": "hoeffding"}),
        (coins, {"bound": "hoeffding-bentkus"}),
        (coins, {**COINS, "bound": "binomial"}),
        (betas, {"bound": "wsr"}),
        (ups_and_downs, {"kind": "signed", "bound": "wsr"}),
    ],
    ids=["hoeffding", "hoeffding-bentkus", "binomial", "wsr", "wsr-signed"],
)
def test_the_pipeline_keeps_the_promise(monkeypatch, tmp_path, order, draw, options):
    grid = GRID if order == "path" else JOINT
    broken, certified, _ = wrong(monkeypatch, tmp_path, draw, order, grid, **options)
    assert broken <= MOST
    assert certified > 0 if options["bound"] == "hoeffding" else certified > RUNS / 2


@pytest.mark.parametrize("order", ["path", "pareto"])
def test_conformal_risk_control_keeps_it_on_the_mean(monkeypatch, tmp_path, order):
    _, certified, losses = wrong(monkeypatch, tmp_path, coins, order, bound="crc")
    assert np.mean(losses) <= TOLERANCE + 4 * np.std(losses) / np.sqrt(RUNS)
    assert certified > RUNS / 2


def adversary(seed):
    """Costs that know the truth: what must not be certified is always the cheapest, and costs are of this very draw."""
    rng = np.random.default_rng(seed)
    return lambda policy: (0.1 if truth_of_all(policy) >= TOLERANCE else 0.5) + 0.4 * rng.random()


def truth_of_all(policy):
    """As `truth`, with static exits: the deepest is safe, the others are at the boundary or worse."""
    if policy.confidence == "static":
        return {3: SAFE, 2: TOLERANCE, 1: TOLERANCE + 0.1}[policy.min_layer]
    return truth(policy)


@pytest.mark.parametrize("order", ["path", "chains", "pareto"])
def test_the_cheapest_of_all_sequences_keeps_the_promise(monkeypatch, tmp_path, order):
    """Static exits beside the grid, and a choice by costs of the certification part that favours whatever is wrong."""
    monkeypatch.setattr(Calibration, "save", lambda self, folder: [])
    lm, made, promise = model(), examples(N), Promise("f1", TOLERANCE, FAILURE, **COINS)
    grid = replace(GRID if order == "path" else JOINT, static_layers=(1, 2, 3))
    broken = chosen = 0
    for seed in range(RUNS):
        script = Script(truth_of_all, seed, coins, cost=adversary(seed))
        monkeypatch.setattr(decoded, "decode_arms", script.together)
        result = pipeline(
            lm, TASK, made, BASE, promise, tmp_path, grid=grid, order=order, test=0.0, seed=seed, resamples=1
        )
        chosen += result.outcome.selected is not None
        broken += result.outcome.selected is not None and truth_of_all(result.policy) >= TOLERANCE
    assert broken <= MOST
    assert chosen > RUNS / 2


def test_choosing_by_costs_needs_the_failure_to_be_divided():
    """On numbers alone: the cheapest of four sequences, each with a wrong setting that is the cheapest of all."""
    runs, n, most = 2000, 100, int(stats.binom.isf(1e-5, 2000, FAILURE))
    promise = Promise("f1", TOLERANCE, FAILURE, **COINS)
    rng = np.random.default_rng(11)
    means = np.array([SAFE, TOLERANCE] * 4)
    divided = undivided = 0
    for _ in range(runs):
        losses = (rng.random((8, n)) < means[:, None]).astype(float)
        costs = 0.9 - 0.5 * (means >= TOLERANCE) - 0.1 * losses.mean(axis=1)  # cheaper where it seems worse
        sequences = [[0, 1], [2, 3], [4, 5], [6, 7]]
        divided += wrongly(search(sequences, losses.__getitem__, costs.__getitem__, promise, below=1.0), means)
        alone = [search([s], losses.__getitem__, costs.__getitem__, promise, below=1.0) for s in sequences]
        undivided += any(wrongly(outcome, means) for outcome in alone)
    assert divided <= most < undivided


def wrongly(outcome, means):
    return outcome.selected is not None and means[outcome.selected] >= TOLERANCE


def test_a_pipeline_that_takes_the_failing_setting_would_be_found(monkeypatch, tmp_path):
    module = import_module("offramp.calibration.calibrate")  # the package has a function of that name

    def careless(sequences, losses, cost, promise, **options):
        tests = search(sequences, losses, cost, promise, **options).tests
        return Outcome(tests[-1].setting, tuple(replace(test, passed=True) for test in tests), promise.failure)

    monkeypatch.setattr(module, "search", careless)
    broken, _, _ = wrong(monkeypatch, tmp_path)
    assert broken > MOST


def test_many_searches_keep_the_promise_and_need_to_divide_it():
    # On numbers alone 2000 calibrations are quick: three chains whose second settings are at the boundary.
    runs, n, most = 2000, 100, int(stats.binom.isf(1e-5, 2000, FAILURE))
    promise = Promise("f1", TOLERANCE, FAILURE, **COINS)
    rng = np.random.default_rng(5)
    means = np.array([SAFE, TOLERANCE] * 3)
    together = alone = 0
    for _ in range(runs):
        losses = (rng.random((6, n)) < means[:, None]).astype(float)
        chains = [[0, 1], [2, 3], [4, 5]]
        outcome = search(chains, losses.__getitem__, lambda s: -s, promise)
        together += any(test.passed and means[test.setting] >= TOLERANCE for test in outcome.tests)
        alone += any(
            search([chain], losses.__getitem__, lambda s: -s, promise).selected == chain[1] for chain in chains
        )
    assert together <= most < alone

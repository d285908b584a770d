"""Thresholds for each layer by gain: against brute force, nested, and certified as a whole."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp import ExitPolicy
from offramp.calibration import GAINS, Grid, calibrate, layer_thresholds, load, settings_of
from offramp.calibration.grid import chains_of, paths_of
from offramp.calibration.layer_thresholds import by_gain, saved_shares
from offramp.core.costs import exit_flops, saved_flops
from offramp.core.exits import Exits
from offramp.core.plan import resolve
from scripted_calibration import BASE, TASK, model
from test_calibration import REAL, SHORT, questions

TESTS = st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.4, 0.6, 0.8, 0.95]), st.booleans()), min_size=1, max_size=30)


def columns(tests):
    return np.array([c for c, _ in tests]), np.array([w for _, w in tests])


def isotonic(tests, at):
    """The nonincreasing fit at a confidence, by its min-max formula (Robertson, Wright and Dykstra, 1988)."""
    values = sorted({c for c, _ in tests})

    def mean(low, high):
        wrong = [w for c, w in tests if low <= c <= high]
        return sum(wrong) / len(wrong)

    return min(max(mean(low, high) for high in values if high >= at) for low in values if low <= at)


@given(TESTS, st.floats(0.01, 1.2))
def test_a_threshold_by_gain_is_the_last_confidence_that_is_too_often_wrong(tests, most):
    found = by_gain(columns(tests), most, -1.0)
    dear = [c for c, _ in tests if isotonic(tests, c) >= most - 1e-12]
    assert found == pytest.approx(max(dear, default=-1.0)) or any(
        isotonic(tests, c) == pytest.approx(most) for c, _ in tests
    )


@given(TESTS)
def test_rising_prices_give_falling_thresholds(tests):
    thresholds = [by_gain(columns(tests), most, 0.0) for most in (0.0, 0.05, 0.2, 0.5, 0.9, 1.5)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] == max(c for c, _ in tests)  # at no price, none leaves that was seen
    assert thresholds[-1] == 0.0


def test_where_nothing_was_tested_none_leaves():
    assert by_gain(columns([]), 0.5, 0.0) == 1.0


@pytest.mark.parametrize("kept", [None, 20])
def test_what_leaving_saves_is_a_difference_of_costs(kept):
    lm = model()
    lm.attach_exits(Exits.fresh(lm.split, (2, 3)))
    shape = lm.split.shape
    for layer in (2, 3):
        saved = exit_flops(shape, 4, 2, kept) - exit_flops(shape, layer, 2, kept)
        assert saved_flops(shape, layer, (2, 3), kept) == saved
    bare = saved_flops(shape, 3, (2, 3), scored=False)
    assert bare == 2 * shape.blocks[3].weights - shape.fill_flops(3)
    plan = resolve(ExitPolicy(min_layer=2), 4, lm.vocabulary, (2, 3))
    shares = saved_shares(lm, plan)
    assert 0 < shares[3] < shares[2] < 1


def test_thresholds_of_a_model_are_those_of_its_tests():
    lm, tests = model(), {1: [], 2: [], 3: []}
    for prompt in TASK.prompts(lm, questions(6)):
        answer = lm.generate([prompt], max_new_tokens=8)
        hidden = lm.model(answer.sequences, output_hidden_states=True).hidden_states
        new = len(answer.tokens[0])
        for layer, seen in tests.items():
            logits = lm.model.lm_head(lm.model.model.norm(hidden[layer]))[0, -new:-1].float()
            top = logits.softmax(-1).topk(2).values
            missed = logits.argmax(-1) != answer.sequences[0, -new + 1 :]
            seen += list(zip((top[:, 0] - top[:, 1]).tolist(), missed.tolist(), strict=True))
    policy, prices = ExitPolicy(min_layer=1), (0.3, 1.0, 1.5)
    found = layer_thresholds(lm, TASK, questions(6), policy, prices, rule="gain", max_new_tokens=8)
    saved = saved_shares(lm, resolve(policy, 4, lm.vocabulary))
    for price, thresholds in zip(prices, found, strict=True):
        expected = [by_gain(columns(tests[layer]), price * saved[layer], 0.0) for layer in (1, 2, 3)]
        np.testing.assert_allclose(thresholds, expected, atol=1e-5)


def test_gains_are_a_family_beside_thresholds():
    grid = Grid((0.9, 0.5), min_layers=(2, 3), gains=(0.5, 0.1, 1.0))
    settings = settings_of(model(), BASE, grid, lambda policy, knobs, rule: [(0.5,) * 2 for _ in knobs])
    assert [s.name for s in settings if s.chain == 2] == [
        f"softmax, gain {g} per layer, from 3" for g in (0.1, 0.5, 1.0)
    ]  # fmt: skip
    assert (grid.size(BASE), grid.chains(BASE), len(chains_of(settings))) == (10, 4, 4)
    assert [[settings[i].family for i in path] for path in paths_of(settings)] == [["threshold"] * 4, ["gain"] * 6]
    assert (grid.sequences(BASE, "path"), grid.sequences(BASE, "chains"), grid.sequences(BASE, "pareto")) == (2, 4, 1)
    assert list(GAINS) == sorted(GAINS)
    with pytest.raises(ValueError, match="prices from 0 on"):
        Grid(gains=(-0.1,))


@pytest.mark.parametrize("order", ["path", "pareto"])
def test_gains_are_certified_as_a_whole(tmp_path, order):
    grid = Grid((1.0, 0.0), gains=(0.0, 0.5))
    made = questions(40)
    result = calibrate(
        model(), TASK, made, ExitPolicy(min_layer=2), REAL, tmp_path, grid=grid, order=order, must_pay=False, **SHORT
    )
    certificate = load(tmp_path / "policy.json")
    assert certificate.to_dict() == json.loads(json.dumps(result.certificate.to_dict()))
    assert certificate.splits["tuning"][0] == 12
    names = {setting.name for setting in result.settings}
    assert names == {"softmax > 1.0", "softmax > 0.0", "softmax, gain 0.0 per layer", "softmax, gain 0.5 per layer"}
    assert all(test["name"] in names for test in certificate.tests)

"""Relaxed verification is certified: `accept` is varied like a threshold, nested, and 1 of it loses nothing."""

import json

import pytest

from offramp import ExitPolicy
from offramp.calibration import Grid, Promise, calibrate, decoded, load, settings_of
from offramp.calibration.grid import chains_of, paths_of, plain_policies
from offramp.report import drawing
from scripted_calibration import BASE, TASK, Script, examples, model
from test_calibration import REAL, SHORT, questions

VERIFY = ExitPolicy(skipped="verify")
GRID = Grid((0.9, 0.5), accepts=(0.5, 1.0, 0.8))


def test_smaller_shares_are_bolder_and_stay_in_the_chain_of_their_thresholds():
    settings = settings_of(model(), VERIFY, GRID)
    assert len(settings) == GRID.size(VERIFY) == 6
    assert (GRID.chains(VERIFY), GRID.sequences(VERIFY, "chains")) == (1, 1)
    (path,), (chain,) = paths_of(settings), chains_of(settings)
    order = [(settings[i].policy.threshold, settings[i].policy.accept) for i in path]
    assert order == [(0.9, 1.0), (0.9, 0.8), (0.9, 0.5), (0.5, 1.0), (0.5, 0.8), (0.5, 0.5)]
    assert [settings[i].boldness for i in chain] == [0, 0.25, 0.5, 0.5, 0.75, 1]
    assert settings[path[1]].name == "softmax > 0.9, accept 0.8"


def test_only_what_is_verified_has_shares():
    grid = Grid((0.9,), accepts=(0.5, 1.0), skipped=("propagate", "verify"))
    settings = settings_of(model(), BASE, grid)
    assert [(s.policy.skipped, s.policy.accept) for s in settings] == [
        ("verify", 1.0), ("verify", 0.5), ("propagate", 1.0)
    ]  # fmt: skip
    assert grid.size(BASE) == 3
    with pytest.raises(ValueError, match="nothing is verified"):
        settings_of(model(), BASE, Grid((0.9,), accepts=(0.5,)))
    with pytest.raises(ValueError, match="accept is 1.5"):
        settings_of(model(), VERIFY, Grid((0.9,), accepts=(1.5,)))
    relaxed = plain_policies(ExitPolicy(skipped="verify", accept=0.5), (2,))
    assert relaxed == {"static 2": ExitPolicy("static", min_layer=2, skipped="verify", accept=0.5)}


@pytest.mark.parametrize("order", ["path", "pareto"])
def test_the_boldest_share_that_keeps_the_promise_is_certified(monkeypatch, tmp_path, order):
    monkeypatch.setattr(drawing, "available", lambda: False)
    script = Script(
        lambda policy: {1.0: 0.0, 0.8: 0.02, 0.5: 0.5}[policy.accept],
        cost=lambda policy: 0.4 + policy.accept / 2 + policy.threshold / 20,
    )
    monkeypatch.setattr(decoded, "decode_arms", script.together)
    promise = Promise("f1", 0.1, 0.1)
    result = calibrate(
        model(), TASK, examples(400), VERIFY, promise, tmp_path, grid=GRID, order=order, resamples=20
    )  # fmt: skip
    assert result.policy.accept == 0.8
    assert not any(test["passed"] for test in result.certificate.tests if "accept 0.5" in test["name"])
    assert load(tmp_path / "policy.json").to_dict() == json.loads(json.dumps(result.certificate.to_dict()))
    assert ExitPolicy.load(tmp_path / "policy.json").accept == 0.8


def test_a_share_of_one_loses_nothing(tmp_path):
    base = ExitPolicy(min_layer=2, skipped="verify")
    grid = Grid((0.0,), accepts=(1.0, 0.01))
    result = calibrate(model(), TASK, questions(16), base, REAL, tmp_path, grid=grid, must_pay=False, **SHORT)
    first = result.certificate.tests[0]
    assert (first["name"], first["loss"]) == ("softmax > 0.0, accept 1.0", 0.0)

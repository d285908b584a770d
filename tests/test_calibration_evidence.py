"""A certificate is believed as far as it follows from its losses; whatever else is in the file is one clear error."""

import copy
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from offramp import ExitPolicy
from offramp.calibration import Certificate, Grid, Promise, calibrate, decoded, load
from offramp.calibration.evidence import packed, unpacked
from offramp.report import drawing
from offramp.runs import digests
from scripted_calibration import BASE, GRID, JOINT, TASK, Script, at_most, betas, examples, model, ups_and_downs

REFUSED = "the certificate was changed or is damaged: "
TRUTH = at_most({0.9: 0.02, 0.5: 0.05, 0.1: 0.9})
GENTLE = at_most({0.9: 0.02, 0.5: 0.05, 0.1: 0.35})
PROMISES = {
    "risk": (Promise("f1", 0.2, 0.1), {}),
    "binomial": (Promise("f1", 0.2, 0.1, "tail", 0.3), {}),
    "wsr": (Promise("f1", 0.2, 0.1, bound="wsr"), {"draw": betas}),
    "signed": (Promise("f1", 0.3, 0.1, "signed"), {"draw": ups_and_downs, "truth": GENTLE}),
    "textual": (Promise("f1", 0.2, 0.1, "textual"), {}),
    "crc": (Promise("f1", 0.2, bound="crc"), {}),
    "group": (Promise("f1", 0.3, 0.1, unit="group"), {"draw": betas}),
}


def saved(monkeypatch, folder, promise, *, truth=TRUTH, draw=None, **options):
    monkeypatch.setattr(drawing, "available", lambda: False)
    monkeypatch.setattr(decoded, "decode_arms", Script(truth, **({} if draw is None else {"draw": draw})).together)
    options = {"grid": GRID, "resamples": 20, "max_new_tokens": 5, **options}
    calibrate(model(), TASK, examples(200, per_group=2), BASE, promise, folder, **options)
    return json.loads((folder / "policy.json").read_text())["certificate"]


def signed(values):
    """The same with the digest that it then has: an editor who knows how."""
    bare = {name: value for name, value in values.items() if name != "digest"}
    return {**bare, "digest": digests.of(bare)}


def edited(values, **changes):
    return signed({**copy.deepcopy(values), **changes})


@pytest.mark.parametrize("name", PROMISES)
def test_what_was_written_is_read(monkeypatch, tmp_path, name):
    promise, options = PROMISES[name]
    values = saved(monkeypatch, tmp_path, promise, **options)
    certificate = load(tmp_path / "policy.json")
    assert certificate.certified
    assert certificate.to_dict() == values
    assert signed(values) == values


@pytest.mark.parametrize("order", ["path", "chains", "pareto"])
def test_every_order_is_read(monkeypatch, tmp_path, order):
    options = {"grid": JOINT, "order": order, "truth": lambda policy: 0.02, "tuning": 0.3 if order == "pareto" else 0}
    values = saved(monkeypatch, tmp_path, Promise("f1", 0.2, 0.1), **options)
    assert load(tmp_path / "policy.json").to_dict() == values
    if order == "chains":  # fewer chains would each have been tested at a larger level
        few = [test for test in values["tests"] if test["chain"] == 0]
        with pytest.raises(ValueError, match="other sequences than the 3"):
            Certificate.from_dict(edited(values, tests=few, level=0.1, selected=1))


def test_nothing_certified_is_read(monkeypatch, tmp_path):
    values = saved(monkeypatch, tmp_path, Promise("f1", 0.2, 0.1), truth=lambda policy: 0.9)
    assert load(tmp_path / "policy.json").to_dict() == values
    with pytest.raises(ValueError, match="the verdict is True, but False follows"):
        Certificate.from_dict(edited(values, certified=True))


def test_the_p_value_is_the_binomial_one_of_the_losses_in_the_file(monkeypatch, tmp_path):
    values = saved(monkeypatch, tmp_path, *PROMISES["binomial"][:1])
    for test in values["tests"]:
        losses = unpacked(test["losses"], values["n"])
        assert test["p_value"] == pytest.approx(stats.binom.cdf(losses.sum(), len(losses), 0.2))


# ---------------------------------------------------------------- edits


def promising(values, **changes):
    return edited(values, promise={**values["promise"], **changes})


def at_test(values, place, **changes):
    tests = copy.deepcopy(values["tests"])
    tests[place] |= changes
    return edited(values, tests=tests)


def estimating(values, part, **changes):
    estimates = copy.deepcopy(values["estimates"])
    estimates[part] |= changes
    return edited(values, estimates=estimates)


EDITS = {
    "tolerance": lambda v: promising(v, tolerance=0.02),
    "failure": lambda v: promising(v, failure=0.001),
    "metric": lambda v: edited(v, promise={**v["promise"], "bound": "hoeffding"}),
    "n": lambda v: edited(v, n=1000),
    "n and splits": lambda v: edited(v, n=1000, splits={**v["splits"], "certification": [1000, 500]}),
    "p-value": lambda v: at_test(v, 0, p_value=1e-9),
    "mean loss": lambda v: at_test(v, 0, loss=0.0),
    "verdict": lambda v: at_test(v, 2, passed=True),
    "verdict and p-value": lambda v: at_test(v, 2, passed=True, p_value=0.01),
    "cost": lambda v: at_test(v, 0, cost=0.01),
    "chosen": lambda v: edited(v, selected=0),
    "certified": lambda v: edited(v, certified=False),
    "level": lambda v: edited(v, level=0.5),
    "policy": lambda v: edited(v, policy={**v["policy"], "threshold": 0.1}),
    "setting": lambda v: at_test(v, 1, changes={"threshold": 0.1}, knob=0.1),
    "setting of no grid": lambda v: at_test(v, 1, changes={"threshold": 0.3}, knob=0.3),
    "skipped": lambda v: at_test(v, 1, changes={"threshold": 0.5, "skipped": "defer"}),
    "fewer losses": lambda v: at_test(v, 0, losses="0*20"),
    "more losses": lambda v: at_test(v, 0, losses="0*2000000000000"),
    "no test": lambda v: edited(v, tests=[]),
    "room": lambda v: edited(v, room={**v["room"], "p_value": 0.5}),
    "no room": lambda v: edited(v, room={**v["room"], "mean": 0.0, "p_value": 1.0}),
    "estimate": lambda v: estimating(v, "certification", loss={"value": 0.0, "low": 0.0, "high": 0.0}),
    "upper limit": lambda v: estimating(v, "test", upper=0.01),
    "needed": lambda v: edited(v, needed=12),
    "conditions": lambda v: edited(v, conditions={k: x for k, x in v["conditions"].items() if k != "weights"}),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_of_the_statement_is_believed(monkeypatch, tmp_path, edit):
    values = saved(monkeypatch, tmp_path, Promise("f1", 0.2, 0.1))
    with pytest.raises(ValueError, match=REFUSED):
        Certificate.from_dict(EDITS[edit](values))


def test_a_plain_editor_is_refused_by_the_digest(monkeypatch, tmp_path):
    values = saved(monkeypatch, tmp_path, Promise("f1", 0.2, 0.1))
    values["data"]["name"] = "other.jsonl"
    path = tmp_path / "policy.json"
    policy = json.loads(path.read_text())
    path.write_text(json.dumps({**policy, "certificate": values}))
    with pytest.raises(ValueError, match=r"policy.json: the certificate was changed or is damaged: it is not what was"):
        load(path)


# ---------------------------------------------------------------- damage of any kind

OTHERS = (None, True, -1, 0, 10**400, 1e308, "x", "", [], {}, [1], {"a": 1}, "0*9999999999999", math.nan)


def nodes(values, path=()):
    """Places in JSON values, from the outside in."""
    for key in values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        yield (*path, key)
        yield from nodes(values[key], (*path, key))


def changed(values, path, change):
    made = copy.deepcopy(values)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return made


def stated(values):
    """What is promised, of which policy, by how much."""
    return values["certified"], values["promise"], values["n"], ExitPolicy.from_dict(values["policy"])


@pytest.mark.parametrize(("name", "knowing"), [("risk", False), ("risk", True), ("crc", True), ("wsr", True)])
def test_every_node_deleted_or_replaced_is_read_as_it_was_or_refused(monkeypatch, tmp_path, name, knowing):
    promise, options = PROMISES[name]
    values = saved(monkeypatch, tmp_path, promise, **options)
    draw, tried = random.Random(0), 0
    for path in nodes(values):
        for other in ("delete", *draw.sample(OTHERS, 2)):
            damaged = changed(values, path, lambda inner, key, other=other: put(inner, key, other))
            damaged, tried = (signed(damaged) if knowing else damaged), tried + 1
            try:
                found = Certificate.from_dict(damaged)
            except ValueError as error:
                assert "calibrate again" in str(error)  # noqa: PT017
            else:
                read = found.to_dict()
                assert knowing or read == values, path
                assert stated(read) == stated(values), path
    assert tried > 500


def put(inner, key, other):
    if other == "delete":
        del inner[key]
    else:
        inner[key] = other


@pytest.mark.parametrize("other", [1, "x", [], None, {}])
def test_what_is_no_certificate_at_all_is_refused(other):
    with pytest.raises(ValueError, match="this is no certificate"):
        Certificate.from_dict(other)


# ---------------------------------------------------------------- earlier versions


def test_one_of_the_first_version_is_read_but_applies_to_nothing(monkeypatch, tmp_path):
    values = saved(monkeypatch, tmp_path, Promise("f1", 0.2, 0.1))
    earlier = {k: v for k, v in values.items() if k not in ("digest", "room", "reference")}
    new = ("losses", "changes", "cost")
    earlier["tests"] = [{k: v for k, v in test.items() if k not in new} for test in values["tests"]]
    certificate = Certificate.from_dict(earlier | {"schema": "offramp/certificate/1"})
    assert certificate.certified
    assert "lose at most 0.2" in certificate.words()
    assert "earlier version" in certificate.mismatches(model())[0]
    with pytest.raises(ValueError, match="changed or is damaged"):
        Certificate.from_dict({**earlier, "schema": "offramp/certificate/1", "tests": 3})


# ---------------------------------------------------------------- packed losses


@given(st.lists(st.sampled_from([0.0, 1.0, 0.25, 1 / 3, -0.5]) | st.floats(-1, 1), max_size=40))
@settings(max_examples=200, deadline=None)
def test_losses_are_packed_exactly(losses):
    np.testing.assert_array_equal(unpacked(packed(losses), len(losses)), losses)


def test_runs_are_counted():
    assert packed([0.0, 0.0, 0.25, 1.0, 1.0]) == "0*2 0.25 1*2"


@pytest.mark.parametrize("text", ["x", "0*x", "0*-1", "0*3", "*"])
def test_what_are_no_losses_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        unpacked(text, 2)


def test_a_certificate_stays_small(monkeypatch, tmp_path):
    values = saved(monkeypatch, tmp_path, Promise("f1", 0.2, 0.1), grid=Grid(), truth=lambda policy: 0.02)
    assert len(json.dumps(values)) < 30_000

"""What is minimised, what is tried beside the policy, and that no policy is written that does not pay."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp import ExitPolicy
from offramp.calibration import (
    MEASURES,
    Certificate,
    Grid,
    Promise,
    Spent,
    calibrate,
    decoded,
    load,
    settings_of,
)
from offramp.calibration import (
    calibrate as pipeline,
)
from offramp.calibration.grid import chains_of, paths_of, plain_policies, static_layers_of
from offramp.calibration.promise import cost
from offramp.core.exits import Exits
from offramp.report import calibration as page
from offramp.report import drawing
from offramp.risk import search
from offramp.runs.digests import of as digest
from scripted_calibration import BASE, GRID, JOINT, TASK, Script, at_most, examples, model

PROMISE = Promise("f1", tolerance=0.1, failure=0.1)
SAFE = at_most({0.9: 0.0, 0.5: 0.0, 0.1: 0.6})


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(drawing, "available", lambda: False)

    def run(script, folder, count=200, promise=PROMISE, base=BASE, grid=GRID, lm=None, **options):
        monkeypatch.setattr(decoded, "decode_arms", script.together)
        options = {"resamples": 20, **options}
        return calibrate(lm or model(), TASK, examples(count), base, promise, folder, grid=grid, **options)

    return run


class Priced(Script):
    """Records whose prompt and tokens cost what a function of the policy says: (prompt, token, tokens)."""

    def __init__(self, truth, prices, **options):
        super().__init__(truth, **options)
        self.prices = prices

    def __call__(self, lm, task, examples, arm, policy, path, **options):
        prompt, token, tokens = (600, 40, 11) if policy is None else self.prices(policy)
        later = token * (tokens - (prompt > 0))
        return [
            replace(
                record, tokens=[1] * tokens, exit_layers=[3] * tokens, flops=prompt + later,
                parts={"encoder": 0, "blocks": later, "prefill": prompt},
            )
            for record in super().__call__(lm, task, examples, arm, policy, path, **options)
        ]  # fmt: skip


# ---------------------------------------------------------------- costs


def spent(amounts, counts):
    return Spent(np.array(amounts, dtype=float), np.array(counts, dtype=float))


def test_a_cost_is_a_ratio_of_sums():
    mine, full = spent([10, 90], [1, 9]), spent([40, 60], [2, 3])
    assert mine.over(full) == pytest.approx((100 / 10) / (100 / 5))
    assert mine.over(full, np.array([0, 0, 1])) == pytest.approx((110 / 11) / (140 / 7))
    assert spent([0, 0], [0, 0]).over(full) == 1  # nothing was generated, so nothing is saved


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 9))
def test_per_token_no_length_and_no_prompt_saves_anything(lengths, mine, theirs):
    script = Priced(lambda policy: 0.0, lambda policy: (100, mine, 5))
    made = script(None, None, examples(len(lengths)), "arm", BASE, PATH)
    full = [
        replace(r, tokens=[1] * (n + 1), flops=700 + n * theirs, parts={"encoder": 5, "blocks": n, "prefill": 695})
        for r, n in zip(made, lengths, strict=True)
    ]
    assert cost(made, full, "flops-per-token") == pytest.approx(mine / theirs)
    assert cost(made, full, "flops") == pytest.approx(
        sum(r.flops for r in made) / sum(700 + n * theirs for n in lengths)
    )


PATH = type("P", (), {"parent": type("Q", (), {"name": "certification"})})()


def test_seconds_of_arms_that_took_no_turns_are_no_cost():
    made = Script(lambda policy: 0.0)(None, None, examples(4), "arm", BASE, PATH)
    timed = [replace(r, seconds=2.0, prompt_seconds=1.0, round=float(i)) for i, r in enumerate(made)]
    full = [replace(r, seconds=4.0, prompt_seconds=1.0, round=float(i)) for i, r in enumerate(made)]
    assert cost(timed, full, "seconds") == 0.5
    assert cost(timed, full, "seconds-per-token") == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="not measured in turns"):
        cost(made, full, "seconds")


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("order", ["path", "chains", "pareto"])
def test_a_policy_that_does_not_pay_is_not_written(scripted, tmp_path, order):
    script = Script(lambda policy: 0.0, cost=lambda policy: 1.1 + policy.threshold / 10)
    result = scripted(script, tmp_path, order=order)
    certificate = load(tmp_path / "policy.json")
    assert ExitPolicy.load(tmp_path / "policy.json") == ExitPolicy(threshold=None) == result.policy
    assert not certificate.certified
    assert certificate.pays_nothing
    words = certificate.words()
    assert words.startswith("Nothing tried costs less than the full model in FLOPs per generated token")
    assert certificate.finding().endswith("the certified policy is: never exit")
    if order == "pareto":  # none is on the front of what pays, so no certification prompt is spent on any
        assert not certificate.tests
        assert [arm for part, arm in script.calls if part == "certification"] == ["full model"]
    else:
        assert "(the cheapest that keeps the promise, softmax > 0.1: 1.110)" in words
    shown = page.page(tmp_path, json.loads((tmp_path / "result.json").read_text()))
    assert "never exit" in str(shown)


def test_it_is_written_if_it_is_asked_for(scripted, tmp_path):
    script = Script(lambda policy: 0.0, cost=lambda policy: 1.1 + policy.threshold / 10)
    result = scripted(script, tmp_path, must_pay=False)
    assert result.policy.threshold == 0.1
    assert "COSTS MORE" in load(tmp_path / "policy.json").words()


def test_the_measure_decides(scripted, tmp_path):
    """At .9 tokens cost less, at .5 the whole does, whose prompts are shorter: (prompt, token, tokens)."""
    prices = {0.9: (600, 30, 11), 0.5: (100, 44, 11), 0.1: (100, 10, 11)}
    for minimise, chosen in (("flops-per-token", 0.9), ("flops", 0.5)):
        script = Priced(SAFE, lambda policy: prices[policy.threshold])
        result = scripted(script, tmp_path / minimise, minimise=minimise)
        assert result.policy.threshold == chosen
        certificate = load(tmp_path / minimise / "policy.json")
        assert certificate.minimise == minimise
        assert f"The cheapest in {MEASURES[minimise]} was taken" in certificate.words()
        test = certificate.tests[certificate.selected]
        assert (test["flops"], test["flops_per_token"]) == pytest.approx({0.9: (0.9, 0.75), 0.5: (0.54, 1.1)}[chosen])
        row = next(line for line in result.table().splitlines() if line.startswith(f"| softmax > {chosen} "))
        assert [cell.strip() for cell in row.split("|")][4:-1] == [
            f"{test['flops']:.3f}", f"{test['flops_per_token']:.3f}", "chosen"
        ]  # fmt: skip
    assert "prompts or lengths save" in certificate.words()


def test_seconds_need_a_tuning_part(scripted, tmp_path):
    with pytest.raises(ValueError, match="seconds are found on a tuning part"):
        scripted(Script(SAFE), tmp_path, minimise="seconds", tuning=0.0)
    with pytest.raises(ValueError, match="allowed are 'flops-per-token'"):
        scripted(Script(SAFE), tmp_path, minimise="joules")


def test_seconds_are_those_of_turns_on_the_tuning_part(tmp_path):
    from test_calibration import REAL, SHORT, questions

    result = pipeline(
        model(), TASK, questions(24), ExitPolicy(min_layer=2), REAL, tmp_path, grid=Grid((0.0, 1.0)),
        minimise="seconds-per-token", must_pay=False, **SHORT,
    )  # fmt: skip
    tuning = result.certificate.splits["tuning"][0]
    assert tuning == 7
    test = result.certificate.tests[result.certificate.selected]
    assert 0 < test["cost"] < 100
    assert result.certificate.estimates["test"]["seconds_per_token_ratio"]["value"] > 0  # answered in turns as well
    assert "measured in turns" in result.certificate.words()
    assert load(tmp_path / "policy.json").to_dict() == json.loads(json.dumps(result.certificate.to_dict()))
    rounds = {
        path.stem: [json.loads(line).get("round") for line in path.read_text().splitlines()[1:]]
        for path in (tmp_path / "records" / "tuning").glob("*.jsonl")
    }
    assert len(rounds) == 3
    assert len({tuple(r) for r in rounds.values()}) == 1


# ---------------------------------------------------------------- what is tried


def with_exits(layers=(1, 2, 3)):
    lm = model()
    lm.attach_exits(Exits.fresh(lm.split, layers))
    return lm


def test_a_few_of_the_trained_exits_are_tried_as_static_ones(scripted, tmp_path):
    assert static_layers_of(model()) == ()
    lm = with_exits()
    assert static_layers_of(lm) == (1, 2, 3)

    def truth(policy):
        return {3: 0.0, 2: 0.0, 1: 0.6}[policy.min_layer] if policy.confidence == "static" else 0.0

    def prices(policy):
        return policy.min_layer / 5 if policy.confidence == "static" else 0.7

    result = scripted(Script(truth, cost=prices), tmp_path, lm=lm)
    certificate = load(tmp_path / "policy.json")
    assert [test["name"] for test in certificate.tests if test["chain"] == 1] == ["static 3", "static 2", "static 1"]
    assert certificate.level == pytest.approx(0.05)  # two sequences
    assert result.policy == ExitPolicy("static", min_layer=2)
    none = scripted(Script(truth, cost=prices), tmp_path / "none", lm=lm, grid=replace(GRID, static_layers=()))
    assert none.certificate.level == 0.1
    crc = scripted(Script(truth, cost=prices), tmp_path / "crc", lm=lm, promise=Promise("f1", 0.1, bound="crc"))
    assert "static" not in str([test["name"] for test in crc.certificate.tests])
    with pytest.raises(ValueError, match="one sequence"):
        scripted(
            Script(truth), tmp_path / "crc2", lm=lm, promise=Promise("f1", 0.1, bound="crc"),
            grid=replace(GRID, static_layers=(2,)),
        )  # fmt: skip


def test_eight_trained_exits_are_thinned_and_the_deepest_stays():
    lm = type("L", (), {"split": type("S", (), {"exit_layers": (14, 16, 18, 20, 22, 24, 26, 28)})()})()
    assert static_layers_of(lm) == (16, 20, 24, 28)


def test_a_shortened_prompt_is_tried_alone_and_is_a_baseline(scripted, tmp_path):
    base = ExitPolicy(prompt_layer=2)

    def prices(policy):
        return (300, 40, 11) if policy.threshold is None else (300, 30, 11)

    script = Priced(lambda policy: 0.0, prices)
    result = scripted(script, tmp_path, base=base, grid=replace(GRID, static_layers=(3, 1)))
    names = [setting.name for setting in result.settings if setting.family == "plain"]
    assert names == ["prompt to 2", "static 3, prompt to 2", "static 1"]
    assert result.settings[-1].policy == ExitPolicy("static", min_layer=1)
    seen = load(tmp_path / "policy.json").estimates["test"]
    assert seen["flops_per_token_ratio"]["value"] == pytest.approx(30 / 40)
    assert seen["own_flops_per_token_ratio"]["value"] == pytest.approx(30 / 40)
    assert {arm for part, arm in script.calls if part == "test"} == {
        "full model", "prompt to 2", result.certificate.tests[result.certificate.selected]["name"]
    }  # fmt: skip
    assert "with the same shortened prompt and no exits" in result.certificate.words()


def test_pruning_and_skipped_layers_may_vary():
    grid = Grid((0.9, 0.5), vocabularies=(None, "fixed"), vocabulary_sizes=(20, 40), skipped=("propagate", "verify"))
    settings = settings_of(model(), BASE, grid)
    assert grid.chains(BASE) == len(chains_of(settings)) == 6  # (all, 40, 20) x (verify, propagate)
    assert [s.name for s in settings[:5:2]] == [
        "softmax > 0.9, all tokens, verify", "softmax > 0.9, all tokens, propagate",
        "softmax > 0.9, fixed, 40 kept, verify",
    ]  # fmt: skip
    assert {(s.policy.vocabulary, s.policy.vocabulary_size, s.policy.skipped) for s in settings} == {
        (kind, size, way) for kind, size in ((None, None), ("fixed", 40), ("fixed", 20))
        for way in ("verify", "propagate")
    }  # fmt: skip
    assert len({s.file_name for s in settings}) == len(settings) == grid.size(BASE) == 12
    (path,) = paths_of(settings)
    assert [settings[i].boldness for i in path] == sorted(s.boldness for s in settings)


def test_what_tests_nothing_drafts_where_the_policy_does():
    policies = plain_policies(ExitPolicy(skipped="verify", draft_length=3), (2,))
    assert policies == {"static 2": ExitPolicy("static", min_layer=2, skipped="verify", draft_length=3)}


# ---------------------------------------------------------------- what is believed


def signed(values):
    bare = {name: value for name, value in values.items() if name != "digest"}
    return {**bare, "digest": digest(bare)}


def test_a_certificate_of_the_second_version_is_read_and_holds(scripted, tmp_path):
    scripted(Script(SAFE), tmp_path)
    values = json.loads((tmp_path / "policy.json").read_text())["certificate"]
    before = {k: v for k, v in values.items() if k not in ("minimise", "must_pay")}
    before["schema"] = "offramp/certificate/2"
    before["grid"] = {k: values["grid"][k] for k in ("thresholds", "min_layers", "vocabulary_sizes", "per_layer")}
    before["tests"] = [{k: v for k, v in t.items() if not k.startswith("flops")} for t in values["tests"]]
    certificate = Certificate.from_dict(signed(before))
    assert certificate.to_dict() == signed(before)
    assert certificate.saves
    assert "lose at most 0.1" in certificate.words()
    assert certificate.mismatches(model()) == []
    assert page.page(tmp_path, {"certificate": signed(before), "words": "", "validation": None})


def test_costs_that_do_not_belong_to_the_measure_are_refused(scripted, tmp_path):
    scripted(Script(SAFE), tmp_path)
    values = json.loads((tmp_path / "policy.json").read_text())["certificate"]
    for change in (
        {"cost": 0.1}, {"cost": 1.2, "flops_per_token": 1.2},
        {"changes": {"confidence": "static", "min_layer": 1}, "name": "static 1"},
    ):  # fmt: skip
        tests = [{**t, **(change if i == values["selected"] else {})} for i, t in enumerate(values["tests"])]
        with pytest.raises(ValueError, match="changed or is damaged"):
            Certificate.from_dict(signed({**values, "tests": tests}))
    with pytest.raises(ValueError, match="changed or is damaged"):
        Certificate.from_dict(signed({**values, "must_pay": "yes", "minimise": "joules"}))


def test_repeated_calibrations_go_by_the_same_measure(scripted, tmp_path):
    prices = {0.9: (600, 30, 11), 0.5: (100, 44, 11), 0.1: (100, 10, 11)}
    result = scripted(Priced(SAFE, lambda policy: prices[policy.threshold]), tmp_path, repeats=20)
    assert result.validation.flops_ratio == pytest.approx(0.75)
    assert result.validation.chosen == {0: 20}
    assert "FLOPs per generated token 0.750 of the full model's" in result.validation.words()


def test_a_search_takes_nothing_that_costs_as_much():
    losses = {0: np.zeros(100), 1: np.zeros(100)}
    for costs, selected in (((1.0, 1.1), None), ((1.0, 0.99), 1)):
        for bound in (None, "crc"):
            outcome = search(
                [[0, 1]], losses.__getitem__, costs.__getitem__, Promise("f1", 0.1, 0.1, bound=bound), below=1.0
            )
            assert outcome.selected == selected
            assert all(test.passed for test in outcome.tests)


def test_the_order_joint_with_statics_is_read(scripted, tmp_path):
    for order in ("path", "chains", "pareto"):
        result = scripted(
            Script(lambda policy: 0.02), tmp_path / order, lm=with_exits(), grid=JOINT, order=order, count=400
        )
        assert load(tmp_path / order / "policy.json").to_dict() == json.loads(json.dumps(result.certificate.to_dict()))

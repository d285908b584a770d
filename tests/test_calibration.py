"""The whole way from examples to a certified policy, with scripted answers and with a tiny model."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offramp import ExitPolicy
from offramp.calibration import Grid, Promise, Spent, calibrate, decoded, load, validate
from offramp.calibration.decoded import divide, sizes
from offramp.evaluation.record_file import read_records
from offramp.report import drawing
from offramp.risk import hoeffding_bentkus, pareto_front, search
from offramp.tasks import Example, split_groups
from scripted_calibration import BASE, GRID, JOINT, TASK, Script, at_most, examples, model

PROMISE = Promise("f1", tolerance=0.1, failure=0.1)


@pytest.fixture
def scripted(monkeypatch):
    """Calibrate with scripted answers, without pictures."""
    monkeypatch.setattr(drawing, "available", lambda: False)
    lm = model()

    def run(script, folder, count=200, promise=PROMISE, base=BASE, grid=GRID, **options):
        monkeypatch.setattr(decoded, "decode_arms", script.together)
        options = {"resamples": 20, **options}
        return calibrate(lm, TASK, examples(count), base, promise, folder, grid=grid, **options)

    return run


# ---------------------------------------------------------------- what is chosen


def test_the_last_setting_that_passes_is_chosen_and_no_later_one_is_decoded(scripted, tmp_path):
    script = Script(at_most({0.9: 0.0, 0.7: 0.01, 0.5: 0.4, 0.3: 0.0, 0.1: 0.0}))
    result = scripted(script, tmp_path, grid=Grid((0.1, 0.5, 0.9, 0.3, 0.7)))
    assert [(test["name"], test["passed"]) for test in result.certificate.tests] == [
        ("softmax > 0.9", True), ("softmax > 0.7", True), ("softmax > 0.5", False),
    ]  # fmt: skip
    assert result.policy.threshold == 0.7
    asked = [arm for part, arm in script.calls if part == "certification"]
    assert asked == ["full model", "softmax > 0.9", "softmax > 0.7", "softmax > 0.5"]
    assert [arm for part, arm in script.calls if part == "test"] == ["full model", "softmax > 0.7"]
    assert ExitPolicy.load(tmp_path / "policy.json") == result.policy


def test_p_values_are_those_of_the_losses(scripted, tmp_path):
    script = Script(at_most({0.9: 0.02, 0.5: 0.3, 0.1: 0.5}))
    result = scripted(script, tmp_path)
    part = divide(examples(200), tuning=0, test=0.25, seed=0)["certification"]
    path = tmp_path / "records" / "certification" / "x.jsonl"
    for threshold, test in zip((0.9, 0.5), result.certificate.tests, strict=True):
        records = script(None, None, part, f"softmax > {threshold}", ExitPolicy(threshold=threshold), path)
        losses = [1 - record.scores["f1"] for record in records]
        assert test["loss"] == pytest.approx(np.mean(losses))
        assert test["p_value"] == pytest.approx(hoeffding_bentkus(losses, 0.1))


def test_nothing_certified_means_never_exit(scripted, tmp_path):
    result = scripted(Script(at_most({0.9: 0.08, 0.5: 0.0, 0.1: 0.0})), tmp_path)
    assert result.policy == ExitPolicy(threshold=None) == ExitPolicy.load(tmp_path / "policy.json")
    certificate = load(tmp_path / "policy.json")
    assert not certificate.certified
    assert len(certificate.tests) == 1
    needed = certificate.needed
    assert needed > certificate.n
    assert f"about {needed} certification prompts" in certificate.words()
    assert certificate.estimates["test"]["flops_ratio"]["value"] == 1.0


def test_what_betting_needs_is_told_by_the_losses_themselves(scripted, tmp_path):
    script = Script(
        at_most({0.9: 0.085, 0.5: 0.0, 0.1: 0.0}), draw=lambda rng, mean, count: rng.beta(2, 2 / mean - 2, count)
    )
    promise = Promise("f1", 0.1, 0.1, bound="wsr")
    certificate = scripted(script, tmp_path, count=60, promise=promise).certificate
    mean = certificate.tests[0]["loss"]
    assert certificate.n < certificate.needed < promise.needed(0.1, mean) / 3  # as if losses were 0 or 1
    assert f"losses stay as they are (lowest mean: {mean:.3g}), about {certificate.needed} certification prompts" in (
        certificate.words()
    )


def test_a_mean_a_hair_below_the_tolerance_is_not_said_to_be_above_it(scripted, tmp_path):
    script = Script(lambda policy: 0.0999999, draw=lambda rng, mean, count: np.full(count, mean))
    certificate = scripted(script, tmp_path, promise=replace(PROMISE, bound="hoeffding")).certificate
    assert "no reasonable number of prompts" in certificate.words()


def test_if_no_number_of_prompts_would_do_it_says_so(scripted, tmp_path):
    certificate = scripted(Script(at_most({0.9: 0.6, 0.5: 0.0, 0.1: 0.0})), tmp_path).certificate
    assert certificate.needed is None
    assert "No number of prompts" in certificate.words()


@pytest.mark.parametrize(
    ("loss", "said"), [(0.15, "0.05 above the tolerance, and"), (0.098, "0.002 below the tolerance, but")]
)
@pytest.mark.parametrize("bound", ["hoeffding", "crc"])
def test_where_nothing_is_certified_it_says_what_the_nearest_setting_fails_by(scripted, tmp_path, loss, said, bound):
    script = Script(lambda policy: loss, draw=lambda rng, mean, count: np.full(count, mean))
    certificate = scripted(script, tmp_path, promise=replace(PROMISE, bound=bound)).certificate
    n, tolerance = certificate.n, PROMISE.tolerance
    made, most = math.exp(-2 * n * max(tolerance - loss, 0) ** 2), certificate.level
    if bound == "crc":
        made, most = (n * loss + 1) / (n + 1), tolerance
    words = certificate.words()
    assert f"its mean loss, {loss:g}, is {said} the bound {bound} " in words
    assert f"{made:.3g}" in words
    assert f"has to be at most {most:g}." in words


def test_the_cheapest_of_those_that_pass_is_chosen(scripted, tmp_path):
    result = scripted(
        Script(lambda policy: 0.0, cost=lambda policy: {0.9: 0.8, 0.5: 0.4, 0.1: 0.6}[policy.threshold]), tmp_path
    )
    assert [test["passed"] for test in result.certificate.tests] == [True] * 3
    assert result.policy.threshold == 0.5


def test_chains_divide_the_failure_probability(scripted, tmp_path):
    truth = {(3, 0.9): 0.0, (3, 0.5): 0.0, (2, 0.9): 0.0, (2, 0.5): 0.9, (1, 0.9): 0.9, (1, 0.5): 0.0}
    script = Script(lambda policy: truth[policy.min_layer, policy.threshold])
    result = scripted(script, tmp_path, grid=JOINT, order="chains")
    assert result.certificate.level == pytest.approx(0.1 / 3)
    passed = {test["name"] for test in result.certificate.tests if test["passed"]}
    assert passed == {"softmax > 0.9, from 3", "softmax > 0.5, from 3", "softmax > 0.9, from 2"}
    assert "softmax > 0.5, from 1" not in [arm for _, arm in script.calls]
    assert (result.policy.min_layer, result.policy.threshold) == (3, 0.5)


def test_pareto_orders_by_the_tuning_part_alone(scripted, tmp_path):
    script = Script(lambda policy: 0.01 * policy.min_layer + 0.3 * (policy.threshold < 0.6))
    result = scripted(script, tmp_path, count=600, grid=JOINT)
    certificate = result.certificate
    assert certificate.order == "pareto"  # chosen by itself: several minimum layers, enough examples
    tuning = divide(examples(600), tuning=0.3, test=0.25, seed=0)["tuning"]
    means, costs = [], []
    for setting in result.settings:
        records = script(None, None, tuning, setting.name, setting.policy, tmp_path / "tuning" / "x")
        means.append(np.mean([1 - record.scores["f1"] for record in records]))
        costs.append(np.mean([record.flops for record in records]))
    front = [result.settings[i].name for i in pareto_front(means, costs)]
    tested = [test["name"] for test in certificate.tests]
    assert tested == front[: len(tested)]
    assert certificate.splits == {"tuning": [180, 180], "certification": [270, 270], "test": [150, 150]}


def test_conformal_risk_control_stops_at_the_tolerance(scripted, tmp_path):
    promise = Promise("f1", 0.1, bound="crc")
    result = scripted(Script(at_most({0.9: 0.02, 0.5: 0.06, 0.1: 0.5})), tmp_path, promise=promise)
    certificate = result.certificate
    assert result.policy.threshold == 0.5
    assert certificate.tests[0]["p_value"] == pytest.approx((certificate.tests[0]["loss"] * 150 + 1) / 151)
    assert "no failure probability" in certificate.words()
    assert certificate.to_dict()["promise"]["failure"] is None
    assert load(tmp_path / "policy.json").to_dict() == json.loads(json.dumps(certificate.to_dict()))


def test_static_exits_are_tried_from_the_deepest(scripted, tmp_path):
    base, grid = ExitPolicy("static", min_layer=3), Grid(min_layers=(1, 3, 2))
    script = Script(lambda policy: {3: 0.0, 2: 0.0, 1: 0.5}[policy.min_layer], cost=lambda policy: policy.min_layer / 4)
    result = scripted(script, tmp_path, base=base, grid=grid)
    assert result.policy == ExitPolicy("static", min_layer=2)
    assert result.certificate.estimates["test"]["flops_ratio"]["value"] == 0.5


# ---------------------------------------------------------------- before anything is decoded


@pytest.mark.parametrize(
    ("promise", "options", "needed"),
    [
        (Promise("f1"), {}, 59),
        (Promise("f1", bound="hoeffding"), {}, 600),
        (Promise("f1", kind="tail", margin=0.1), {}, 59),
        (Promise("f1", bound="crc"), {}, 19),
        (Promise("f1"), {"order": "chains", "grid": JOINT}, math.ceil(math.log(0.05 / 3) / math.log(0.95))),
    ],
)
def test_too_few_examples_are_refused_with_the_number_that_is_needed(scripted, tmp_path, promise, options, needed):
    script = Script(lambda policy: 0.0)
    with pytest.raises(ValueError, match=f"needs at least {needed} even if none loses anything"):
        scripted(script, tmp_path, count=needed - 1, promise=promise, test=0.0, **options)
    assert not script.calls
    scripted(script, tmp_path, count=needed, promise=promise, test=0.0, **options)


def test_groups_count_once_if_they_are_what_is_independent(scripted, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "decode_arms", Script(lambda policy: 0.0).together)
    promise, lm = Promise("f1", unit="group"), model()
    with pytest.raises(ValueError, match="58 groups are too few"):
        calibrate(lm, TASK, examples(290, per_group=5), BASE, promise, tmp_path, grid=GRID, test=0.0)
    result = calibrate(lm, TASK, examples(295, per_group=5), BASE, promise, tmp_path, grid=GRID, test=0.0, resamples=20)
    assert (result.certificate.n, result.certificate.splits["certification"]) == (59, [295, 59])


def test_the_mean_loss_of_groups_has_an_interval_of_groups(tmp_path, monkeypatch):
    # Groups of one that lose little and groups of nine that lose more: by prompts 0.18 is lost, by groups 0.1.
    lm, promise = model(), Promise("f1", 0.4, 0.4, unit="group")
    made = [Example(f"q{i}", "s", ("blue",), f"g{i // 9}" if i < 450 else f"h{i}", "why") for i in range(500)]
    script = Script(lambda policy: 0.2, draw=lambda rng, mean, count: np.repeat([mean, 0.0], [450, 1550]))
    monkeypatch.setattr(decoded, "decode_arms", script.together)
    result = calibrate(lm, TASK, made, BASE, promise, tmp_path, grid=Grid((0.5,)), test=0.0, resamples=500)
    loss = result.certificate.estimates["certification"]["loss"]
    assert loss["value"] == pytest.approx(0.1)
    spread = 1.96 * 0.1 / math.sqrt(100)  # half of 100 groups lose 0.2, the others nothing
    assert loss["low"] == pytest.approx(0.1 - spread, abs=0.005)
    assert loss["high"] == pytest.approx(0.1 + spread, abs=0.005)
    assert "the mean of their groups' mean losses was 0.1" in result.certificate.words()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"promise": Promise("rougeL")}, "question-answering has f1, exact_match"),
        ({"order": "best"}, "allowed are 'auto', 'path', 'chains', 'pareto'"),
        ({"order": "chains", "promise": Promise("f1", bound="crc")}, "use path or pareto"),
        ({"repeats": 5, "test": 0.0}, "need a held-out part"),
        ({"order": "pareto", "tuning": 0.0}, "give it a share"),
        ({"tuning": 0.5, "test": 0.5}, "leave some to certify"),
        ({"grid": Grid(vocabulary_sizes=(20,))}, "does not prune"),
        ({"grid": Grid(min_layers=(4,))}, "layers 1..3"),
        ({"grid": Grid((1.5,))}, "threshold is 1.5"),
        ({"base": ExitPolicy("static", min_layer=2)}, "minimum layers only"),
    ],
)
def test_what_cannot_be_certified_is_refused(scripted, tmp_path, options, message):
    script = Script(lambda policy: 0.0)
    with pytest.raises(ValueError, match=message):
        scripted(script, tmp_path, **options)
    assert not script.calls


# ---------------------------------------------------------------- parts


@given(
    st.integers(6, 60), st.integers(1, 4), st.sampled_from([0, 0.2, 0.3]), st.sampled_from([0, 0.2, 0.4]), st.integers()
)
def test_no_group_is_in_two_parts_and_no_example_is_lost(count, per_group, tuning, test, seed):
    made = examples(count * per_group, per_group)
    parts = divide(made, tuning=tuning, test=test, seed=seed)
    groups = [{example.group for example in part} for part in parts.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert sorted(e.id for part in parts.values() for e in part) == sorted(e.id for e in made)
    assert bool(parts["tuning"]) == bool(tuning)
    assert sizes(parts)["certification"][0] == len(parts["certification"])


def test_a_group_in_two_parts_would_be_noticed():
    one = Example("a", "s", ("r",), "g")
    with pytest.raises(ValueError, match="in two parts"):
        sizes({"tuning": [one], "certification": [Example("b", "s", ("r",), "g")]})


# ---------------------------------------------------------------- search and validation, on numbers


@given(
    st.lists(st.floats(0, 0.3), min_size=1, max_size=8), st.integers(0, 10**6), st.sampled_from(["wsr", "crc", None])
)
def test_only_settings_before_the_first_failure_are_looked_at(means, seed, bound):
    rng = np.random.default_rng(seed)
    losses = [(rng.random(120) < mean).astype(float) for mean in means]
    asked = []

    def look(setting):
        asked.append(setting)
        return losses[setting]

    order = rng.permutation(len(means)).tolist()
    outcome = search([order], look, lambda s: rng.random(), Promise("f1", 0.1, 0.1, bound=bound))
    assert asked == order[: len(asked)] == [test.setting for test in outcome.tests]
    assert all(test.passed for test in outcome.tests[:-1])
    assert len(asked) == len(order) or not outcome.tests[-1].passed
    passed = [test.setting for test in outcome.tests if test.passed]
    assert outcome.selected in passed if passed else outcome.selected is None


def pool_of(count, ones):
    """A pool, and losses of three settings: never any, `ones` of them, all of them."""
    some = np.zeros(count)
    some[np.random.default_rng(3).permutation(count)[:ones]] = 1.0
    return examples(count), [np.zeros(count), some, np.ones(count)], np.full(count, 100.0)


@pytest.mark.parametrize(("count", "ones", "share"), [(300, 32, 0.5), (200, 21, 0.75)])
def test_repeated_calibrations_break_the_promise_as_often_as_counting_says(count, ones, share):
    # The pool loses a little more than the tolerance under one setting, which few ones among those drawn certify.
    made, losses, full = pool_of(count, ones)
    promise, n = Promise("f1", 0.1, 0.2, kind="tail", margin=0.0), round(count * share)
    result = repeated(
        made, losses, [full * c for c in (0.9, 0.5, 0.2)], full, [[0, 1, 2]], promise, share=share, repeats=2000
    )
    most = max(k for k in range(n) if stats.binom.cdf(k, n, 0.1) <= 0.2)
    near = {"drawn": stats.binom.cdf(most, n, ones / count), "split": stats.hypergeom.cdf(most, count, ones, n)}
    slack = {way: 5 * math.sqrt(2000 * p * (1 - p)) for way, p in near.items()}
    assert near["drawn"] > near["split"] + (slack["drawn"] + slack["split"]) / 2000  # the two are told apart
    assert result.drawn == n
    assert abs(result.exceeded_population - 2000 * near["drawn"]) < slack["drawn"]
    assert result.exceeded_population <= 0.2 * 2000
    assert result.loss_population == pytest.approx(ones / count * result.exceeded_population / 2000)
    # A split that is lucky in certifying always leaves more than its share to the other half.
    assert abs(result.exceeded_held_out - 2000 * near["split"]) < slack["split"]
    assert result.chosen == {0: 2000 - result.exceeded_held_out, 1: result.exceeded_held_out}
    assert result.flops_ratio == pytest.approx((0.9 * result.chosen[0] + 0.5 * result.chosen[1]) / 2000)
    words = result.words()
    assert f"2000 calibrations by {n} prompts drawn with replacement from the pool of {count} prompts" in words
    assert f"mean loss of the pool above 0.1: {result.exceeded_population} of 2000" in words
    assert f"mean loss of the held-out part above 0.1: {result.exceeded_held_out} of 2000" in words


def repeated(made, losses, flops, full, *given, **options):
    """FLOPs of each setting and of the full model, per prompt."""
    ones = np.ones(len(made))
    return validate(made, losses, [Spent(some, ones) for some in flops], Spent(full, ones), *given, **options)


def test_a_bound_that_halves_its_p_values_is_found(monkeypatch):
    made, losses, full = pool_of(200, 21)
    promise = Promise("f1", 0.1, 0.2, kind="tail", margin=0.0)
    honest = promise.bound_at(0.2)
    monkeypatch.setattr(Promise, "bound_at", lambda self, level: lambda *given: honest(*given) / 2)
    costs = [full * c for c in (0.9, 0.5, 0.2)]
    result = repeated(made, losses, costs, full, [[0, 1, 2]], promise, share=0.75, repeats=1000)
    assert result.to_dict()["exceeded_population_interval"][0] > 0.2
    assert type(result).from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_groups_are_drawn_whole_and_count_once():
    # 4 groups of nine prompts that lose 1, 36 of one that loses nothing: half is lost by prompts, a tenth by groups.
    made = [Example(f"q{i}", "s", ("r",), f"g{i // 9}" if i < 36 else f"h{i}", "why") for i in range(72)]
    losses, full = [np.array([1.0] * 36 + [0.0] * 36)], np.ones(72)
    options = {"share": 0.5, "repeats": 400}
    promise = Promise("f1", 0.09, 0.2, bound="wsr", unit="group")
    result = repeated(made, losses, [full / 2], full, [[0]], promise, **options)
    assert result.drawn == 20
    assert result.loss_population == pytest.approx(0.1 * result.exceeded_population / 400)
    assert 0 < result.exceeded_population < 0.2 * 400
    roomy = repeated(made, losses, [full / 2], full, [[0]], replace(promise, tolerance=0.101), **options)
    assert roomy.exceeded_population == 0


def test_conformal_risk_control_keeps_its_mean_over_draws_with_replacement():
    made, _, full = pool_of(100, 0)
    rows = np.random.default_rng(0).random(100)
    losses = [(rows < mean).astype(float) for mean in (0.02, 0.05, 0.08, 0.12, 0.3)]
    promise = Promise("f1", 0.1, bound="crc")
    costs = [full * c for c in (0.9, 0.8, 0.6, 0.4, 0.2)]
    result = repeated(made, losses, costs, full, [[0, 1, 2, 3, 4]], promise, share=0.5, repeats=1000)
    assert 0.05 < result.loss_population <= 0.1
    assert result.exceeded_population > 0  # single calibrations may exceed it
    assert f"on average {result.loss_population:.3g} (promised: at most 0.1)" in result.words()


def test_validation_finds_a_bound_that_lies_and_counts_what_certifies_nothing(monkeypatch):
    made, losses, full = pool_of(200, 0)
    options = {"share": 0.5, "repeats": 20}
    honest = repeated(made, losses, [full] * 3, full, [[2]], PROMISE, **options)
    assert (honest.uncertified, honest.uncertified_drawn, honest.exceeded_population) == (20, 20, 0)
    assert (honest.loss, honest.loss_population, honest.flops_ratio) == (0.0, 0.0, 1.0)
    monkeypatch.setattr(Promise, "bound_at", lambda self, level: lambda losses, tolerance: 0.0)
    liar = repeated(made, losses, [full, full, full / 2], full, [[0, 1, 2]], PROMISE, **options)
    assert (liar.exceeded_population, liar.exceeded_held_out) == (20, 20)
    assert liar.to_dict()["exceeded_population_interval"][0] > 0.8


def test_validation_of_a_run_uses_all_settings_and_its_own_numbers(scripted, tmp_path):
    script = Script(at_most({0.9: 0.0, 0.5: 0.02, 0.1: 0.6}))
    result = scripted(script, tmp_path, repeats=50)
    assert {call for call in script.calls if call[0] == "test"} == {
        ("test", arm) for arm in ("full model", "softmax > 0.9", "softmax > 0.5", "softmax > 0.1")
    }
    assert result.validation.repeats == 50
    assert result.validation.chosen.get(2) is None
    assert (
        json.loads((tmp_path / "result.json").read_text())["validation"]["schema"] == "offramp/calibrate-validation/2"
    )
    parts = split_groups(examples(200), [0.75, 0.25], 0)
    assert result.validation.certifying == result.validation.drawn == len(parts[0])


# ---------------------------------------------------------------- a tiny model


SHORT = {"max_new_tokens": 4, "resamples": 50}
REAL = Promise("f1", 0.3, 0.3, kind="textual")


def questions(count):
    return [Example(f"q{i}", f"w{20 + i} the sky w{30 + i}", (f"w{i + 40}",), f"g{i}", "why ?") for i in range(count)]


def test_an_interrupted_calibration_goes_on(tmp_path):
    lm, made = model(), questions(16)
    grid = Grid((1.0, 0.5))

    def run(folder, **options):
        return calibrate(lm, TASK, made, ExitPolicy(min_layer=2), REAL, folder, grid=grid, **SHORT, **options)

    class Killed(Exception):
        pass

    def kill(done, total, what):
        if done == 17:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "a", progress=kill)
    (half,) = (tmp_path / "a" / "records" / "certification").glob("softmax*")
    before = read_records(half)[1]
    assert 0 < len(before) < 12
    again, whole = run(tmp_path / "a"), run(tmp_path / "b")
    assert again.certificate == whole.certificate  # in which there are no seconds
    assert read_records(half)[1][: len(before)] == before  # seconds included: not made again
    with pytest.raises(ValueError, match="made otherwise"):
        calibrate(lm, TASK, made, ExitPolicy(min_layer=2), REAL, tmp_path / "a", grid=grid, seed=1, **SHORT)


def test_a_threshold_that_lets_nothing_leave_costs_more_than_the_full_model_and_says_so(tmp_path):
    grid = Grid((1.0,))
    result = calibrate(
        model(), TASK, questions(16), ExitPolicy(min_layer=2), REAL, tmp_path, grid=grid, must_pay=False, **SHORT
    )
    seen = result.certificate.estimates["test"]
    assert seen["loss"]["value"] == 0.0
    assert seen["identical"]["value"] == 1.0
    assert seen["flops_ratio"]["value"] > 1
    assert "COSTS MORE than the full model" in result.certificate.words()
    assert {path.name for path in tmp_path.iterdir()} >= {
        "config.json", "policy.json", "result.json", "calibrate.svg", "calibrate.png", "records",
    }  # fmt: skip

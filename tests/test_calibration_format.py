"""Calibrations against the full model in another number format: never exiting then has to be certified, too."""

import copy
import json

import pytest

from offramp import ExitPolicy, LanguageModel
from offramp.calibration import Grid, Promise, calibrate, decoded, load
from offramp.calibration.grid import FULL_DEPTH
from offramp.evaluation.record_file import read_records
from offramp.report import drawing
from scripted_calibration import BASE, TASK, Script, examples, model
from test_calibration import REAL, SHORT, questions
from tiny import tiny, tokenizer

GRID = Grid((0.9, 0.5), static_layers=())
PROMISE = Promise("f1", 0.1, 0.1)


def in_format(**options):
    return LanguageModel(tiny("llama"), tokenizer(), name="tiny", **options)


def int8():
    return in_format(engine="native", rounded="int8")


def scripted(monkeypatch, tmp_path, loss, per_group=1, **options):
    """A calibration whose mean losses are those that `loss` says of a policy's threshold; None: full depth."""
    monkeypatch.setattr(drawing, "available", lambda: False)
    script = Script(lambda policy: loss[policy.threshold], cost=lambda policy: policy.threshold or 0.95)
    monkeypatch.setattr(decoded, "decode_arms", script.together)
    options = {"grid": GRID, "resamples": 20, "reference": model(), **options}
    return calibrate(int8(), TASK, examples(600, per_group), BASE, PROMISE, tmp_path, **options)


def test_answers_of_the_full_model_are_those_of_the_reference(tmp_path):
    lm, reference = int8(), in_format(engine="native")
    result = calibrate(lm, TASK, questions(16), BASE, REAL, tmp_path, grid=Grid((1.0,)), reference=reference, **SHORT)
    certificate = result.certificate
    assert certificate.conditions["dtype"] == "int8, native"
    assert certificate.reference.startswith("the full model in float32, native: the same weights")
    kept = {path.name: read_records(path) for path in (tmp_path / "records" / "certification").iterdir()}
    assert kept["full-model.jsonl"][0]["dtype"] == "float32, native"
    assert kept["full-depth.jsonl"][0]["dtype"] == "int8, native"
    assert kept["full-depth.jsonl"][0]["policy"]["threshold"] is None
    for name, own in (("full-model.jsonl", reference), ("full-depth.jsonl", lm)):
        for record in kept[name][1]:
            example = next(e for e in questions(16) if e.id == record.id)
            prompts = TASK.prompts(own, [example])
            assert own.generate(prompts, max_new_tokens=SHORT["max_new_tokens"]).tokens[0] == record.tokens


@pytest.mark.parametrize(
    ("loss", "name", "threshold"),
    [
        ({0.9: 0.0, 0.5: 0.5, None: 0.0}, "softmax > 0.9", 0.9),
        ({0.9: 0.5, 0.5: 0.5, None: 0.0}, FULL_DEPTH, None),
    ],
)
def test_full_depth_is_certified_like_anything_else(monkeypatch, tmp_path, loss, name, threshold):
    result = scripted(monkeypatch, tmp_path, loss)
    certificate = result.certificate
    assert certificate.certified
    assert certificate.tests[certificate.selected]["name"] == name
    assert result.policy.threshold == threshold
    assert certificate.tests[0]["name"] == FULL_DEPTH  # the safest comes first, and costs no share of the failure
    assert certificate.level == PROMISE.failure
    means = "by working in int8, native" if name == FULL_DEPTH else "by leaving early and by working in int8, native"
    assert f"on average {means}, where" in certificate.words()
    assert load(tmp_path / "policy.json").to_dict() == json.loads(json.dumps(certificate.to_dict()))
    assert not certificate.mismatches(int8(), policy=result.policy)


@pytest.mark.parametrize("order", ["path", "chains", "pareto"])
@pytest.mark.parametrize("lost", [0.0, 0.5])
def test_a_number_format_is_certified_alone(monkeypatch, tmp_path, order, lost):
    options = {"grid": Grid((), static_layers=()), "order": order, "tuning": 0.2}
    result = scripted(monkeypatch, tmp_path, {None: lost}, **options)
    assert [setting.name for setting in result.settings] == [FULL_DEPTH]
    assert result.policy.threshold is None
    assert result.certificate.certified is (lost == 0)
    assert result.certificate.level == PROMISE.failure
    if order == "path" and not lost:
        words = result.certificate.words()
        assert "on average by working in int8, native, where" in words
        assert "One setting was tested, full depth, bound hoeffding-bentkus; it passed." in words


def test_static_exits_are_certified_alone_behind_full_depth(monkeypatch, tmp_path):
    grid = Grid((), static_layers=(2, 3))
    result = scripted(monkeypatch, tmp_path, {None: 0.0, 0.9: 0.0}, grid=grid)
    assert [setting.name for setting in result.settings] == [FULL_DEPTH, "static 3", "static 2"]
    assert result.certificate.tests[0]["name"] == FULL_DEPTH
    assert result.certificate.level == PROMISE.failure  # one sequence


def test_where_nothing_is_left_to_try_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="nothing is tried: no threshold, static exit or shorter prompt"):
        calibrate(model(), TASK, questions(16), BASE, REAL, tmp_path, grid=Grid((), static_layers=()), **SHORT)
    options = {"grid": Grid((), static_layers=(), per_layer=True), "tuning": 0.3, "reference": model(), **SHORT}
    with pytest.raises(ValueError, match="shares per layer and accepts are of nothing"):
        calibrate(int8(), TASK, questions(16), BASE, REAL, tmp_path, **options)
    options |= {"grid": Grid((), (1, 2), static_layers=())}
    with pytest.raises(ValueError, match="are of nothing, as are minimum layers"):
        calibrate(int8(), TASK, questions(16), BASE, REAL, tmp_path, **options)


def test_of_one_setting_it_is_said_too_that_groups_were_taken_to_be_independent(monkeypatch, tmp_path):
    grid = Grid((), static_layers=())
    words = scripted(monkeypatch, tmp_path, {None: 0.0}, per_group=2, grid=grid).certificate.words()
    assert "One setting was tested, full depth" in words
    assert "groups and were taken to be independent" in words


def test_where_full_depth_loses_too_much_it_is_not_called_the_full_model(monkeypatch, tmp_path):
    certificate = scripted(monkeypatch, tmp_path, {0.9: 0.5, 0.5: 0.5, None: 0.5}).certificate
    assert not certificate.certified
    words = certificate.words()
    assert "still in int8, native: not the full model" in words
    assert "is the full model" not in words
    assert "full depth included" in certificate.finding()
    assert certificate.mismatches(int8(), policy=ExitPolicy(threshold=None)) == [
        "nothing was certified, not even full depth in int8, native"
    ]


def test_where_nothing_costs_less_it_says_less_than_what(monkeypatch, tmp_path):
    monkeypatch.setattr(Script, "_record", _dear(Script._record))
    certificate = scripted(monkeypatch, tmp_path, {0.9: 0.0, 0.5: 0.0, None: 0.0}).certificate
    assert certificate.pays_nothing
    assert certificate.finding() == (
        "nothing that was tried in int8, native, full depth included, costs less than the full model"
    )


def _dear(record):
    def made(self, example, arm, loss, flops):
        return record(self, example, arm, loss, flops if arm == "full model" else 1200)

    return made


def test_a_reference_has_to_be_the_same_model_in_another_format(tmp_path):
    call = {"grid": Grid((0.9,)), **SHORT}
    with pytest.raises(ValueError, match="the reference is in float32, native as the model is"):
        calibrate(model(), TASK, questions(16), BASE, REAL, tmp_path, reference=model(), **call)
    changed = copy.deepcopy(tiny("llama"))
    changed.lm_head.weight.data[0] += 1  # of the same shape, with other weights
    for other in (tiny("gpt2"), changed):
        reference = LanguageModel(other, tokenizer(), engine="torch")
        with pytest.raises(ValueError, match="another model"):
            calibrate(model(), TASK, questions(16), BASE, REAL, tmp_path, reference=reference, **call)
    in_half = LanguageModel(copy.deepcopy(tiny("llama")).half(), tokenizer(), engine="torch")
    calibrate(model(), TASK, questions(16), BASE, REAL, tmp_path / "half", reference=in_half, **call)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]

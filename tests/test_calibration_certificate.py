"""Certificates: in a file, in words, and when they do not apply; and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from offramp import ExitPolicy, LanguageModel, cli
from offramp.calibration import Certificate, Promise, calibrate, decoded, load
from offramp.calibration.statement import COSTS_MORE, UNSURE, limit_words
from offramp.core.exits import Exits
from offramp.report import calibration as page
from offramp.report import drawing
from offramp.runs.resume import write_lines
from offramp.tasks import TASKS
from scripted_calibration import BASE, GRID, TASK, Script, at_most, examples, model
from tiny import tiny, tokenizer


def certified(monkeypatch, folder, promise=None, **options):
    monkeypatch.setattr(drawing, "available", lambda: False)
    monkeypatch.setattr(decoded, "decode_arms", Script(at_most({0.9: 0.0, 0.5: 0.0, 0.1: 0.9})).together)
    promise = promise or Promise("f1", 0.1, 0.1)
    options = {"grid": GRID, "resamples": 20, "batch_size": 2, "max_new_tokens": 5, **options}
    return calibrate(model(), TASK, examples(200), BASE, promise, folder, **options).certificate


# ---------------------------------------------------------------- files


def test_policy_and_certificate_stand_in_one_file(monkeypatch, tmp_path):
    certificate = certified(monkeypatch, tmp_path)
    path = tmp_path / "policy.json"
    assert ExitPolicy.load(path) == ExitPolicy(threshold=0.5)
    assert load(path).to_dict() == json.loads(json.dumps(certificate.to_dict()))
    assert cli.options.policy_from(path) == ExitPolicy(threshold=0.5)
    ExitPolicy().save(tmp_path / "plain.json")
    assert load(tmp_path / "plain.json") is None


def test_a_certificate_of_another_version_is_refused(monkeypatch, tmp_path):
    certified(monkeypatch, tmp_path)
    path = tmp_path / "policy.json"
    values = json.loads(path.read_text())
    for change in ({"schema": "offramp/certificate/9"}, {"extra": 1}):
        path.write_text(json.dumps(values | {"certificate": values["certificate"] | change}))
        with pytest.raises(ValueError, match="calibrate again"):
            load(path)


def test_it_says_what_it_rests_on(monkeypatch, tmp_path):
    certificate = certified(monkeypatch, tmp_path)
    values = certificate.to_dict()
    assert (values["n"], values["seed"], values["order"], values["level"]) == (150, 0, "path", 0.1)
    assert values["promise"] == {
        "metric": "f1", "tolerance": 0.1, "failure": 0.1, "kind": "risk", "margin": None, "bound": "hoeffding-bentkus",
        "unit": "prompt",
    }  # fmt: skip
    assert values["splits"] == {"tuning": [0, 0], "certification": [150, 150], "test": [50, 50]}
    assert [test["passed"] for test in values["tests"]] == [True, True, False]
    assert values["tests"][values["selected"]]["knob"] == 0.5
    assert values["conditions"]["settings"] == {"max_new_tokens": 5}
    assert values["conditions"]["task"]["instruction"] == TASK.instruction
    assert len(values["data"]["sha256"]) == 64
    assert values["versions"]["torch"] == torch.__version__
    test = values["estimates"]["test"]
    assert 0 == test["loss"]["value"] < test["upper"] < 0.1
    assert sum(test["histogram"]) == 50
    assert "upper" not in values["estimates"]["certification"]  # which took part in the choice


@pytest.mark.parametrize(
    ("options", "phrases"),
    [
        ({}, ["lose at most 0.1 of f1 on average", "counts as one that loses nothing", "probability at least 0.9"]),
        ({"kind": "signed"}, ["make up for others", "bound wsr"]),
        ({"kind": "textual"}, ["get answers at most 0.1 away", "1 - f1"]),
        ({"kind": "tail", "margin": 0.2}, ["lose more than 0.2 of f1", "probability of at most 0.1", "how much those"]),
        ({"bound": "crc"}, ["a guarantee on the mean", "no failure probability"]),
        ({"unit": "group"}, ["New groups of prompts", "150 certification groups"]),
    ],
)
def test_each_promise_has_its_words(monkeypatch, tmp_path, options, phrases):
    words = certified(monkeypatch, tmp_path, Promise("f1", 0.1, 0.1, **options)).words()
    assert all(phrase in words for phrase in phrases)
    assert ("probability at least" in words) == ("bound" not in options)


# ---------------------------------------------------------------- does it apply?


def other_weights(name="llama"):
    torch.manual_seed(5)
    made = type(tiny(name))(tiny(name).config)
    return LanguageModel(made.eval(), tokenizer(), name="other")


def test_no_mismatch_where_all_is_as_it_was(monkeypatch, tmp_path):
    certificate = certified(monkeypatch, tmp_path)
    policy = ExitPolicy.load(tmp_path / "policy.json")
    assert certificate.mismatches(model()) == []
    use = {"policy": policy, "task": TASK, "settings": {"max_new_tokens": 5}, "batch_size": 2}
    assert certificate.mismatches(model(), **use) == []
    assert load(tmp_path / "policy.json").mismatches(model(), **use) == []


def test_a_field_that_policies_have_got_since_is_no_mismatch(monkeypatch, tmp_path):
    certificate = certified(monkeypatch, tmp_path)
    policy = ExitPolicy.load(tmp_path / "policy.json")
    before = replace(certificate, policy={k: v for k, v in certificate.policy.items() if k != "draft"})
    assert before.mismatches(model(), policy=policy) == []


def with_exits():
    lm = model()
    lm.attach_exits(Exits(lm.split.shape.width, (2,)))
    return lm


@pytest.mark.parametrize(
    ("lm", "use", "reason"),
    [
        (other_weights, {}, "weights are not those of tiny"),
        (lambda: LanguageModel(tiny("llama"), tokenizer(chat=False)), {}, "chat template"),
        (model, {"policy": ExitPolicy(threshold=0.4)}, "policy threshold was 0.5 and is 0.4"),
        (model, {"policy": ExitPolicy(threshold=0.5, skipped="defer")}, "policy skipped was 'propagate'"),
        (model, {"task": TASKS["summarisation"]}, "task name was 'question-answering'"),
        (model, {"task": replace(TASK, cue="So:")}, "task cue was 'Answer:' and is 'So:'"),
        (model, {"settings": {"max_new_tokens": 9}}, "setting max new tokens was 5 and is 9"),
        (model, {"settings": {"max_new_tokens": 5, "temperature": 1.0}}, "setting temperature was None and is 1.0"),
        (model, {"batch_size": 1}, "batch size was 2 and is 1"),
    ],
)
def test_each_mismatch_is_named(monkeypatch, tmp_path, lm, use, reason):
    reasons = certified(monkeypatch, tmp_path).mismatches(lm(), **use)
    assert any(reason in found for found in reasons), reasons


def test_another_number_format_or_other_exits_are_mismatches(monkeypatch, tmp_path):
    certificate = certified(monkeypatch, tmp_path)
    low = LanguageModel(type(tiny("llama"))(tiny("llama").config), tokenizer(), name="tiny")
    low.model.load_state_dict(tiny("llama").state_dict())
    low.model.to(torch.bfloat16)
    assert certificate.mismatches(low) == ["dtype was float32, native and is bfloat16, native"]
    changed = replace(certificate, conditions={**certificate.conditions, "exits": "abc"})
    assert changed.mismatches(model()) == ["the trained exits are others, or missing, or not wanted"]


def test_where_nothing_was_certified_leaving_early_is_a_mismatch(monkeypatch, tmp_path):
    nothing = replace(certified(monkeypatch, tmp_path), certified=False, needed=None)
    assert nothing.mismatches(model(), policy=ExitPolicy(threshold=None)) == []
    assert "nothing was certified" in nothing.mismatches(model(), policy=ExitPolicy(threshold=0.9))[0]


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate") / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"context": f"w{i + 20} sky w{i + 30} is blue", "question": "why ?", "answers": {"text": [f"w{i + 30}"]}}
        for i in range(30)
    ]
    write_lines(path, rows)
    return path


def offramp(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def calibrated(folder, data, out, *more):
    return offramp(
        "calibrate", folder, "--task", "question-answering", "--data", data, "--kind", "textual", "--metric", "f1",
        "--tolerance", 0.3, "--failure", 0.3, "--max-new-tokens", 3, "--out", out, *more,
    )  # fmt: skip


def test_the_command_certifies_a_number_format_alone(folder, data, tmp_path):
    path, formats = tmp_path / "out.json", ("--dtype", "int8", "--reference-dtype", "float32")
    nothing = ("--threshold", "none", "--static", "none", "--even-if-it-does-not-pay")
    run = calibrated(folder, data, tmp_path / "run", *formats, *nothing, "--json", path)
    assert run.exit_code == 0, run.output
    certificate = json.loads(path.read_text())["certificate"]
    assert [test["name"] for test in certificate["tests"]] == ["full depth"]
    assert certificate["conditions"]["dtype"] == "int8, native"
    refused = calibrated(folder, data, tmp_path / "other", *nothing)
    assert refused.exit_code == 1
    assert "nothing is tried" in str(refused.exception)


def test_calibrate_and_generate_with_the_policy(folder, data, tmp_path):
    out, path = tmp_path / "run", tmp_path / "out.json"
    run = calibrated(
        folder, data, out, "--threshold", "0,1", "--min-layer", "3,2", "--order", "chains", "--validate", 20,
        "--json", path, "--even-if-it-does-not-pay",
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    result = json.loads(path.read_text())
    assert result["schema"] == "offramp/calibrate/1"
    assert result["validation"]["repeats"] == 20
    assert "20 calibrations by random splits of the pool" in run.stdout
    assert result["certificate"]["certified"]  # at a threshold of 1 no token leaves
    assert (out / "calibrate.svg").exists()
    policy = load(out / "policy.json").policy
    assert policy["min_layer"] in (2, 3)
    use = ("generate", folder, "why ?", "--policy", out / "policy.json", "--max-new-tokens", 3)
    assert "does not apply" not in offramp(*use).stderr
    assert "certificate does not apply: policy threshold was" in offramp(*use, "--threshold", 0.77).stderr
    assert "certificate does not apply: dtype was" in offramp(*use, "--dtype", "bfloat16").stderr
    assert "certificate does not apply: setting max new tokens" in offramp(*use[:-1], 4).stderr
    assert "certificate does not apply: setting chat" in offramp(*use, "--no-chat").stderr


def test_evaluate_warns_where_tokens_leave_elsewhere(folder, data, tmp_path):
    out = tmp_path / "run"
    never = ("--threshold", "1", "--test-share", 0.3, "--even-if-it-does-not-pay")
    assert calibrated(folder, data, out, *never).exit_code == 0
    use = (
        "evaluate", folder, "--task", "question-answering", "--data", data, "--max-new-tokens", 3, "--static", 3,
        "--policy", out / "policy.json", "--resamples", 10, "--out", tmp_path / "evaluate",
    )  # fmt: skip
    assert "drift" not in offramp(*use).stderr  # at a threshold of 1 all tokens leave at the end, then and now
    values = json.loads((out / "policy.json").read_text())
    certificate = replace(Certificate.from_dict(values["certificate"]), exits=["1:3"] * 60)
    certificate.save(out / "policy.json")
    assert "may not apply: drift: an answer's tokens leave after layer 4.0 on average" in offramp(*use).stderr


def test_thresholds_per_layer_from_a_tuning_part(folder, data, tmp_path):
    out = tmp_path / "run"
    run = calibrated(folder, data, out, "--per-layer", "--threshold", "1,0.9", "--min-layer", "1", "--json", "-")
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    assert result["certificate"]["splits"]["tuning"][0] == 9
    assert [len(setting["policy"]["threshold"]) for setting in result["settings"]] == [3, 3]
    assert (out / "thresholds.json").exists()
    again = json.loads(
        calibrated(folder, data, out, "--per-layer", "--threshold", "1,0.9", "--min-layer", "1", "--json", "-").stdout
    )
    assert again == result


def test_nothing_certified_is_said_plainly(folder, data, tmp_path):
    out = tmp_path / "run"
    run = calibrated(folder, data, out, "--confidence", "static", "--min-layer", "1")
    assert run.exit_code == 0, run.output
    assert "NOTHING CERTIFIED" in run.stderr
    assert "Nothing was certified" in run.stdout
    assert ExitPolicy.load(out / "policy.json").threshold is None


def test_wrong_use_is_refused_in_one_line(folder, data, tmp_path):
    run = calibrated(folder, data, tmp_path / "run", "--tolerance", 0.01)
    assert "are too few to certify tolerance 0.01" in str(run.exception)
    assert not (tmp_path / "run").exists()
    assert offramp("calibrate", folder, "--task", "poetry", "--data", data).exit_code == 2
    assert calibrated(folder, data, tmp_path / "run", "--threshold", "high").exit_code == 2


# ---------------------------------------------------------------- relative to what


@pytest.mark.parametrize(("cost", "more"), [(0.5, False), (1.2, True)])
def test_costs_are_relative_to_the_full_model_and_more_is_said(monkeypatch, tmp_path, cost, more):
    monkeypatch.setattr(drawing, "available", lambda: False)
    monkeypatch.setattr(decoded, "decode_arms", Script(lambda policy: 0.0, cost=lambda policy: cost).together)
    result = calibrate(
        model(), TASK, examples(200), BASE, Promise("f1", 0.1, 0.1), tmp_path, grid=GRID, resamples=20,
        must_pay=False,
    )  # fmt: skip
    words = result.certificate.words()
    assert f"{cost:.3f} of the full model's FLOPs, prompts included" in words
    assert "every token read out after layer 4 of 4 and no exit tested" in words
    assert (COSTS_MORE in words) is more
    assert result.certificate.saves is not more
    shown = page.page(tmp_path, json.loads((tmp_path / "result.json").read_text()))
    assert shown.sections[0].blocks[0].mark == ("" if more else "good")


def test_a_limit_of_gains_is_said_as_nearly_nothing():
    promise = Promise("f1", 0.1, 0.1, kind="signed")
    losses = [promise.upper_limit(np.full(60, loss)) for loss in (-0.06, 0.02)]
    assert losses[0] < 1e-11
    assert [limit_words(upper) for upper in losses] == ["0.0001", f"{losses[1]:.3g}"]


def test_a_page_of_a_changed_certificate_is_refused(monkeypatch, tmp_path):
    certified(monkeypatch, tmp_path)
    values = json.loads((tmp_path / "result.json").read_text())
    values["certificate"]["promise"]["tolerance"] = 0.001
    with pytest.raises(ValueError, match="changed or is damaged"):
        page.page(tmp_path, values)


@pytest.mark.parametrize(
    ("whole", "token", "says"),
    [
        (0.8, 0.9, "prompts included, and 0.900 of its FLOPs per generated token, without encoder and prompt."),
        (0.593, 1.44, "1.440 of its FLOPs per generated token, without encoder and prompt: prompts or lengths save"),
        (1.1, 1.2, COSTS_MORE),
        (0.8, 0.96, UNSURE),
        (0.8, None, f"0.800 of the full model's FLOPs, prompts included: {UNSURE}."),
    ],
)
def test_the_words_tell_a_saving_by_exits_from_one_by_prompts(monkeypatch, tmp_path, whole, token, says):
    certificate = certified(monkeypatch, tmp_path)
    seen = dict(certificate.estimates["test"], flops_ratio={"value": whole, "low": None, "high": None})
    seen["flops_per_token_ratio"] = token and {"value": token, "low": token - 0.05, "high": token + 0.05}
    assert says in replace(certificate, estimates={**certificate.estimates, "test": seen}).words()

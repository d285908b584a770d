"""The public verbs do what the functions behind them do, from files and names, and are methods as well."""

import inspect
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import offramp
from classifier_data import save_resnet, write_idx
from offramp import ClassifierTrainConfig, ExitPolicy, LanguageModel, TokenDistillation, TrainConfig
from offramp.calibration import PosteriorConfig, Promise
from offramp.calibration import calibrate as certify
from offramp.calibration import fit_posterior as fit_to
from offramp.classifiers.classify import answers
from offramp.core.language_model import Verb
from offramp.distillation.language_models import distil
from offramp.evaluation import evaluate as compare
from offramp.evaluation import evaluate_perplexity, read_passages
from offramp.hub.exit_files import load_exits
from offramp.tasks import TASKS, fit, read_examples, take
from offramp.training.answers import AnswerConfig
from offramp.training.data import pair_documents, prepare, read_texts, text_documents
from offramp.training.trainer import train as train_exits
from offramp.values import ArgumentError
from tiny import tiny, tokenizer
from training_runs import model

VERBS = ("probe", "train", "evaluate", "calibrate")  # as methods
SENTENCES = ["the sky is blue .", "why is the sky w21 w22 .", "w23 w24 w25 w26 is blue"] * 4


@pytest.fixture
def lm():
    return LanguageModel(tiny("llama"), tokenizer(), name="tiny")


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"context": f"w{i + 20} sky w{i + 30} is blue", "question": "why ?", "answers": {"text": [f"w{i + 30}"]}}
        for i in range(30)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def untimed(result):
    """Figures of a result, without seconds and folders."""
    values = json.loads(json.dumps(result.to_dict(), default=str))

    def without(value):
        if isinstance(value, list):
            return [without(each) for each in value]
        if not isinstance(value, dict):
            return value
        return {key: without(each) for key, each in value.items() if "second" not in key and key not in LEFT_OUT}

    return without(values)


LEFT_OUT = ("exits", "model", "name", "about", "seconds", "memory", "rates", "parts", "limit", "shortened", "created")


def test_importing_the_package_imports_no_room():
    code = "import sys, offramp; print(*(name for name in sys.modules if name.startswith(('offramp.', 'torch'))))"
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("name", VERBS)
def test_methods_are_the_functions_with_their_signatures_and_examples(lm, name):
    function, method = getattr(offramp, name), getattr(lm, name)
    assert getattr(LanguageModel, name) is function
    assert isinstance(inspect.getattr_static(lm, name), Verb)
    parameters = list(inspect.signature(function).parameters.values())
    assert parameters[0].name == "lm"
    assert list(inspect.signature(method).parameters.values()) == parameters[1:]
    assert method.__doc__ == function.__doc__
    assert f"lm.{name}(" in method.__doc__


OF_CLASSIFIERS = ("train_classifier", "evaluate_classifier", "calibrate_classifier", "classify", "distill_grid")


@pytest.mark.parametrize("name", [*VERBS, "fit_posterior", "distill", *OF_CLASSIFIERS])
def test_every_option_has_a_name(name):
    parameters = inspect.signature(getattr(offramp, name)).parameters.values()
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters)


def test_probe(lm):
    assert lm.probe(["the sky"], max_new_tokens=3) == offramp.probe(lm, ["the sky"], max_new_tokens=3)


def test_train_on_texts_and_files(lm, tmp_path):
    config = TrainConfig(layers=(2,), steps=3)
    data = prepare(lm, text_documents(lm, SENTENCES), window=256, share=0.1, seed=0)
    expected = train_exits(lm, data, config, tmp_path / "deep")
    found = lm.train(SENTENCES, config=config, out=tmp_path / "texts")
    assert untimed(found) == untimed(expected)
    one, other = (load_exits(result.exits).state_dict() for result in (found, expected))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    assert read_texts(file) == SENTENCES
    assert untimed(offramp.train(lm, str(file), config=config, out=tmp_path / "file")) == untimed(expected)


def test_train_on_own_answers(lm, tmp_path):
    asked = ["the sky", "why is", "w21 w22", "blue ."]
    result = lm.train(prompts=asked, config=TrainConfig(layers=(2,), steps=1), window=200, out=tmp_path)
    assert result.steps == 1
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1 + len(asked)


def test_train_settles_what_only_the_data_say(lm, tmp_path, caplog):
    """Epochs, the number format and where exits go; what is found out is logged."""
    caplog.set_level("INFO", "offramp")
    config = TrainConfig(rank=1, batch_size=4)
    lm.train([*SENTENCES, "w20"], config=config, epochs=2, fastest=True, place=1, place_tokens=2, out=tmp_path)
    asked = json.loads((tmp_path / "config.json").read_text())
    assert asked["config"]["steps"] == 2 * 2  # two windows in three are alike, and one document in three is held out
    assert asked["config"]["layers"] == asked["about"]["placement"]["layers"]
    assert any(said.startswith("computing in ") for said in caplog.messages)
    assert "left out 1 of 13 texts, which are shorter than two tokens" in caplog.messages


def test_train_on_a_task_and_on_several_files(lm, questions, tmp_path):
    config = TrainConfig(layers=(2,), steps=1)
    other = tmp_path / "other.jsonl"
    other.write_text(questions.read_text().replace("sky", "blue"))
    trained = {"task": "question-answering", "data": [questions, other], "config": config}
    lm.train(**trained, limit=40, out=tmp_path / "references")
    assert json.loads((tmp_path / "references" / "config.json").read_text())["data"]["documents"] == 40
    lm.train(**trained, limit=4, own_answers=True, answering=AnswerConfig(2), out=tmp_path / "own")
    assert len((tmp_path / "own" / "answers.jsonl").read_text().splitlines()) == 1 + 4
    for name, text in {"a.txt": "the sky is blue .", "b.txt": "why is w21 w22 the sky ."}.items():
        (tmp_path / name).write_text(text)
    lm.train([tmp_path / "a.txt", tmp_path / "b.txt", "w21 w22 w23"], config=config, out=tmp_path / "texts")
    assert json.loads((tmp_path / "texts" / "config.json").read_text())["data"]["documents"] == 3


def test_train_on_the_words_of_a_tasks_prompts_too(lm, questions, tmp_path, caplog):
    caplog.set_level("INFO", "offramp")
    task, config = TASKS["question-answering"], TrainConfig(layers=(2,), steps=1)
    documents, _ = pair_documents(lm, task, read_examples(task, questions)[:4], longest=512)
    predicted = {too: sum(len(d.ids) - (1 if too else d.start) for d in documents) for too in (False, True)}
    assert predicted[True] > predicted[False] > 0
    for too, positions in predicted.items():
        answering = AnswerConfig(prompts_too=too)
        lm.train(task=task, data=questions, limit=4, config=config, answering=answering, out=tmp_path / str(too))
        size = next(message for message in reversed(caplog.messages) if "positions to train on" in message)
        assert sum(int(word) for word in size.split() if word.isdecimal()) == 4 + positions


def test_evaluate(lm, questions, tmp_path):
    task, policy = replace(TASKS["question-answering"], max_new_tokens=3), ExitPolicy(threshold=0.2)
    policy.save(tmp_path / "policy.json")
    examples = fit(lm, task, take(read_examples(task, questions), 4, 0), longest=None, room=None)[0]
    expected = compare(lm, task, examples, {"mine": policy}, tmp_path / "deep", resamples=10)
    options = {"limit": 4, "resamples": 10, "max_new_tokens": 3}
    arms = {"mine": tmp_path / "policy.json"}
    found = lm.evaluate("question-answering", questions, arms, **options, out=tmp_path / "named")
    assert untimed(found)["arms"] == untimed(expected)["arms"]
    given = offramp.evaluate(lm, task, examples, {"mine": policy}, resamples=10, out=tmp_path / "given")
    assert [arm.name for arm in given.arms] == [arm.name for arm in found.arms]


def test_evaluate_by_perplexity(lm, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the sky is blue . why is w21 " * 6)
    passages = read_passages(lm, [text], window=9)
    policies = {"mine": ExitPolicy(threshold=0.2)}
    expected = evaluate_perplexity(lm, passages, policies, tmp_path / "deep", resamples=10)
    found = lm.evaluate("perplexity", text, policies, window=9, resamples=10, out=tmp_path / "verb")
    assert untimed(found)["arms"] == untimed(expected)["arms"]
    lm.evaluate("perplexity", text, static_layers=(), resamples=10, out=tmp_path / "default")
    assert '"window": 255' in (tmp_path / "default" / "config.json").read_text()  # the context's 256, less one


def test_a_certificate_that_does_not_apply_is_said(lm, questions, tmp_path, caplog):
    task = replace(TASKS["question-answering"], max_new_tokens=3)
    lm.calibrate(task, questions, tolerance=0.5, failure=0.5, kind="textual", must_pay=False, out=tmp_path / "c")
    arms = {"certified": tmp_path / "c" / "policy.json"}
    asked = {"limit": 2, "resamples": 10, "max_new_tokens": 2, "out": tmp_path / "e"}
    lm.evaluate(task, questions, arms, **asked)
    assert [said for said in caplog.messages if "does not apply: setting max new tokens was 3" in said]


def test_fit_posterior(lm, tmp_path):
    texts = [f"the sky is w{20 + i} w{30 + i} blue . why is w{i + 40}" for i in range(12)]
    config = PosteriorConfig(("laplace",), candidates=4, layers=(2,))
    found = offramp.fit_posterior(lm, texts, config=config, out=tmp_path / "verb")
    expected = fit_to(lm, text_documents(lm, texts), tmp_path / "deep", config, window=256)
    assert untimed(found) == untimed(expected)
    assert load_exits(tmp_path / "verb" / "exits").posterior is not None
    assert lm.exits.layers == (2,)


def test_calibrate(lm, questions, tmp_path):
    task = replace(TASKS["question-answering"], max_new_tokens=3)
    examples = fit(lm, task, read_examples(task, questions), longest=None, room=None)[0]
    promise = Promise("f1", 0.3, 0.3, "textual")
    expected = certify(lm, task, examples, ExitPolicy(), promise, tmp_path / "deep")
    found = lm.calibrate(
        task, str(questions), tolerance=0.3, failure=0.3, kind="textual", out=tmp_path / "named"
    )  # fmt: skip
    assert found.certificate.promise == promise
    assert found.certificate.tests == expected.certificate.tests
    assert (tmp_path / "named" / "policy.json").is_file()


def test_distill(tmp_path):
    teacher = LanguageModel(tiny("qwen2"), tokenizer(), name="teacher")
    config = TokenDistillation(TrainConfig(trainable="all", steps=2))
    one, other = model(), model()
    data = prepare(one, text_documents(one, SENTENCES), window=256, share=0.1, seed=0)
    expected = distil(one, teacher, data, config, tmp_path / "deep")
    assert untimed(offramp.distill(other, teacher, SENTENCES, config=config, out=tmp_path / "verb")) == untimed(
        expected
    )
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_distill_on_own_answers_by_group(tmp_path):
    teacher, student = LanguageModel(tiny("qwen2"), tokenizer(), name="teacher"), model()
    rows = [{"prompt": f"w{i + 20} the sky", "kind": "even" if i % 2 else "odd"} for i in range(12)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TokenDistillation(TrainConfig(trainable="all", steps=1), fraction=1.0)
    asked = {"prompts": prompts, "group_column": "kind", "answering": AnswerConfig(2), "held_out": 0.4}
    result = offramp.distill(student, teacher, config=config, **asked, out=tmp_path / "run")
    assert [group.name for group in result.groups] == ["even", "odd"]
    with pytest.raises(ArgumentError, match="give `texts`, or `prompts`"):
        offramp.distill(student, teacher, out=tmp_path / "other")


def test_a_classifier_from_files_to_answers(tmp_path, caplog):
    from PIL import Image

    from offramp.classifiers.loading import load

    caplog.set_level("INFO", "offramp")
    data, task = write_idx(tmp_path / "bars"), "image-classification"
    config = ClassifierTrainConfig(epochs=1, optimiser="adamw")
    trained = offramp.train_classifier(
        str(save_resnet(tmp_path / "resnet")), task, data, classes=["lying", "standing", "spot"], augment="none",
        config=config, out=tmp_path / "run",
    )  # fmt: skip
    assert trained.model == tmp_path / "run" / "model"
    assert any(said.startswith("rows: train ") for said in caplog.messages)
    found = offramp.evaluate_classifier(
        trained.model, data, methods=["vanilla", "temperature"], resamples=0, limit=20, out=tmp_path / "evaluated"
    )
    assert {"vanilla", "temperature"} <= set(found.methods("clean"))
    made = offramp.calibrate_classifier(str(trained.model), str(data), posterior="temperature", out=tmp_path / "honest")
    assert made.conditions["model"] == "run"
    assert made.conditions["data"] == str(data)
    for verb in (offramp.evaluate_classifier, offramp.calibrate_classifier):
        with pytest.raises(ValueError, match="was trained for image-classification, not for text-classification"):
            verb(trained.model, data, task="text-classification")
    with pytest.raises(ArgumentError, match="`loss` f1: choose one of consistency"):
        offramp.calibrate_classifier(trained.model, data, loss="f1")
    with pytest.raises(ArgumentError, match="`augment` mirror: choose one of crop-flip"):
        offramp.train_classifier("resnet", task, data, augment="mirror")
    with pytest.raises(ValueError, match="name at least one"):
        offramp.evaluate_classifier([], data)
    image = tmp_path / "image.png"
    Image.new("L", (8, 8), 90).save(image)
    classifier = load(tmp_path / "run" / "model")
    expected = answers(classifier, [str(image)], thresholds=0.4)
    assert offramp.classify(tmp_path / "run" / "model", str(image), thresholds=0.4) == expected
    assert offramp.classify(classifier, [str(image)], thresholds=0.4) == expected
    (answer,) = offramp.classify(classifier, str(image), posterior=tmp_path / "honest", budget=0.9)
    assert answer.share <= 1.5
    with pytest.raises(ValueError, match="`budget` needs `posterior`"):
        offramp.classify(classifier, [str(image)], budget=0.5)


def test_a_grid_of_students(tmp_path):
    pytest.importorskip("sklearn")
    asked = {"methods": ["erm", "kd"], "teacher_methods": ["erm"], "seeds": [3], "epochs": 1, "out": tmp_path}
    grid = offramp.distill_grid("small-cnn:4", "stand-in:digits-on-colour", **asked)
    assert [row["method"] for row in grid._rows()] == ["erm", "kd"]
    assert {row["seed"] for row in grid._rows()} == {3}
    assert grid.table() == (tmp_path / "report.md").read_text()
    assert set(grid.to_dict()["teachers"]["erm"]) == {"erm", "kd"}
    with pytest.raises(ArgumentError, match="`student` is missing"):
        offramp.distill_grid(data="stand-in:digits-on-colour", settings={})


def test_the_device_of_a_cluster_is_for_the_cluster_to_have(tmp_path, monkeypatch):
    def run_grid(runs, folder, **options):
        raise RuntimeError(options["device"])

    monkeypatch.setattr("offramp.distillation.distill_grid.run_grid", run_grid)
    with pytest.raises(RuntimeError, match="^xpu:3$"):
        offramp.distill_grid("small-cnn:4", "stand-in:digits-on-colour", backend="ray", device="xpu:3", out=tmp_path)


def test_errors_say_what_is_allowed(lm, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'summarisation'"):
        lm.evaluate("summarization", tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="x.json"):
        lm.train(tmp_path / "x.json", out=tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"place": 2, "config": TrainConfig(layers=(1,))}, "`place` chooses layers; it does not go with `layers`"),
        ({"place_tokens": 2}, "`place_tokens` is for `place`"),
        ({"own_answers": True}, "need `task`, which says what the examples are"),
        ({"task": "question-answering"}, "`task` question-answering needs `data`, a file of examples"),
    ],
    ids=["place and layers", "no place", "no task", "no data"],
)
def test_arguments_that_do_not_go_together(lm, tmp_path, arguments, message):
    """The command line writes their names as options, see test_training_cli.py."""
    with pytest.raises(ArgumentError, match=message):
        lm.train(SENTENCES, **arguments, out=tmp_path / "run")

"""Promises that would say nothing are refused: nothing to lose, or texts that the metric cannot read."""

import json
from pathlib import Path

import numpy as np
import pytest

from offramp.calibration import Promise, calibrate, decoded, load
from offramp.calibration.promise import Room, room_of
from offramp.evaluation import Record
from offramp.metrics.text import METRICS
from offramp.report import calibration as page
from offramp.report import drawing
from offramp.tasks import TASKS, Example, read_examples
from scripted_calibration import BASE, GRID, model
from tiny import LAYERS

TASK = TASKS["summarisation"]
CASES = Path(__file__).parents[2] / "shared" / "cases"
CHINESE, NONSENSE = "今天天气很好我们去公园散步", "五六七八九"


def record(example, arm, text, scores, flops):
    parts = {"encoder": 0, "prefill": 0}
    return Record(example.id, example.group, arm, text, [1], [LAYERS], scores, 1.0, arm == "full", flops, 1, 0.0, parts)


def answering(monkeypatch, full, early):
    """Every answer by script, scored by the metrics themselves; one function from examples to texts each."""
    monkeypatch.setattr(drawing, "available", lambda: False)

    def decode(lm, task, examples, arms, paths, **options):
        made = {}
        for arm, policy in arms.items():
            full = {r.id: r for r in made.get("full model", ())} or options["full"] or None
            made[arm] = answers(task, examples, arm, policy, full)
        return made

    def answers(task, examples, arm, policy, full):
        found = []
        for example in examples:
            text = (of_full if policy is None else of_early)(example)
            references = example.references or (text if full is None else full[example.id].text,)
            scores = {name: METRICS[name](text, references) for name in task.metrics}
            found.append(record(example, arm, text, scores, 1000 if policy is None else 500))
        return found

    of_full, of_early = full, early
    monkeypatch.setattr(decoded, "decode_arms", decode)


def run(folder, examples, promise, task=TASK):
    return calibrate(model(), task, examples, BASE, promise, folder, grid=GRID, resamples=20)


def of_texts(*references, count=100):
    return [Example(f"{i}", f"w{i}", references, f"g{i}") for i in range(count)]


def right(example):
    return example.references[0]


# ---------------------------------------------------------------- with files


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")
@pytest.mark.parametrize("name", ["mem_zh", "mem_en"])
def test_nonsense_at_early_exits_is_refused_in_every_script(monkeypatch, tmp_path, name):
    """In Chinese it was certified with a mean loss of 0: ROUGE gave 0 to the full model, too."""
    answering(monkeypatch, right, lambda example: "w1 w2 w3" if name == "mem_en" else NONSENSE)
    examples = read_examples(TASK, CASES / f"{name}.jsonl")
    certificate = run(tmp_path, examples, Promise("rougeL", 0.1, 0.1)).certificate
    assert not certificate.certified
    assert certificate.tests[0]["loss"] == 1
    assert certificate.room["none"] == certificate.room["unread"] == 0
    assert certificate.room["tokeniser"] == ("rouge-score" if name == "mem_en" else "unicode")


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")
@pytest.mark.parametrize("kind", ["risk", "signed", "tail"])
def test_a_full_model_that_scores_nothing_is_refused(monkeypatch, tmp_path, kind):
    answering(monkeypatch, lambda example: "w1 w2", lambda example: "w3")
    examples = read_examples(TASK, CASES / "vac.jsonl")
    promise = Promise("rougeL", 0.1, 0.1, kind, 0.2 if kind == "tail" else None)
    result = run(tmp_path, examples, promise)
    certificate = load(tmp_path / "policy.json")
    assert not certificate.certified
    assert certificate.tests == []
    assert result.policy.threshold is None
    words = result.table()
    assert "The promise would say nothing." in words
    assert "100.0% of the certification prompts" in words
    assert "every policy would keep such a promise" in words
    assert "ask for --kind textual" in words
    assert json.loads((tmp_path / "result.json").read_text())["certificate"]["room"]["none"] == 1
    shown = page.page(tmp_path, json.loads((tmp_path / "result.json").read_text()))
    assert "would say nothing" in str(shown)


# ---------------------------------------------------------------- with made-up texts


def test_a_chinese_model_that_keeps_its_answers_is_certified(monkeypatch, tmp_path):
    answering(monkeypatch, right, right)
    certificate = run(tmp_path, of_texts(CHINESE), Promise("rougeL", 0.1, 0.1)).certificate
    assert certificate.certified
    assert "The full model itself scores 1 of rougeL" in certificate.words()


def test_texts_that_a_metric_cannot_read_are_refused_with_another_metric(monkeypatch, tmp_path):
    answering(monkeypatch, right, lambda example: "nonsense")
    certificate = run(tmp_path, of_texts("👍👍"), Promise("rougeL", 0.1, 0.1)).certificate
    assert not certificate.certified
    assert "rougeL cannot read the texts of 100% of the prompts" in certificate.words()
    assert "such as chrf" in certificate.words()


def test_without_references_an_empty_full_model_is_refused(monkeypatch, tmp_path):
    answering(monkeypatch, lambda example: "", lambda example: "nonsense")
    for kind in ("risk", "textual"):
        promise = Promise("rougeL", 0.1, 0.1, kind)
        certificate = run(tmp_path / kind, of_texts(), promise, TASKS["prompts"]).certificate
        assert not certificate.certified
        assert certificate.tests == []


def test_textual_losses_have_room_wherever_the_full_model_says_something(monkeypatch, tmp_path):
    """What the references say does not matter to them."""
    answering(monkeypatch, lambda example: CHINESE, lambda example: CHINESE)
    certificate = run(tmp_path, of_texts("an answer nobody gives"), Promise("rougeL", 0.1, 0.1, "textual")).certificate
    assert certificate.certified
    assert certificate.room["mean"] == 1


# ---------------------------------------------------------------- the rule


def full_of(scores):
    examples = [Example(f"{i}", "w", ("the sky",), f"g{i // 2}") for i in range(len(scores))]
    return [record(e, "full", "the sky", {"rougeL": s}, 1) for e, s in zip(examples, scores, strict=True)], examples


@pytest.mark.parametrize(
    ("scores", "tolerance", "expected"),
    [
        ([0.0] * 100, 0.1, False),
        ([1.0] * 100, 0.1, True),
        ([1.0, *[0.0] * 9] * 10, 0.1, False),  # a worthless policy loses 0.1, which is promised
        ([1.0, *[0.0] * 4] * 30, 0.1, True),  # it loses 0.2
        ([1.0, *[0.0] * 4] * 2, 0.1, False),  # but ten prompts do not show it
        ([0.3] * 50, 0.05, True),
    ],
)
def test_there_is_room_if_a_worthless_policy_would_surely_break_the_promise(scores, tolerance, expected):
    promise = Promise("rougeL", tolerance, 0.05)
    assert room_of(promise, *full_of(scores), 0).suffices(promise) is expected


def test_the_most_that_can_be_lost_counts_as_the_promise_does():
    full, examples = full_of([0.2, 0.6, 1.0, 1.0])
    assert room_of(Promise("rougeL"), full, examples, 0).mean == pytest.approx(0.7)
    assert room_of(Promise("rougeL", unit="group"), full, examples, 0).mean == pytest.approx(0.7)
    tail = room_of(Promise("rougeL", kind="tail", margin=0.3), full, examples, 0)
    assert (tail.mean, tail.none) == (0.75, 0.25)


def test_no_policy_loses_more_than_the_room():
    rng = np.random.default_rng(0)
    full, examples = full_of(rng.random(200).round(3))
    for promise in (Promise("rougeL"), Promise("rougeL", kind="signed"), Promise("rougeL", kind="tail", margin=0.4)):
        most = room_of(promise, full, examples, 0).mean
        for high in (0.0, 0.5, 1.0):
            early = [record(e, "early", "", {"rougeL": rng.random() * high}, 1) for e in examples]
            assert promise.losses(early, full).mean() <= most + 1e-12


def test_rooms_are_said_in_words():
    room = Room(0.31, 0.25, 0.0, 0.01, "unicode")
    assert "scores 0.31 of rougeL" in room.words(Promise("rougeL"))
    assert "on 25.0% of the certification prompts it scores 0" in room.words(Promise("rougeL"))
    assert "at most 0.2 of f1" in room.words(Promise("f1", kind="tail", margin=0.2))
    assert "is empty, or not a text that f1 can read, on 25.0%" in room.words(Promise("f1", kind="textual"))

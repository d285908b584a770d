"""Certified policies in other commands: what is said where the promise is about something else, or may be."""

import json
import shlex
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from offramp import Exits, LanguageModel, cli
from offramp.calibration import load
from tiny import tiny, tokenizer

ABOUT = "the certificate is about question-answering in its prompt template; whether these prompts are that is not"


def offramp(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model with trained exits, calibrated in bfloat16, in folders whose names want quotes; what the command said."""
    folder = tmp_path_factory.mktemp("certified use")
    lm = LanguageModel(tiny("llama"), tokenizer(), name=str(folder / "model"))
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    lm.attach_exits(Exits.fresh(lm.split, (2, 3)))
    lm.save_exits(folder / "exits")
    rows = [
        {"context": f"w{i + 20} sky w{i + 30} is blue", "question": "why ?", "answers": {"text": [f"w{i + 30}"]}}
        for i in range(30)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = offramp(
        "calibrate", folder / "model", "--task", "question-answering", "--data", folder / "data.jsonl", "--kind",
        "textual", "--metric", "f1", "--tolerance", 0.3, "--failure", 0.3, "--max-new-tokens", 3, "--threshold", "1",
        "--exits", folder / "exits", "--dtype", "bfloat16", "--out", folder / "run", "--even-if-it-does-not-pay",
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    assert load(folder / "run" / "policy.json").certified
    return folder, said.stderr


def test_the_command_that_calibrate_prints_is_one_the_certificate_applies_to(run):
    command = shlex.split(run[1].split("use its policy with: ")[1].splitlines()[0])
    assert command[:2] == ["offramp", "generate"]
    used = offramp(*command[1:], "why ?")
    assert used.exit_code == 0, used.output
    assert "does not apply" not in used.stderr
    assert ABOUT in used.stderr


def test_without_options_the_printed_command_has_the_tasks_answer_length(run, tmp_path):
    folder, _ = run
    said = offramp(
        "calibrate", folder / "model", "--task", "question-answering", "--data", folder / "data.jsonl", "--kind",
        "textual", "--tolerance", 0.3, "--failure", 0.3, "--threshold", "1", "--limit", 8, "--out", tmp_path / "run",
        "--even-if-it-does-not-pay",
    )  # fmt: skip
    settings = load(tmp_path / "run" / "policy.json").conditions["settings"]
    printed = shlex.split(said.stderr.split("use its policy with: ")[1].splitlines()[0])
    assert printed[printed.index("--policy") + 2 :] == ["--max-new-tokens", str(settings["max_new_tokens"])]


@pytest.mark.parametrize(("task", "said"), [("question-answering", True), ("prompts", False)])
def test_generate_says_what_prompts_the_promise_is_about(run, tmp_path, task, said):
    folder, path = run[0], tmp_path / "policy.json"
    certificate = load(folder / "run" / "policy.json")
    conditions = {**certificate.conditions, "task": {**certificate.conditions["task"], "name": task}}
    replace(certificate, conditions=conditions).save(path)
    used = offramp("generate", folder / "model", "why ?", "--policy", path, "--max-new-tokens", 2)
    assert used.exit_code == 0, used.output
    assert ("the certificate is about" in used.stderr) == said


def test_where_the_promise_would_say_nothing_the_command_says_so_and_nothing_is_said_of_its_use(run, tmp_path):
    """The model's answers share no word with the references, so every policy loses nothing."""
    folder = run[0]
    rows = [{"context": f"w{i} sky", "question": "why ?", "answers": {"text": ["nobody says so"]}} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = offramp(
        "calibrate", folder / "model", "--task", "question-answering", "--data", tmp_path / "data.jsonl", "--tolerance",
        0.3, "--failure", 0.3, "--max-new-tokens", 3, "--threshold", "0", "--out", tmp_path / "run",
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    assert "NOTHING CERTIFIED" in said.stderr
    assert "the promise would say nothing" in said.stderr
    assert "every policy would keep such a promise" in said.stdout
    used = offramp("generate", folder / "model", "why ?", "--policy", tmp_path / "run" / "policy.json")
    assert used.exit_code == 0, used.output
    assert "the certificate is about" not in used.stderr


def test_a_changed_certificate_is_one_clear_error(run, tmp_path):
    folder, path = run[0], tmp_path / "policy.json"
    values = json.loads((folder / "run" / "policy.json").read_text())
    values["certificate"]["promise"]["failure"] = 0.001
    path.write_text(json.dumps(values))
    used = offramp("generate", folder / "model", "why ?", "--policy", path)
    assert used.exit_code == 1
    assert "the certificate was changed or is damaged: " in str(used.exception)
    assert "follows from its losses" in str(used.exception)


def test_perplexity_is_another_task_than_any_certificates(run, tmp_path):
    folder, text = run[0], tmp_path / "a.txt"
    text.write_text("why is the sky blue ?")
    used = offramp(
        "evaluate", folder / "model", "--task", "perplexity", "--data", text, "--window", 8, "--static", 3, "--policy",
        folder / "run" / "policy.json", "--resamples", 10, "--out", tmp_path / "run",
    )  # fmt: skip
    assert used.exit_code == 0, used.output
    assert "does not apply: it is about question-answering, not about the perplexity of a text" in used.stderr
    assert "does not apply: the trained exits are others, or missing" in used.stderr
    assert "does not apply: dtype was bfloat16, native and is float32, native" in used.stderr

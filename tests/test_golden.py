"""What every command writes, by shape: the keys and kinds of its JSON and the files of its run folder.

Moving code changes none of it. Where a change is meant, write the shapes anew and read the difference:

    OFFRAMP_GOLDEN=write pytest tests/test_golden.py
"""

import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import offramp
from classifier_data import save_resnet, write_idx
from offramp import cli
from tiny import tiny, tokenizer

GOLDEN = Path(__file__).parent / "golden"


def shape(value):
    """The kinds of a JSON value; what a list holds, once each. A schema stands for itself."""
    if isinstance(value, dict):
        return {key: value[key] if key == "schema" else shape(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        kinds = {json.dumps(shape(each), sort_keys=True) for each in value}
        return [json.loads(kind) for kind in sorted(kinds)]
    return {bool: "yes or no", int: "number", float: "number", str: "text", type(None): "nothing"}[type(value)]


def shapes(folder):
    """Of a folder's JSON files; of JSON Lines, the first one's and that of all others. Of other files, only names."""
    found = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith(".")):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else []
        values = [json.loads(line) for line in lines]
        whole = json.loads(path.read_text()) if path.suffix == ".json" else None
        found[path.relative_to(folder).as_posix()] = (
            [shape(values[0]), shape(values[1:])] if values else None if whole is None else shape(whole)
        )
    return found


def require(name, found):
    """The shape is what it was; with OFFRAMP_GOLDEN=write, it becomes what it is."""
    path = GOLDEN / f"{name}.json"
    if os.environ.get("OFFRAMP_GOLDEN") == "write":
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert found == json.loads(path.read_text())


def run(*arguments):
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, f"{done.output} {done.exception}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, prompts, questions, a text."""
    place = tmp_path_factory.mktemp("golden")
    tiny("llama").save_pretrained(place / "llama")
    tokenizer().save_pretrained(place / "llama")
    (place / "prompts.txt").write_text("why is the sky\nthe sky is blue .\n")
    (place / "text.txt").write_text("the sky is blue . why is the sky w21 w22 . " * 8)
    rows = [
        {"context": f"w{i + 20} sky w{i + 30} is blue", "question": "why ?", "answers": {"text": [f"w{i + 30}"]}}
        for i in range(30)
    ]
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def exits(place):
    run(
        "train", place / "llama", "--text", place / "text.txt", "--prompts", place / "prompts.txt", "--layers", "1,3",
        "--max-new-tokens", 4, "--steps", 2, "--window", 16, "--precision", "bfloat16", "--out", place / "train",
        "--json", place / "train.json",
    )  # fmt: skip
    return place / "train" / "exits"


QUESTIONS = ("--task", "question-answering", "--max-new-tokens", 3)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("generate", ["--no-chat", "--threshold", 0.2, "--max-new-tokens", 3]),
        ("probe", ["--prompts", "PLACE/prompts.txt", "--max-new-tokens", 4, "--out", "OUT"]),
        ("bench", ["--max-new-tokens", 3, "--repeats", 1, "--arms", "static 3,softmax", "--limit", 1, "--out", "OUT"]),
        ("evaluate", [*QUESTIONS, "--data", "PLACE/questions.jsonl", "--limit", 4, "--resamples", 10, "--out", "OUT"]),
        (
            "calibrate",
            [
                *QUESTIONS, "--data", "PLACE/questions.jsonl", "--kind", "textual", "--metric", "f1",
                "--tolerance", 0.3, "--failure", 0.3, "--threshold", "1,0.5", "--validate", 5, "--out", "OUT",
            ],
        ),
    ],
)  # fmt: skip
def test_commands_on_language_models(place, exits, name, arguments):
    result, out = place / f"{name}.json", place / name
    given = [str(a).replace("PLACE", str(place)).replace("OUT", str(out)) for a in arguments]
    asked = ["the sky"] if name == "generate" else []
    run(name, place / "llama", *asked, *given, "--exits", exits, "--json", result)
    require(name, {"json": shape(json.loads(result.read_text())), "files": shapes(out) if out.exists() else {}})


def test_train(place, exits):
    require("train", {"json": shape(json.loads((place / "train.json").read_text())), "files": shapes(place / "train")})


def test_report_of_runs(place, exits):
    run("report", place / "train", "--out", place / "page.html")
    assert "<html" in (place / "page.html").read_text()


def test_commands_on_classifiers(place):
    data, model, task = write_idx(place / "bars"), save_resnet(place / "resnet"), ("--task", "image-classification")
    folders = {name: place / f"{name}-classifier" for name in ("train", "calibrate", "evaluate")}
    made = {name: [*task, "--data", data, "--out", out, "--json", place / f"{name}-classifier.json"]
            for name, out in folders.items()}  # fmt: skip
    run("train", model, *made["train"], "--classes", "lying,standing,spot", "--epochs", 1, "--augment", "none")
    trained = folders["train"] / "model"
    run("calibrate", trained, *made["calibrate"], "--posterior", "temperature")
    run("evaluate", trained, *made["evaluate"], "--resamples", 10)
    for name, out in folders.items():
        written = json.loads((place / f"{name}-classifier.json").read_text())
        require(f"{name}-classifier", {"json": shape(written), "files": shapes(out)})


def test_names_and_options():
    """The public names, and every option of every command."""
    commands = typer.main.get_command(cli.app).commands
    options = {
        name: sorted(option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts))
        for name, command in commands.items()
    }
    require("options", {"names": sorted(offramp.__all__), "commands": options})

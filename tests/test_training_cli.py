"""`offramp train`, in this process, on a tiny saved model."""

import json

import pytest
from typer.testing import CliRunner

from offramp import cli
from tiny import tiny, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def offramp(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_train_then_generate(folder, tmp_path):
    text, prompts, out, path = (tmp_path / name for name in ("a.jsonl", "prompts.txt", "run", "result.json"))
    lines = [{"a": f"w{i} w{i + 1} the sky", "b": "is blue ."} for i in range(20, 40)]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts.write_text("why is the sky\nthe sky is\n")
    arguments = [
        "train", folder, "--text", text, "--field", "a", "--field", "b", "--prompts", prompts, "--max-new-tokens", 5,
        "--with-prompts", "--layers", "1,3", "--steps", 3, "--window", 16, "--out", out, "--json", path,
    ]  # fmt: skip
    for _ in range(2):  # the second time there is nothing left to do
        run = offramp(*arguments)
        assert run.exit_code == 0, run.output
        assert "22 documents" in run.stderr
        assert "held-out positions; 3 steps" in run.stdout
        assert f"--exits {out / 'exits'}" in run.stderr
    result = json.loads(path.read_text())
    assert result["schema"] == "offramp/train/2"
    assert result["layers"] == [1, 3]
    assert len(result["agreement_after"]) == 2
    assert (out / "answers.jsonl").exists()
    run = offramp("generate", folder, "the sky", "--exits", out / "exits", "--threshold", 0.1, "--max-new-tokens", 3)
    assert run.exit_code == 0, run.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "1,x"], "give numbers with commas"),
        (["--objective", "kl"], "choose one of forward-kl"),
        (["--layers", "9"], "1..3"),
    ],
)
def test_wrong_options(folder, tmp_path, arguments, message):
    text = tmp_path / "a.txt"
    text.write_text("the sky is blue . " * 20)
    run = offramp("train", folder, "--text", text, "--window", 8, "--out", tmp_path / "run", *arguments)
    assert run.exit_code != 0
    assert message in " ".join((run.output + str(run.exception)).split())

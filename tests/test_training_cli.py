"""`offramp train`, in this process, on a tiny saved model."""

import gzip
import json

import pytest
import torch
from typer.testing import CliRunner

import offramp as package
from offramp import cli
from offramp.cli.options import DRAFTING
from offramp.lm.given import prompts_of
from offramp.runs.digests import fingerprint
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
        "train", folder, "--text", text, "--text-column", "a", "--text-column", "b", "--prompts", prompts,
        "--max-new-tokens", 5, "--with-prompts", "--layers", "1,3", "--steps", 3, "--window", 16,
        "--out", out, "--json", path, "--coverage", 0.9,
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
    listing = result["frequent"]
    assert f"frequent vocabulary: {listing['tokens']} tokens cover {listing['train']:.1%} of the" in run.stdout
    assert listing["coverage"] == 0.9
    arguments = ["generate", folder, "the sky", "--exits", out / "exits", "--threshold", 0.1, "--max-new-tokens", 3]
    for kind, tests in {
        "none": "on all tokens", "frequent": f"on {listing['tokens']} frequent tokens",
        "frequent-fixed": "on 2 kept tokens",
    }.items():  # fmt: skip
        more = [] if kind == "none" else ["--vocabulary", kind]
        run = offramp(*arguments, *more, *(["--vocabulary-size", 2] if kind == "frequent-fixed" else []))
        assert run.exit_code == 0, run.output
        assert tests in " ".join(run.stderr.split())
    evaluated = ["--confidence", "softmax", "--vocabulary", "none,frequent,frequent-fixed", "--vocabulary-size", 3]
    (plain := tmp_path / "plain.txt").write_text("the sky is w21 w22 . " * 6)
    run = offramp(
        "evaluate", folder, "--task", "perplexity", "--data", plain, "--exits", out / "exits",
        *evaluated, "--window", 16, "--out", tmp_path / "evaluated", "--json", tmp_path / "evaluated.json",
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "frequent-fixed" in run.stdout


def test_a_drafter_is_trained_used_and_reported(folder, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("why is the sky\nthe sky is\nwhat is blue\n")
    trained = offramp(
        "train", folder, "--trainable", "drafter", "--prompts", prompts, "--max-new-tokens", 6, "--steps", 3,
        "--unroll", 2, "--window", 16, "--out", out, "--json", tmp_path / "result.json",
    )  # fmt: skip
    assert trained.exit_code == 0, words(trained)
    assert "draft in a row" in trained.stdout
    assert "a pass of the full model gives" in words(trained)
    assert json.loads((tmp_path / "result.json").read_text())["layers"] == [1, 2]
    assert f"--exits {out / 'exits'} --skipped verify --min-layer 0" in words(trained)
    texts = {}
    for name, options in {"full": [], "drafted": DRAFTING.split()}.items():
        more = ["--exits", out / "exits", *options] if options else []
        run = offramp("generate", folder, "the sky", *more, "--max-new-tokens", 5, "--json", tmp_path / f"{name}.json")
        assert run.exit_code == 0, words(run)
        texts[name] = json.loads((tmp_path / f"{name}.json").read_text())["generations"][0]["text"]
        if options:
            assert "drafts by 1 block(s) before the first one" in words(run)
    assert texts["full"] == texts["drafted"]
    reported = offramp("report", out, "--out", tmp_path / "page.html")
    assert reported.exit_code == 0, words(reported)
    assert "What the drafter reached" in (tmp_path / "page.html").read_text()


def test_the_number_format_is_chosen_once(folder, tmp_path, monkeypatch):
    text, slow = tmp_path / "a.txt", torch.float32
    text.write_text("the sky is blue . " * 20)
    monkeypatch.setattr("offramp.training.precision.product_seconds", lambda dtype: 9.0 if dtype == slow else 1.0)
    arguments = ["train", folder, "--text", text, "--window", 8, "--steps", 1, "--out", tmp_path / "run"]
    run = offramp(*arguments)
    assert "computing in bfloat16, weights as loaded: matrix products in bfloat16 take 0.11 of the time" in run.stderr
    slow = torch.bfloat16
    again = offramp(*arguments)
    assert "computing in bfloat16, weights as loaded: as the run in this folder began" in again.stderr
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["config"]["precision"] == "bf16"
    assert "0.11" in written["about"]["precision"]
    other = offramp(*arguments[:-1], tmp_path / "other")
    assert "computing in the loaded format: matrix products in bfloat16 take 9.00" in other.stderr
    assert "config.precision was 'bf16' and is now None" in words(offramp(*arguments, "--precision", "float32"))


def test_exits_are_placed_once(folder, tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("the sky is blue . why is it ? " * 40)
    arguments = ["train", folder, "--text", text, "--window", 8, "--steps", 1, "--out", tmp_path / "run"]
    first = offramp(*arguments, "--place", 2, "--place-tokens", 2, "--rank", 1)
    assert first.exit_code == 0, words(first)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["config"]["layers"] == written["about"]["placement"]["layers"]
    named = ", ".join(map(str, written["config"]["layers"]))
    assert f"exits after {named} save" in first.stderr
    monkeypatch.setattr("offramp.training.placement.agreement", None)  # it is not measured again
    again = offramp(*arguments, "--place", 2, "--place-tokens", 2, "--rank", 1)
    assert again.exit_code == 0, words(again)


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


def words(run):
    return " ".join((run.output + str(run.exception)).split())


@pytest.fixture
def squad(tmp_path):
    """Questions in SQuAD's layout; one of the contexts is longer than the model's."""

    def write(count=6, *, long=1, answers=True):
        paragraphs = [
            {
                "context": "the sky is blue . " * (200 if index < long else 2),
                "qas": [
                    {"id": f"q{index}", "question": "why ?"} | ({"answers": [{"text": "blue"}]} if answers else {})
                ],
            }
            for index in range(count)
        ]
        path = tmp_path / "squad.json"
        path.write_text(json.dumps({"data": [{"title": f"t{i}", "paragraphs": [p]} for i, p in enumerate(paragraphs)]}))
        return path

    return write


@pytest.mark.parametrize("own", [False, True])
def test_a_task_whose_longest_example_is_shortened_and_counted(folder, tmp_path, squad, own):
    """In both ways; the default window is what the model's context holds."""
    arguments = ["train", folder, "--task", "question-answering", "--data", squad(), "--epochs", 2, "--batch-size", 2]
    arguments += ["--layers", 2, "--out", tmp_path / "run", "--json", tmp_path / "r.json", "--max-new-tokens", 4]
    run = offramp(*arguments, *(["--own-answers"] if own else []))
    assert run.exit_code == 0, words(run)
    assert "shortened the source of 1 of 6 examples to fit 256 tokens" in run.stderr
    assert (tmp_path / "run" / "answers.jsonl").exists() == own
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["steps"] == 2 * 3  # five examples are trained on, two at a time
    if not own:
        assert result["positions"] == 2  # "blue" and the end, of the example held out
        assert result["tokens"] == 2 * 5 * 2


def test_own_answers_to_questions_and_to_prompts(folder, tmp_path, squad):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("why\nthe sky\n")
    arguments = [
        "train",
        folder,
        "--task",
        "question-answering",
        "--data",
        squad(long=0),
        "--own-answers",
        "--steps",
        1,
    ]
    arguments += ["--prompts", prompts, "--layers", 2, "--out", tmp_path / "run", "--max-new-tokens", 4]
    for _ in range(2):
        run = offramp(*arguments)
        assert run.exit_code == 0, words(run)
        assert "8 documents" in run.stderr
    files = sorted(path.name for path in (tmp_path / "run").glob("answers*"))
    assert files == ["answers-to-prompts.jsonl", "answers.jsonl"]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p.txt.gz", "p.jsonl.gz"])
def test_layouts_of_prompts(tmp_path, name):
    """As for `evaluate --task prompts` and `distill --prompts`."""
    prompts, path = ["why is the sky blue ?", "the sky"], tmp_path / name
    text = "\n\n".join(prompts)
    if "json" in name:
        rows = [json.dumps({"id": 3, "prompt": prompt}) for prompt in prompts]
        text = "\n".join(rows) if "jsonl" in name else f"[{','.join(rows)}]"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert prompts_of(path) == prompts
    assert prompts_of(path, 1) == prompts[:1]


@pytest.mark.parametrize("count", [0, -5])
def test_at_least_one_is_taken(folder, tmp_path, squad, count):
    data = ["--task", "question-answering", "--data", squad(long=0)]
    for options in (["train", folder, *data], ["train", folder], ["probe", folder]):
        run = offramp(*options, "--limit", count, "--out", tmp_path / "run")
        assert run.exit_code != 0
        assert f"the first {count} are asked for; take at least one" in words(run)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.jsonl", b'{"text": "why"}', "line 1 has no 'prompt'; it has 'text'"),
        ("p.txt", b"\x1f\x8b\x08", "p.txt, line 1 is not UTF-8; convert the file"),
        ("p.txt.gz", b"why", "p.txt.gz is not a whole gzip file"),
        ("p.txt", b"\n\n", "p.txt is empty"),
    ],
)
def test_wrong_layouts_of_prompts(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prompts_of(tmp_path / name)


def test_own_answers_to_long_prompts_are_counted(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("why is the sky blue ? " * 6 + "\nthe sky\nwhy\n")
    arguments = [
        "train",
        folder,
        "--prompts",
        prompts,
        "--no-chat",
        "--max-new-tokens",
        6,
        "--window",
        16,
        "--steps",
        1,
    ]
    run = offramp(*arguments, "--layers", 2, "--out", tmp_path / "run")
    assert run.exit_code == 0, words(run)
    assert "cut 1 of 3 documents to 16 tokens: prompts lose their beginning, answers their end" in run.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["shortened"] == 1


def test_classifiers_for_a_model_that_was_trained(folder, tmp_path):
    """All that a user does for CALM: model and exits, classifiers, generation."""
    text, run = tmp_path / "a.txt", tmp_path / "run"
    text.write_text(" ".join(f"w{20 + i % 60} the sky" for i in range(200)))
    common = ["--text", text, "--window", 16, "--steps", 2]
    first = offramp("train", folder, *common, "--trainable", "lora", "--lora-rank", 2, "--layers", "1,3", "--out", run)
    assert first.exit_code == 0, words(first)
    assert f"offramp generate {run / 'model'} --exits {run / 'exits'}" in first.stderr
    classified = [
        "train",
        run / "model",
        "--exits",
        run / "exits",
        "--objective",
        "consistency",
        "--out",
        tmp_path / "c",
    ]
    second = offramp(*classified, *common)
    assert second.exit_code == 0, words(second)
    assert "accuracy" in second.stdout
    lm = package.load(run / "model", exits=tmp_path / "c" / "exits")
    assert lm.exits.classifiers is not None
    assert fingerprint(lm.model) != fingerprint(tiny("llama"))
    options = ["--confidence", "classifier", "--threshold", 0.4, "--max-new-tokens", 3]
    third = offramp("generate", run / "model", "the sky", "--exits", tmp_path / "c" / "exits", *options)
    assert third.exit_code == 0, words(third)
    other = offramp("train", folder, "--exits", run / "exits", "--objective", "consistency", *common)
    assert "fingerprints" in words(other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--exits", "x"],
            "--exits is for --objective consistency and --trainable drafter; else",
        ),
        (["--place", 2, "--trainable", "drafter"], "a drafter stands before the first one"),
        (["--layers", "2", "--trainable", "drafter"], "layers is (2,), which a drafter does not use"),
        (["--place", 2, "--layers", "1"], "--place chooses layers; it does not go with --layers, which names them"),
        (["--place", 2, "--objective", "consistency"], "it does not go with --objective consistency, whose exits have"),
        (["--place-tokens", 2], "--place-tokens is for --place"),
        (["--place", 4], "4 exits are to be placed; a model of 4 layers can have 1..3"),
        (["--epochs", 1, "--steps", 2], "give one of --epochs, --steps and --tokens"),
        (["--tokens", 9, "--steps", 2], "give one of --epochs, --steps and --tokens"),
        (["--data", "x.json"], "need --task, which says what the examples are"),
        (["--own-answers"], "need --task"),
        (["--target", "x.de"], "need --task"),
        (["--task", "question-answering"], "--task question-answering needs --data, a file of examples"),
        (["--task", "chess", "--data", "x"], "--task chess: choose one of question-answering, summarisation"),
        (
            ["--hidden-loss", 1],
            "hidden_loss acts on the backbone, which is not trained; give trainable 'lora' or 'all'",
        ),
        (["--layer-dropout", 0.1], "layer_dropout acts on the backbone"),
        (["--layer-dropout", 1, "--trainable", "all"], "give a rate in [0, 1)"),
        (["--weights", "last"], "weights 'last' acts on the backbone"),
        (["--rank", 0], "rank 0 is no lens, so there is nothing to train"),
        (["--trainable", "some"], "trainable is 'some'; choose one of exits, drafter, lora, all"),
        (["--trainable", "all", "--objective", "consistency"], "trains classifiers only; leave trainable at 'exits'"),
        (["--precision", "fp16"], "precision is 'fp16'; choose one of None, bf16"),
        (["--micro-batch", 0], "micro_batch is 0; it must be at least 1"),
        (["--epochs", 0], "steps is 0; it must be at least 1"),
        (["--window", 300], "a window of 300 tokens is outside 2..256"),
    ],
)
def test_options_that_do_not_go_together(folder, tmp_path, arguments, message):
    text = tmp_path / "a.txt"
    text.write_text("the sky is blue . " * 20)
    window = [] if "--window" in arguments else ["--window", 8]
    run = offramp("train", folder, "--text", text, "--out", tmp_path / "run", *window, *arguments)
    assert run.exit_code != 0
    assert message in words(run).replace("│ ", "")
    assert not (tmp_path / "run" / "config.json").exists()


def test_data_without_anything_in_it(folder, tmp_path, squad):
    path = tmp_path / "empty.json"
    for text, message in [
        ("", "is empty; give a file with text"),
        ("{", "is not JSON"),
        ('{"data": []}', "holds no example for question-answering"),
    ]:
        path.write_text(text)
        run = offramp("train", folder, "--task", "question-answering", "--data", path, "--out", tmp_path / "run")
        assert run.exit_code != 0
        assert message in words(run)
    run = offramp("train", folder, "--task", "question-answering", "--data", squad(answers=False))
    assert "answers" in words(run)
    assert run.exit_code != 0
    path.write_text("\n\n")
    run = offramp("train", folder, "--prompts", path, "--out", tmp_path / "run")
    assert "is empty; give a file with text" in words(run)
    run = offramp("train", folder, "--task", "question-answering", "--data", squad(count=1, long=0))
    assert "1 documents" in words(run)
    assert run.exit_code != 0

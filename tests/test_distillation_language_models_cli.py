"""The command that distils language models, its files and its page."""

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

import offramp
from offramp import cli
from offramp.distillation.language_models import distil
from offramp.distillation.texts import entry_documents, group_names, read_entries, read_prompts
from offramp.distillation.token_report import readouts_table
from offramp.report.html import pages_of
from offramp.runs.resume import read_lines, write_lines
from tiny import tiny, tokenizer
from token_distillation import GROUPS, config, data, teacher, token_weights
from training_runs import model

# ---------------------------------------------------------------- files


def test_entries_of_files(tmp_path):
    lines = [{"q": "why is", "a": " the sky", "who": True}, {"q": "the", "a": " sky is", "who": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries = read_entries(tmp_path / "a.jsonl", ("a",), prompt="q", group="who")
    assert [(e.prompt, e.text, e.group) for e in entries] == [("why is", " the sky", "True"), ("the", " sky is", None)]
    assert group_names(entries) == ("True",)
    one, two = entry_documents(model(), entries, ("True",))
    words = tokenizer()("why is the sky")["input_ids"]
    assert (one.ids, one.start, one.attribute) == ((*words, 2), 2, 0)  # and the end of the answer
    assert (two.start, two.attribute) == (1, -1)
    (tmp_path / "b.txt").write_text("the sky\n\nwhy ?\n")
    assert [e.text for e in read_prompts(tmp_path / "b.txt")] == ["the sky", "why ?"]
    for options, message in [
        ({"prompt": "x"}, r"a.jsonl, line 1 has no 'x'; it has 'q', 'a', 'who'"),
        ({"group": "list"}, r"a.jsonl, line 1: the group is a JSON list"),
    ]:
        (tmp_path / "a.jsonl").write_text(json.dumps({**lines[0], "list": []}))
        with pytest.raises(ValueError, match=message):
            read_entries(tmp_path / "a.jsonl", ("a",), **options)
    with pytest.raises(ValueError, match="plain text and tells no prompts or groups apart"):
        read_prompts(tmp_path / "b.txt", group="who")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("distil")
    for name in ("llama", "qwen2"):
        tiny(name).save_pretrained(made / name)
        tokenizer(chat=False).save_pretrained(made / name)
    return made


def run(folders, *arguments):
    start = ["distill", folders / "llama", "--teacher", folders / "qwen2", "--task", "language-modelling"]
    return CliRunner().invoke(cli.app, [str(a) for a in (*start, *arguments)])


@pytest.fixture(scope="module")
def distilled(folders, tmp_path_factory):
    """A run of the command: its folder, its arguments and what it printed."""
    place = tmp_path_factory.mktemp("command")
    text, path, out = place / "a.jsonl", place / "result.json", place / "run"
    lines = [{"p": f"w{i} the", "text": f" sky is w{i + 1}", "kind": ["odd", "even"][i % 2]} for i in range(20, 60)]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--text", text, "--prompt-column", "p", "--group-column", "kind", "--steps", 3, "--held-out", 0.3]
    arguments += ["--method", "dedier+alpha=1+fraction=0.5", "--readout", "lens", "--layer", 2, "--weigh-every", 1]
    arguments += ["--out", out, "--json", path]
    return out, arguments, run(folders, *arguments)


def test_the_command(folders, distilled):
    out, arguments, first = distilled
    for made in (first, run(folders, *arguments)):  # the second time there is nothing left to do
        assert made.exit_code == 0, made.output
        assert "40 documents" in made.stderr
        assert "odd" in made.stdout
    result = json.loads(arguments[-1].read_text())
    assert [group["name"] for group in result["groups"]] == ["even", "odd"]
    assert (result["steps"], result["overall"]["tokens"]) == (3, 12 * 4)
    assert result["groups"][0]["weight"] > 1
    record = json.loads((out / "config.json").read_text())["config"]
    assert (record["fraction"], record["training"]["temperature"], record["weights"]["rule"]["alpha"]) == (0.5, 3, 1)
    assert offramp.load(out / "model").num_layers == 4


def test_the_command_on_own_answers(folders, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("".join(f"w{i} the sky\n" for i in range(20, 30)))
    options = ["--prompts", prompts, "--max-new-tokens", 4, "--answer-every", 2, "--steps", 3, "--method", "laplace"]
    options += ["--weigh-every", 1]
    made = run(folders, *options, "--out", tmp_path / "run")
    assert made.exit_code == 0, made.output
    record = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (record["fraction"], record["weights"]["target"]) == (1.0, "teacher")
    assert {path.name for path in (tmp_path / "run").glob("answers-*")} == {
        "answers-000000.jsonl", "answers-000002.jsonl", "answers-held-out.jsonl",
    }  # fmt: skip
    said, _ = reported(tmp_path / "run", tmp_path)
    assert "tokens of the student&#39;s own answers from before training" in said
    assert "reporting none." in said  # no groups


# ---------------------------------------------------------------- what is shown


def reported(folder, tmp_path):
    """The report's source, and the cells of its tables by title and first cell."""
    pytest.importorskip("matplotlib")
    made = CliRunner().invoke(cli.app, ["report", str(folder), "--out", str(tmp_path / "a.html")])
    assert made.exit_code == 0, made.output + str(made.exception)
    source, found = (tmp_path / "a.html").read_text(), {}
    for section in re.findall("<section.*?</section>", source, re.DOTALL):
        lines = re.findall("<tr.*?</tr>", section, re.DOTALL)
        cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in lines]
        found[re.search("<h3.*?>(.*?)</h3>", section)[1]] = {name: rest for name, *rest in cells}
    return source, found


def test_a_run_has_a_page(distilled, tmp_path):
    folder = distilled[0]
    source, found = reported(folder, tmp_path)
    titles = ["Every group", "Training curves", "Weights after each readout", "Where group labels were used"]
    assert list(found) == [*titles, "How to repeat it"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = [row for row in metrics if row["kind"] == "validation"]
    for place, group in enumerate(("even", "odd")):
        cells = found["Every group"][group]
        assert cells[0] == str(last["group_tokens"][place])
        for cell, name in zip(cells[1:5], ("kd", "ce", "agreement", "accuracy"), strict=True):
            assert cell == " -&gt; ".join(f"{row[f'group_{name}'][place]:.3f}" for row in (first, last))
    low = last["group_agreement"].index(min(last["group_agreement"]))
    assert [found["Every group"][group][-1] for group in ("even", "odd")] == [["worst", ""], ["", "worst"]][low]
    weighted = [row for row in metrics if row["kind"] == "weights"]
    assert len(weighted) == 2
    for row in weighted:
        cells = found["Weights after each readout"][str(row["step"])]
        assert cells[:5] == [
            f"{row['reweighted']:.1%}",
            *(f"{w:.2f}" for w in (row["mean"], row["largest"], *row["weight"])),
        ]
    assert source.count("<svg") == 3
    assert "teacher training unknown; student training none; weights none; selection none" in source
    assert "reporting train 112 and test 48." in source  # 28 and 12 texts of four tokens
    assert found["Every group"]["readout"] == ["lens after layer 2, should say the text&#x27;s token, every 1 steps"]
    assert "Not finished" not in source


def test_an_unfinished_run_says_so(distilled, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(distilled[0], folder)
    rows = read_lines(folder / "metrics.jsonl", "metrics")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])  # judged, one step, and half a line
    source, found = reported(folder, tmp_path)
    assert "Not finished: 1 of 3 steps" in source
    assert "Weights after each readout" not in found
    old = rows
    for row in old:
        if row["kind"] == "weights":  # as an older version wrote them
            del row["group_tokens"]
    write_lines(folder / "metrics.jsonl", old)
    assert "reporting unknown." in reported(folder, tmp_path)[0]
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="has measured nothing yet"):
        pages_of(folder, examples=0, seed=0)


def test_weights_that_touch_too_little_are_warned_of():
    row = {"kind": "weights", "step": 2, "reweighted": 0.001, "mean": 1.0, "largest": 2.0, "weight": [1.0, 1.0]}
    table = readouts_table([row], GROUPS)
    assert table.rows[0][-1] == "too few"
    assert "hardly an error left" in str(table)
    alike = readouts_table([{**row, "reweighted": None}], GROUPS)  # the control that weighs all the same
    assert alike.rows == [["2", "–", "1.00", "2.00", "1.00", "1.00"]]
    assert alike.notes == ()


def test_all_weights_alike_on_purpose_are_no_share(tmp_path):
    rule = token_weights(rule={"control": "mean-matched"}, start=0, every=8)
    result = distil(model(), teacher(), data(), config(rule, steps=1), tmp_path, groups=GROUPS)
    assert result.reweighted is None
    assert "hardly an error" not in result.table()
    assert result.overall.weight is not None


def test_what_is_longer_than_the_window_is_counted(folders, tmp_path):
    """Of texts behind prompts and of own answers alike."""
    lines = [{"p": f"w{i} the sky", "text": " is blue" * (9 if i < 23 else 1)} for i in range(20, 30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "p.txt").write_text("".join(f"w{i} the sky {'is blue ' * (i < 23) * 9}\n" for i in range(20, 30)))
    common = ["--window", 12, "--steps", 1, "--json", tmp_path / "result.json"]
    for name, options in (
        ("text", ["--text", tmp_path / "a.jsonl", "--prompt-column", "p"]),
        ("own", ["--prompts", tmp_path / "p.txt", "--max-new-tokens", 4]),
    ):
        made = run(folders, *options, *common, "--out", tmp_path / name)
        assert made.exit_code == 0, made.output
        assert "3 documents were cut to the window" in made.stdout
        assert json.loads((tmp_path / "result.json").read_text())["shortened"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --text, or --prompts"),
        (["--text", "a", "--prompts", "b"], "one of them is needed"),
        (["--text", "a", "--steps", 1, "--tokens", 2], "one of --steps and --tokens"),
    ],
)
def test_options_that_do_not_go_together(folders, arguments, message):
    made = run(folders, *arguments)
    assert made.exit_code == 2
    assert message in made.stderr


def test_at_least_one_text_or_prompt_is_taken(folders, tmp_path):
    (tmp_path / "a.txt").write_text("the sky is blue .\nwhy ?\n")
    for option in ("--text", "--prompts"):
        made = run(folders, option, tmp_path / "a.txt", "--limit", -5, "--out", tmp_path / "run")
        assert made.exit_code != 0
        assert "the first -5 are asked for; take at least one" in str(made.exception)


def test_methods_of_classifiers_are_refused(folders, tmp_path):
    (tmp_path / "a.txt").write_text("the sky is blue . " * 20)
    made = run(folders, "--text", tmp_path / "a.txt", "--method", "simkd", "--out", tmp_path / "run")
    assert made.exit_code == 2
    assert "--method simkd is for classifiers" in made.stderr
    for switches in ("dedier+depth=3", "dedier+readout.epochs=2", "kd+learning_rate=0.5"):
        made = run(folders, "--text", tmp_path / "a.txt", "--method", switches, "--out", tmp_path / "run")
        assert made.exit_code == 2
        assert "of classifiers; for language models there are --layer" in " ".join(made.stderr.split())

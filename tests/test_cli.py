"""The commands, run in this process on a tiny saved model."""

import json
import subprocess
import sys
import warnings

import pytest
from typer.testing import CliRunner

from offramp import ExitPolicy, cli
from tiny import LAYERS, tiny, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def offramp(*arguments, text=None):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=text)


def test_generate_streams_and_writes_json(folder, tmp_path):
    path = tmp_path / "out.json"
    run = offramp(
        "generate", folder, "why is the sky", "the sky", "--no-chat", "--threshold", 0.2, "--min-layer", 1,
        "--vocabulary", "fixed", "--vocabulary-size", 20, "--max-new-tokens", 6, "--json", path,
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    result = json.loads(path.read_text())
    assert result["schema"] == "offramp/generate/1"
    assert result["policy"]["vocabulary_size"] == 20
    assert [g["prompt"] for g in result["generations"]] == ["why is the sky", "the sky"]
    for generation in result["generations"]:
        assert generation["text"] in run.stdout
        layers = [token["exit_layer"] for token in generation["tokens"]]
        assert all(1 <= layer <= LAYERS for layer in layers)
        assert generation["tokens"][0]["confidence"] is None
        assert generation["costs"]["flops"] == sum(token["flops"] for token in generation["tokens"])
    assert "mean exit layer" in run.stderr
    assert "leaving before layer" in run.stderr


def test_json_on_standard_output_is_all_there_is(folder):
    run = offramp("generate", folder, "the sky", "--max-new-tokens", 3, "--json", "-")
    assert json.loads(run.stdout)["policy"] is None
    assert "full depth" in run.stderr


def test_the_prompt_may_come_from_standard_input(folder):
    run = offramp("generate", folder, "--no-chat", "--max-new-tokens", 3, "--json", "-", text="why is\n")
    assert json.loads(run.stdout)["generations"][0]["prompt"] == "why is"


def test_show_exits_names_the_layer_of_each_token(folder):
    run = offramp("generate", folder, "the sky", "--no-chat", "--max-new-tokens", 5, "--threshold", 0.2, "--show-exits")
    assert f"of {LAYERS}]" in run.stdout  # the legend
    assert run.stdout.count("/") >= 4


def test_a_saved_policy_and_options_over_it(folder, tmp_path):
    path = tmp_path / "policy.json"
    ExitPolicy("max", threshold=0.3, min_layer=2, skipped="verify").save(path)
    run = offramp("generate", folder, "the", "--policy", path, "--min-layer", 3, "--max-new-tokens", 2, "--json", "-")
    policy = json.loads(run.stdout)["policy"]
    assert (policy["confidence"], policy["min_layer"], policy["skipped"]) == ("max", 3, "verify")


def test_probe_prints_a_table_and_draws(folder, tmp_path):
    out, path, prompts = tmp_path / "run", tmp_path / "probe.json", tmp_path / "prompts.txt"
    prompts.write_text("why is the sky\n\nthe sky is blue .\n")
    run = offramp("probe", folder, "--prompts", prompts, "--max-new-tokens", 4, "--out", out, "--json", path)
    assert run.exit_code == 0, run.output
    assert json.loads(path.read_text())["schema"] == "offramp/probe/1"
    assert len(list(out.glob("*.svg"))) >= 3
    assert len(list(out.glob("*.png"))) >= 3
    assert "8 positions of 2 prompts" in run.stdout


def test_bench_compares_every_arm(folder, tmp_path):
    path, prompts = tmp_path / "bench.json", tmp_path / "prompts.txt"
    prompts.write_text("why is the sky\n")
    run = offramp(
        "bench", folder, "--prompts", prompts, "--max-new-tokens", 3, "--repeats", 1, "--min-layer", 2, "--json", path
    )
    assert run.exit_code == 0, run.output
    result = json.loads(path.read_text())
    assert result["schema"] == "offramp/bench/1"
    assert str(folder) not in run.stdout + json.dumps(result)  # as no other command tells where a model lies
    for arm in ("transformers generate", "softmax + adaptive", "jsd", "verify"):
        assert arm in run.stdout


def test_bench_of_chosen_rows_at_several_batch_sizes(folder, tmp_path):
    path = tmp_path / "bench.json"
    done = offramp(
        "bench", folder, "--max-new-tokens", 3, "--repeats", 1, "--min-layer", 1, "--mean-layer", 2,
        "--arms", "static 3,softmax + fixed", "--batch-sizes", "1,2", "--json", path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text())
    assert result["schema"] == "offramp/bench-sizes/1"
    names = [[arm["name"] for arm in bench["arms"]] for bench in result["benches"]]
    assert names == [["transformers generate", "full depth (offramp)", "static 3", "softmax + fixed"]] * 2
    assert [bench["conditions"]["batch_size"] for bench in result["benches"]] == [1, 2]
    assert [len(bench["arms"][3]["policy"]["script"]) for bench in result["benches"]] == [3, 6]
    for wrong, message in (
        (["--arms", "softmx"], "row is 'softmx'"), (["--batch-sizes", "1,0"], "give counts such as 1,4,8"),
        (["--engine", "torch", "--with-int8"], "needs what --engine native can run"),
        (["--engine", "native", "--with-int4"], "no matrix of its blocks has sixteen equally spaced values"),
        (["--dtype", "int8", "--with-int8"], "a --dtype other than int8"),
    ):  # fmt: skip
        done = offramp("bench", folder, *wrong)
        assert done.exit_code != 0
        assert message in f"{done.output} {done.exception}"


def test_bench_of_saved_policies_under_the_names_of_their_files(folder, tmp_path):
    path, checked, other = tmp_path / "bench.json", tmp_path / "checked.json", tmp_path / "a" / "checked.json"
    other.parent.mkdir()
    for file in (checked, other):
        ExitPolicy("static", min_layer=2, skipped="verify").save(file)
    call = ["bench", folder, "--max-new-tokens", 3, "--repeats", 1, "--arms", "static 3", "--json", path]
    done = offramp(*call, "--policy", checked)
    assert done.exit_code == 0, done.output
    arms = {arm["name"]: arm["policy"] for arm in json.loads(path.read_text())["arms"]}
    assert list(arms)[2:] == ["static 3", "checked"]
    assert ExitPolicy.from_dict(arms["checked"]) == ExitPolicy.load(checked)
    done = offramp(*call, "--policy", checked, "--policy", other)
    assert done.exit_code == 2
    assert "rename the file" in done.output


def test_bench_of_several_engines_says_what_cannot_run_here(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("offramp.lm.bench_playing.BACKEND", "eager")  # traced, not built: that takes minutes
    call = ["bench", folder, "--max-new-tokens", 3, "--repeats", 1, "--mean-layer", 2, "--arms", "static 3"]
    path = tmp_path / "bench.json"
    done = offramp(
        *call, "--engine", "torch", "--with-engines", "cuda,native", "--peers", "compiled", "--batch-sizes", "1,2",
        "--json", path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    ours = ["full depth (offramp)", "static 3"]
    names = ["transformers generate", "full depth (offramp)", "transformers compiled", "static 3"]
    for result in json.loads(path.read_text())["benches"]:
        assert [arm["name"] for arm in result["arms"]] == [*names, *(f"native {name}" for name in ours)]
        assert result["left_out"]["cuda"].startswith("engine is 'cuda', but the model is on cpu; load it with")
        assert {arm["memory"] for arm in result["arms"]} == {None}
    assert "cuda is left out: engine is 'cuda', but the model is on cpu" in done.stdout
    done = offramp(*call, "--engine", "torch", "--with-engines", "torch")
    assert done.exit_code == 2
    assert "on which all rows run already" in done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "x", "y", "--no-such-option"],
        ["generate", "x", "--threshold", "high"],
        ["bench"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_status_2(arguments):
    assert offramp(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "./no-such-folder", "hello"], "no-such-folder"),
        (["generate", "FOLDER", "the", "--dtype", "float8"], "float32"),
        (["generate", "FOLDER", "the", "--threshold", "1.5"], "threshold is 1.5"),
        (["generate", "FOLDER", "the", "--min-layer", "9"], "layers 1..3"),
        (["generate", "FOLDER", "the", "--confidence", "hunch"], "'softmax'"),
        (["generate", "FOLDER", " "], "empty"),
        (["generate", "FOLDER", "the", "--policy", "no-such.json"], "no-such.json does not exist; check the path"),
        (["train", "FOLDER", "--text", "no-such.txt"], "no-such.txt does not exist; check the path"),
        (["evaluate", "FOLDER", "--task", "summarisation", "--data", "no-such.json"], "no-such.json does not exist;"),
        (["train", "FOLDER", "--text", __file__, "--out", __file__], f"{__file__} is there and is no folder; name"),
    ],
)
def test_failures_are_one_line_and_status_1(folder, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["offramp", *(folder if a == "FOLDER" else a for a in arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 1
    assert error.splitlines()[-1].startswith("offramp: error: ")
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


def test_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["offramp", "generate", "./no-such-folder", "hello", "--debug"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "Traceback" in capsys.readouterr().err


def test_importing_offramp_and_its_help_do_not_import_torch():
    code = "import sys, offramp, offramp.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_warnings_about_what_was_given_are_notes(tmp_path, monkeypatch, capsys):
    """And what is wrong with a file is one line with its place, also of plain text."""

    def said(*arguments):
        monkeypatch.setattr(sys, "argv", ["offramp", *map(str, arguments)])
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            with pytest.raises(SystemExit):
                cli.main()
        return capsys.readouterr().err.strip().splitlines()

    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "the"}\n{"prompt": " "}\n')
    first, last = said("probe", tmp_path / "none", "--prompts", data)
    assert first == f"note: {data}: 1 of 2 entries are empty and were left out"
    assert last.startswith("offramp: error: ")
    data.write_bytes("good\nna\xefve\n".encode("latin-1"))
    (line,) = said("probe", tmp_path / "none", "--text", data)
    assert f"{data}, line 2 is not UTF-8; convert the file" in line

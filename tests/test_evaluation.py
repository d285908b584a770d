"""Whole evaluations: folders, several processes, arms, pictures, and the command."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import evaluation_runs
import two_processes
from evaluation_runs import POLICIES, SHORT, examples, model
from offramp import ExitPolicy, Exits, LanguageModel, cli
from offramp.core.plan import resolve
from offramp.evaluation import (
    document_arms,
    evaluate,
    grid,
    read_records,
    records,
    static_arms,
    static_sweep,
    sweep_layers,
)
from offramp.report import drawing
from offramp.runs.files import write_json
from offramp.tasks import TASKS, Example
from test_brute_force import lively
from tiny import LAYERS, tiny, tokenizer

NAMES = ["full-model", "static-2", "softmax"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, evaluation_runs.run(folder)


@pytest.fixture
def _undrawn(monkeypatch):
    monkeypatch.setattr(drawing, "available", lambda: False)


def timeless(folder):
    files = {path.name: read_records(path) for path in (folder / "records").iterdir()}
    same = {"seconds": 0, "prompt_seconds": 0, "round": 0}
    return {name: (header, [replace(r, **same) for r in records]) for name, (header, records) in files.items()}


def test_a_folder_with_everything(run):
    folder, result = run
    assert [arm.name for arm in result.arms] == ["full model", "static 2", "softmax"]
    assert {path.name for path in (folder / "records").iterdir()} == {f"{name}.jsonl" for name in NAMES}
    pictures = {f"evaluate-{name}.{suffix}" for name in ("pareto", "exits") for suffix in ("svg", "png")}
    assert {"config.json", "results.json", "table.md", "records"} | pictures <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert (folder / "table.md").read_text() == result.table() + "\n"


def test_static_exits_cost_less_and_leave_where_they_should(run):
    static = run[1].arm("static 2")
    assert static.flops_ratio.high < 1 > static.decode_flops_ratio.high
    assert static.exit_layer.value == 2
    assert static.histogram == [0, static.histogram[1], 0, 0]
    full = run[1].arm("full model")
    assert (full.agreement.value, full.identical.value, full.exit_layer.value) == (1, 1, LAYERS)


@pytest.mark.usefixtures("_undrawn")
def test_started_again_it_reads_and_arms_can_be_added(run, tmp_path):
    folder = tmp_path / "again"
    first = evaluation_runs.run(folder)
    before = {path.name: path.read_bytes() for path in (folder / "records").iterdir()}
    assert evaluation_runs.run(folder) == first
    evaluation_runs.run(folder, static_layers=(2, 3))
    after = {path.name: path.read_bytes() for path in (folder / "records").iterdir()}
    assert set(after) - set(before) == {"static-3.jsonl"}
    assert {name: after[name] for name in before} == before


def test_another_evaluation_is_refused(run):
    with pytest.raises(ValueError, match=r"holds another evaluation: examples was .* another folder"):
        evaluation_runs.run(run[0], count=4)
    with pytest.raises(ValueError, match=f"max_new_tokens was {SHORT} and is now 3"):
        evaluation_runs.run(run[0], max_new_tokens=3)


def test_arms_that_share_a_name_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(POLICIES, "Softmax!", POLICIES["softmax"])
    with pytest.raises(ValueError, match="'softmax' and 'Softmax!' would share the file"):
        evaluation_runs.run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_processes_write_what_one_does(run, tmp_path):
    """Two processes with what `accelerate launch` and `torchrun` tell theirs, on the loopback device."""
    folder = tmp_path / "two"
    codes, errors = two_processes.run(evaluation_runs.__file__, folder)
    assert codes == [0, 0], errors
    assert timeless(folder) == timeless(run[0])
    results = json.loads((folder / "results.json").read_text())
    assert results["conditions"]["processes"] == 2
    assert [arm["quality"] for arm in results["arms"]] == [arm["quality"] for arm in run[1].to_dict()["arms"]]


def test_more_processes_than_examples(tmp_path, monkeypatch):
    """The rank that gets nothing writes nothing and waits."""
    from offramp.evaluation.record_file import shared

    calls = []

    def answer(part, paths):
        calls.append((len(part), paths["arm"].name))
        return {"arm": []}

    state = SimpleNamespace(process_index=2, num_processes=3, is_main_process=False, wait_for_everyone=lambda: None)
    shared(state, {"arm": tmp_path / "arm"}, examples(2), 1, answer)
    assert calls == [(2, "arm.jsonl")]


# ---------------------------------------------------------------- turns


def rounds(folder):
    """Of each arm, when the rounds of its records began, in the order of the examples."""
    paths = (folder / "records").iterdir()
    return {path.name.removesuffix(".jsonl"): [r.round for r in read_records(path)[1]] for path in paths}


@pytest.mark.usefixtures("_undrawn")
def test_arms_take_turns_in_another_order_each_time(tmp_path, monkeypatch):
    """No arm answers its second example before all have answered their first, and none is always the first."""
    calls, answer = [], records.TaskArm.answer
    monkeypatch.setattr(
        records.TaskArm, "answer", lambda arm, batch: calls.append((batch[0].id, arm.name)) or answer(arm, batch)
    )
    result = evaluation_runs.run(tmp_path, count=12)
    played = [calls[at : at + 3] for at in range(0, len(calls), 3)]
    assert [{example for example, _ in turn} for turn in played] == [{f"q{i}"} for i in range(12)]
    assert [{arm for _, arm in turn} for turn in played] == [{"full model", "static 2", "softmax"}] * 12
    assert {turn[0][1] for turn in played} == {"full model", "static 2", "softmax"}
    full, *others = rounds(tmp_path).values()
    assert len(set(full)) == 12
    assert others == [full, full]
    assert all(arm.seconds_ratio is not None for arm in result.arms)


@pytest.mark.usefixtures("_undrawn")
def test_an_arm_that_came_later_has_no_seconds_to_compare(tmp_path):
    evaluation_runs.run(tmp_path)
    result = evaluation_runs.run(tmp_path, static_layers=(2, 3))
    assert [arm.name for arm in result.arms if arm.seconds_ratio is None] == ["static 3"]
    assert result.arm("static 3").seconds_per_token_ratio is None
    assert result.arm("static 3").flops_per_token_ratio.value < 1
    assert "static 3" not in result.front("seconds_ratio")
    found = rounds(tmp_path)
    assert not set(found["static-3"]) & set(found["full-model"])


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize("calls", [4, 8, 13])
def test_stopped_anywhere_it_goes_on_to_the_same_records(run, tmp_path, monkeypatch, calls):
    """A round that is broken off is made anew, all of it, so that its seconds compare."""
    answer, left = records.TaskArm.answer, [calls]

    def stopped(arm, batch):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return answer(arm, batch)

    monkeypatch.setattr(records.TaskArm, "answer", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluation_runs.run(tmp_path)
    assert {len(found) for found in rounds(tmp_path).values()} == {calls // 3}
    left[0] = 99
    result = evaluation_runs.run(tmp_path)
    assert timeless(tmp_path) == timeless(run[0])
    assert all(arm.seconds_ratio is not None for arm in result.arms)


@pytest.mark.usefixtures("_undrawn")
def test_files_that_stop_at_different_examples_go_on_too(run, tmp_path):
    """As a kill between two files leaves them, and half a line."""
    evaluation_runs.run(tmp_path)
    for name, kept in (("full-model", 3), ("softmax", 1)):
        path = tmp_path / "records" / f"{name}.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: 1 + kept]) + lines[1 + kept][:30])
    result = evaluation_runs.run(tmp_path)
    assert timeless(tmp_path) == timeless(run[0])
    found = rounds(tmp_path)
    together = {
        name: [a == b for a, b in zip(found["full-model"], found[name], strict=True)]
        for name in ("static-2", "softmax")
    }
    assert together == {"static-2": [True] * 3 + [False] * 2, "softmax": [True] + [False] * 2 + [True] * 2}
    assert result.arm("static 2").seconds_ratio is not None  # over the three


@pytest.mark.usefixtures("_undrawn")
def test_policies_that_learn_take_turns_without_learning_from_each_other(tmp_path, monkeypatch):
    """Two names of one policy, one threshold object: each goes on from what it had learnt itself."""
    lm = LanguageModel(lively("llama"), tokenizer(), name="tiny")
    free = ExitPolicy(threshold=0.15, min_layer=3, skipped="defer", adaptive=True)
    options = {"static_layers": (2,), "max_new_tokens": 20, "settings": {"min_new_tokens": 20}, "resamples": 20}
    evaluate(lm, evaluation_runs.TASK, examples(8), {"a": free, "b": free}, tmp_path / "both", **options)
    evaluate(lm, evaluation_runs.TASK, examples(8), {"a": free}, tmp_path / "one", **options)
    a, b, alone = (
        [(r.tokens, r.learnt) for r in read_records(tmp_path / run / "records" / f"{arm}.jsonl")[1]]
        for run, arm in (("both", "a"), ("both", "b"), ("one", "a"))
    )
    assert a == b == alone
    assert len({learnt["value"] for _, learnt in a}) > 1


# ---------------------------------------------------------------- arms


def test_static_arms_sit_at_the_trained_exits():
    lm = model()
    assert list(static_arms(lm)) == ["static 2", "static 3"]
    lm.attach_exits(Exits.fresh(lm.split, (1, 3)))
    assert list(static_arms(lm)) == ["static 1", "static 3"]
    with pytest.raises(ValueError, match=r"1\.\.3"):
        static_arms(lm, (4,))


def test_static_exits_have_the_prompts_of_the_policies_beside_them(tmp_path):
    lm = model()
    arms = {"softmax": ExitPolicy(threshold=0.1, min_layer=2, prompt_layer=2)}
    result = evaluate(lm, evaluation_runs.TASK, examples(2), arms, tmp_path, max_new_tokens=SHORT, resamples=20)
    assert [arm.name for arm in result.arms] == [
        "full model", "static 2", "static 3", "static 3, prompt to 2", "prompt to 2", "softmax"
    ]  # fmt: skip
    baseline = result.arm("prompt to 2")  # its own prompt, no exits
    assert baseline.exit_layer.value == LAYERS
    assert baseline.flops_per_token_ratio.value == pytest.approx(1)
    assert baseline.flops_ratio.value < 1
    assert baseline.name not in [found.arm for found in result.findings()]
    whole, short = (result.arm(f"static 3{prompt}") for prompt in ("", ", prompt to 2"))
    assert short.is_static
    assert short.flops_ratio.value < whole.flops_ratio.value


def test_a_sweep_stands_beside_every_static_exit_that_could_match_it():
    lm = model()
    arms = {"a": ExitPolicy(min_layer=2), "b": ExitPolicy(exit_layers=(1, 3)), "c": ExitPolicy(threshold=None)}
    assert static_sweep(lm, arms) == (1, 2, 3)
    assert static_sweep(lm, {"a": arms["a"]}) == (2, 3)
    assert static_sweep(lm, {"c": arms["c"]}) is None
    lm.attach_exits(Exits.fresh(lm.split, (2, 3)))
    assert static_sweep(lm, {"a": arms["a"]}) == (2, 3)


def test_with_trained_exits_only_they_are_tested():
    lm = model()
    lm.attach_exits(Exits.fresh(lm.split, (1, 3)))
    (policy,) = grid(lm, min_layers=(2,)).values()
    assert tuple(resolve(policy, LAYERS, lm.vocabulary, (1, 3)).thresholds) == (3,)
    with pytest.raises(ValueError, match="the last trained exit is after layer 3"):
        grid(lm, min_layers=(4,))
    assert sweep_layers(lm) == (1, 3)


def test_a_grid_has_every_combination_by_its_own_name():
    lm = model()
    arms = grid(
        lm, confidences=("softmax", "max"), thresholds=(0.5, 0.9), min_layers=(None, 2), vocabularies=(None, "fixed"),
        vocabulary_size=9,
    )  # fmt: skip
    assert len(arms) == 16 == len(set(arms.values()))
    policy = arms["max > 0.5, from 2, fixed"]
    assert (policy.confidence, policy.threshold, policy.min_layer, policy.vocabulary_size) == ("max", 0.5, 2, 9)
    assert arms["softmax > 0.9"].vocabulary_size is None
    assert "jsd + adaptive" in document_arms(lm)
    with pytest.raises(ValueError, match="vocabulary_size is 9, but nothing is pruned; name one of fixed, decaying"):
        grid(lm, vocabulary_size=9)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "squad.json"
    context = "why is the sky blue ? w20 w21"
    rows = [{"title": f"t{i}", "paragraphs": [{"context": f"{context} w{30 + i}", "qas": [
        {"id": f"{i}-{j}", "question": f"w{40 + j} ?", "answers": [{"text": "the sky", "answer_start": 7}]}
        for j in range(2)
    ]}]} for i in range(3)]  # fmt: skip
    write_json(path, {"version": "1.1", "data": rows})
    return path


def offramp(*arguments):
    return CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])


def test_names_of_a_grid_tell_all_that_was_asked_for():
    lm = model()
    assert list(grid(lm, min_layers=(2,), skipped="verify")) == ["softmax > 0.9, from 2, verify"]
    assert list(grid(lm, vocabularies=("fixed",), skipped="defer")) == ["softmax > 0.9, fixed, defer"]
    assert list(grid(lm, prompt_layer=2)) == ["softmax > 0.9, prompt to 2"]
    assert list(grid(lm)) == ["softmax > 0.9"]


def test_the_command_from_end_to_end(folder, squad, tmp_path):
    policy, path, out = tmp_path / "mine.json", tmp_path / "all.json", tmp_path / "run"
    ExitPolicy("max", threshold=0.1, min_layer=1).save(policy)
    arguments = [
        folder, "--task", "question-answering", "--data", squad, "--limit", 4, "--policy", policy, "--confidence",
        "softmax", "--threshold", "0.1,0.3", "--min-layer", 2, "--static", "1,3", "--max-new-tokens", 4, "--resamples",
        50, "--out", out, "--json", path,
    ]  # fmt: skip
    first = offramp(*arguments)
    assert first.exit_code == 0, first.output
    result = json.loads(path.read_text())
    assert result["schema"] == "offramp/evaluate/1"
    expected = ["full model", "static 1", "static 3", "mine", "softmax > 0.1, from 2", "softmax > 0.3, from 2"]
    assert [arm["name"] for arm in result["arms"]] == expected
    assert result["conditions"]["examples"] == 4
    assert all(f"| {name} " in first.stdout for name in expected)
    again = offramp(*arguments)
    assert again.exit_code == 0, again.output
    assert json.loads(path.read_text()) == result  # nothing was timed anew


@pytest.mark.usefixtures("_undrawn")
def test_a_sweep_and_the_documents_arms(folder, squad, tmp_path):
    path = tmp_path / "all.json"
    run = offramp(
        folder, "--task", "question-answering", "--data", squad, "--limit", 1, "--sweep", "--threshold", "0.2",
        "--min-layer", "1,2", "--arms", "default", "--max-new-tokens", 2, "--resamples", 20, "--out",
        tmp_path / "run", "--json", path,
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    result = json.loads(path.read_text())
    names = [arm["name"] for arm in result["arms"]]
    assert len(names) == 1 + 3 + 8 + 2 * 1 * 2 * 2
    assert {"static 1", "static 2", "static 3"} <= set(names)  # every layer from the first one tested
    assert {"jsd + adaptive", "FREE", "jsd > 0.2, from 2, fixed"} <= set(names)
    assert set(result["front"]["flops_ratio"]) <= set(names)
    assert result["arms"][0]["quality"]["f1"]["low"] is None  # a single group


@pytest.mark.usefixtures("_undrawn")
def test_perplexity_of_a_text(folder, tmp_path):
    text, path = tmp_path / "a.txt", tmp_path / "all.json"
    text.write_text(" ".join(f"w{i}" for i in range(20, 80)))
    run = offramp(
        folder, "--task", "perplexity", "--data", text, "--window", 8, "--limit", 3, "--threshold", "0.2", "--static",
        "none", "--out", tmp_path / "run", "--json", path,
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    result = json.loads(path.read_text())
    assert [arm["name"] for arm in result["arms"]] == ["full model", "softmax > 0.2"]  # no static exits were asked for
    assert result["metric"] == "perplexity"
    assert result["conditions"]["examples"] == 3
    assert all(arm["quality"]["perplexity"]["value"] > 1 for arm in result["arms"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "chess"], "choose one of question-answering"),
        (["--task", "question-answering", "--data", "b.json"], "--data is given 2 times"),
        (["--task", "question-answering", "--arms", "all"], "there is only 'default'"),
        (["--task", "question-answering", "--threshold", "high"], "give numbers with commas"),
        (["--task", "question-answering", "--threshold", "1.5"], "threshold is 1.5"),
        (["--task", "question-answering", "--static", "9"], "1..3"),
        (["--task", "question-answering", "--limit", "0"], "limit"),
        (["--task", "translation"], "squad.json"),
        (["--task", "question-answering", "--max-new-tokens", "999"], "999"),
        (["--task", "question-answering", "--vocabulary-size", "9"], "--vocabulary-size 9: no readout is pruned"),
        (["--task", "question-answering", "--arms", "default", "--vocabulary-size", "9"], "no readout is pruned"),
        (["--task", "question-answering", "--window", "9"], "--window with --task question-answering"),
        (["--task", "perplexity", "--max-new-tokens", "9"], "--max-new-tokens with --task perplexity"),
        (["--task", "perplexity", "--longest", "9", "--target", "a.txt"], "--target, --longest with --task perplexity"),
        (["--task", "perplexity", "--languages", "a,b"], "--languages with --task perplexity"),
    ],
)
def test_wrong_options(folder, squad, tmp_path, arguments, message):
    run = offramp(folder, "--data", squad, "--out", tmp_path / "run", *arguments)
    assert run.exit_code != 0
    assert message in " ".join((run.output + str(run.exception)).replace("│", " ").split())
    assert not Path(tmp_path / "run" / "results.json").exists()


# ---------------------------------------------------------------- texts that a metric cannot read


def test_a_table_names_the_tokeniser_and_says_what_cannot_be_read(tmp_path):
    task = TASKS["summarisation"]
    texts = ("今天 天气", "the sky", "👍", "blue")
    made = [Example(f"{i}", "w1 w2", (text,), f"g{i}") for i, text in enumerate(texts)]
    found = evaluate(model(), task, made, {}, tmp_path, static_layers=(2,), max_new_tokens=3, resamples=20)
    table = found.table()
    assert "tokenisers rougeL unicode, rouge1 unicode, rouge2 unicode" in table
    assert "rougeL cannot read the references of 1 of 4 examples" in table
    assert "rouge2 cannot read the references of 2 of 4 examples" in table  # there is no bigram in one word
    header = json.loads((tmp_path / "records" / "full-model.jsonl").read_text().splitlines()[0])
    assert header["tokenisers"] == dict.fromkeys(task.metrics, "unicode")


def test_a_table_of_english_names_rouge_score_and_warns_of_nothing(tmp_path):
    table = evaluation_runs.run(tmp_path).table()
    assert "tokenisers f1 squad, exact_match squad" in table
    assert "cannot read" not in table

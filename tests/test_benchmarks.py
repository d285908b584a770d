"""The studies behind docs/results: their commands exist, and their figures say what the evaluations found."""

import json
import math
import random
import shlex
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
import typer
from transformers import AutoTokenizer, LlamaConfig, T5ForConditionalGeneration

import evaluation_runs
from offramp import cli
from offramp.core.plan import resolve
from offramp.core.policy import ExitPolicy
from offramp.evaluation import evaluate, grid, read_records
from offramp.metrics.text import METRICS
from tiny import tiny, tokenizer

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import baseline  # noqa: E402 - no package: it is found by the line above
import claims  # noqa: E402
import figures  # noqa: E402
import levers  # noqa: E402
import native_kernels  # noqa: E402
import new_t5  # noqa: E402
import results  # noqa: E402
import rounding  # noqa: E402
import seeds  # noqa: E402
import t5_policies  # noqa: E402

mpl = pytest.importorskip("matplotlib")
LAYERS = (1, 2)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Two evaluations of a tiny model in one folder, as the steps "measures" and "pruning" make them."""
    torch.set_num_threads(1)
    lm, folder = evaluation_runs.model(), tmp_path_factory.mktemp("layers")
    shared = {"thresholds": (0.1,), "min_layers": LAYERS}
    made = []
    for arms in (
        grid(lm, confidences=("softmax", "contrastive", "jsd"), **shared),
        grid(lm, confidences=("softmax", "jsd"), vocabularies=("fixed", "adaptive"), vocabulary_size=8, **shared),
    ):
        options = {"static_layers": (2,), "max_new_tokens": 4, "resamples": 50, "about": {"data": "own"}}
        made.append(
            evaluate(lm, evaluation_runs.TASK, evaluation_runs.examples(4), arms, folder, **options)
        )  # fmt: skip
    return folder, made


def test_every_command_of_a_study_exists():
    group = typer.main.get_command(cli.app)
    place = {"data": "data", "run": "run"}
    names = []
    for study in results.STUDIES.values():
        for step in study.steps:
            program, *arguments = shlex.split(step.command.format(**place))
            if program in results.SCRIPTS:
                assert (results.ROOT / "benchmarks" / f"{program}.py").exists()
            elif program not in results.PREPARATIONS:
                names.append(program)
                command = group.get_command(click.Context(group), program)
                command.make_context(program, arguments)  # raises on an option it does not have
    assert {"train", "evaluate", "calibrate", "probe"} <= set(names)


def test_the_baseline_is_trained_alike_but_for_its_prompts():
    steps = {step.name: step.command for step in results.STUDIES["summarisation"].steps}
    assert "--prompt-layer" not in steps["train-full"]
    assert steps["train"].replace("--prompt-layer 14 ", "") == steps["train-full"]
    data = [steps[name].partition("--task")[2].partition("--arms")[0] for name in ("evaluate", "evaluate-full")]
    assert data[0].strip() == data[1].strip()


def test_both_evaluations_are_read_together(found):
    whole = figures.together(found[1])
    assert len({arm.name for arm in whole.arms}) == len(whole.arms) == 2 + 3 * 2 + 2 * 2 * 2
    assert list(figures.by_layer(whole, ("jsd", "adaptive"))) == list(LAYERS)
    other = replace(found[1][0], conditions={**found[1][0].conditions, "examples": 99})
    with pytest.raises(SystemExit, match="differ in examples"):
        figures.together([found[1][0], other])


def test_the_table_has_means_over_the_minimum_layers(found):
    whole = figures.together(found[1])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in figures.table(whole).splitlines()]
    assert [row[0] for row in rows[2:]] == ["jsd", "jsd + fixed", "jsd + adaptive"]
    records = [read_records(found[0] / "records" / f"jsd-0.1-from-{layer}-fixed.jsonl")[1] for layer in LAYERS]
    layers = [statistics.mean(layer for r in some for layer in r.exit_layers) for some in records]
    assert rows[3][1] == f"{statistics.mean(layers):.2f} ± {statistics.stdev(layers):.2f}"
    scores = [100 * statistics.mean(r.scores[whole.metric] for r in some) for some in records]
    assert rows[3][2] == f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}"


def test_figures_are_drawn_of_what_there_is(found, tmp_path, monkeypatch, capsys):
    files = [tmp_path / f"{number}.json" for number in range(2)]
    for file, evaluation in zip(files, found[1], strict=True):
        file.write_text(json.dumps(evaluation.to_dict()))
    for some, pictures in ((files, 3), (files[:1], 3)):
        out = tmp_path / str(len(some))
        monkeypatch.setattr(sys, "argv", ["figures", *map(str, some), "--out", str(out)])
        figures.main()
        assert len(list(out.glob("*.svg"))) == pictures
        assert ("jsd + fixed" in capsys.readouterr().out) == (len(some) == 2)
    text = (tmp_path / "2" / "figures-6-7-measures.svg").read_text()
    assert all(name in text for name in ("softmax", "contrastive", "jsd", "full model", "mean exit layer"))


def test_claims_are_paired_differences_between_arms(found):
    head, rows = claims.comparisons(figures.together(found[1]), found[0])
    assert head[4] == "f1 of an example"
    table = {tuple(row[:3]): row[3:] for row in rows}
    assert len(rows) == len(table) == 6 * 2  # all pairs but one have both of their arms
    name = "softmax-0.1-from-1"
    mine, theirs = (read_records(found[0] / "records" / f"{n}.jsonl")[1] for n in (f"{name}-adaptive", name))
    layers, quality, flops, _ = table["softmax + adaptive", "softmax", "1"]

    def depth(records):
        return sum(sum(r.exit_layers) for r in records) / sum(len(r.tokens) for r in records)

    def decoding(records):  # per token that has a pass of its own: the first one has the prompt's
        flops = sum(r.flops - r.parts["encoder"] - r.parts["prefill"] for r in records)
        return flops / sum(len(r.tokens) - 1 for r in records)

    assert layers.startswith(f"{depth(mine) - depth(theirs):+.2f} (")
    better = statistics.mean(a.scores["f1"] - b.scores["f1"] for a, b in zip(mine, theirs, strict=True))
    assert quality.startswith(f"{100 * better:+.1f} (")
    assert flops.startswith(f"{decoding(mine) / decoding(theirs):.3f} (")


def test_levers_are_paired_differences_between_any_two_arms(found):
    pair = "softmax > 0.1, from 1, adaptive|softmax > 0.1, from 1"
    (row,) = levers.levers(found[0], [pair])[1]
    rows = claims.comparisons(figures.together(found[1]), found[0])[1]
    assert row[:2] == pair.split("|")
    assert row[2:] == next(r[3:] for r in rows if r[:3] == ["softmax + adaptive", "softmax", "1"])
    for wrong in ("static 2", "static 2|static 9"):
        with pytest.raises(SystemExit, match="there are .*static 2"):
            levers.levers(found[0], [wrong])


def test_seeds_are_paired_by_arm(found):
    runs = found[1]  # two evaluations with arms in common stand for two trainings
    head, rows = seeds.seeds(runs)
    assert [row[0] for row in rows] == [arm.name for arm in runs[0].arms if arm.name in {a.name for a in runs[1].arms}]
    name, first, second, mean, flops, _ = rows[1]
    each = [100 * run.arm(name).difference["f1"].value for run in runs]
    assert [shown.split()[0] for shown in (first, second)] == [f"{value:+.1f}" for value in each]
    middle, spread = statistics.mean(each), statistics.stdev(each) / 2**0.5 * 12.706  # Student's t of one degree
    assert mean == f"{middle:+.1f} ({middle - spread:+.1f} to {middle + spread:+.1f})"
    assert float(flops.split()[0]) == pytest.approx(
        statistics.mean(run.arm(name).flops_per_token_ratio.value for run in runs), abs=0.006
    )
    assert head[1:3] == ["run 1", "run 2"]


def test_policies_of_the_translation_study_fit_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["t5_policies", str(tmp_path)])
    t5_policies.main()
    for name, policy in {**t5_policies.LEVERS, **t5_policies.CLAIMS}.items():
        assert ExitPolicy.load(tmp_path / f"{name}.json") == policy
        assert set(resolve(policy, 6, 5000, (2, 3, 4)).thresholds) <= {2, 3, 4, 5}
    steps = {step.name: step.command for step in results.STUDIES["translation"].steps}
    arms = {Path(word).stem for word in steps["evaluate"].split() if "/policies/" in word}
    arms |= {"full model", *(f"static {layer}" for layer in (2, 3, 4))}
    assert {name for pair in results.PAIRS for name in pair.split("|")} <= arms


def test_policies_are_compared_with_the_other_models_full_one(found, tmp_path):
    theirs = tmp_path / "full"
    evaluate(
        evaluation_runs.model("qwen2"), evaluation_runs.TASK, evaluation_runs.examples(4), {}, theirs,
        static_layers=(1,), max_new_tokens=4, resamples=50,
    )  # fmt: skip
    head, rows = baseline.comparison(found[0], theirs, [found[0]])
    assert head[1] == found[1][0].metric == "f1"
    table = {row[0]: row for row in rows}
    assert {"baseline", "full model", "static 2", "baseline's static 1", "softmax > 0.1, from 1"} <= set(table)
    assert "baseline's full model" not in table
    assert table[f"{found[0].name}'s full model"][1:] == table["full model"][1:]
    means = {}
    for name, path in (("mine", found[0] / "records/static-2.jsonl"), ("theirs", theirs / "records/full-model.jsonl")):
        records = read_records(path)[1]
        examples = {example.id: example for example in evaluation_runs.examples(4)}
        scores = [METRICS["f1"](record.text, examples[record.id].references) for record in records]
        means[name] = 100 * statistics.mean(scores), sum(record.flops for record in records)
    assert table["static 2"][1] == f"{means['mine'][0]:.1f}"
    assert table["static 2"][2].split()[0] == f"{means['mine'][0] - means['theirs'][0]:+.1f}"
    assert table["static 2"][3] == f"{means['mine'][1] / means['theirs'][1]:.3f}"
    against = {row[0]: row for row in baseline.comparison(found[0], theirs, [found[0]], "static 1")[1]}
    assert against["baseline"][1] == table["baseline's static 1"][1]
    assert against["baseline's full model"][1] == table["baseline"][1]
    assert against[f"{found[0].name}'s full model"][1] == table["full model"][1]  # which has no such arm
    both = baseline.comparison(theirs, theirs, [theirs], "static 1")[1]
    assert {row[1] for row in both if "static 1" in row[0]} == {against["baseline"][1]}


def test_prompts_are_what_a_t5_is_asked(tmp_path):
    import gzip

    with gzip.open(tmp_path / "en.gz", "wt", encoding="utf-8") as file:
        file.write("A dog.\nTwo men.\nNo one.\n")
    results.prompts(tmp_path / "en.gz", tmp_path / "prompts.txt", count=2)
    lines = (tmp_path / "prompts.txt").read_text().splitlines()
    assert lines == ["translate English to German: A dog.", "translate English to German: Two men."]


@pytest.fixture(scope="module")
def new_model(tmp_path_factory):
    """A new T5 for a language whose words w0 to w29 another one calls v0 to v29, in any order."""
    folder, draw = tmp_path_factory.mktemp("new"), random.Random(0)
    paths = [folder / "w.txt", folder / "v.txt"]
    words = [draw.sample(range(30), 6) for _ in range(400)]
    for path in paths:
        lines = [" ".join(f"{path.stem}{word}" for word in draw.sample(line, 6)) for line in words]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(folder / "t5"), *map(str, paths), "--vocabulary", "250", "--width", "64"])
        new_t5.main()
    return AutoTokenizer.from_pretrained(folder / "t5"), T5ForConditionalGeneration.from_pretrained(
        folder / "t5", attn_implementation="eager"
    )


def ids(tokenizer, language):
    """The tokens of all words."""
    found = [tokenizer(f"{language}{word}", add_special_tokens=False)["input_ids"] for word in range(30)]
    assert all(len(word) == 1 for word in found)
    return torch.tensor(found).flatten()


def test_a_new_t5_holds_words_and_translations_alike(new_model):
    tokenizer, model = new_model
    w, v = (torch.nn.functional.normalize(model.shared.weight[ids(tokenizer, kind)], dim=1) for kind in "wv")
    assert torch.equal((w @ v.T).argmax(1), torch.arange(30))  # by chance 1 of 30 each


def test_a_new_t5_looks_at_what_it_translates(new_model):
    tokenizer, model = new_model
    w, v = ids(tokenizer, "w")[:8], ids(tokenizer, "v")[:8]
    turned = v[torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    out = model(input_ids=w[None], decoder_input_ids=turned[None], output_attentions=True)
    looks = out.cross_attentions[0][0].mean(0).argmax(1)  # [8]: the place of the source each word looks at
    assert (v[looks] == turned).float().mean() >= 0.75  # by chance 1/8


def test_a_new_t5_refuses_files_of_different_length(tmp_path):
    tokenizer = new_t5.new_tokenizer([Path(__file__)], 300)
    paths = [tmp_path / "a", tmp_path / "b"]
    paths[0].write_text("one\ntwo\n", encoding="utf-8")
    paths[1].write_text("eins\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"\[2, 1\] lines"):
        new_t5.mean_alike(torch.zeros(300, 8), tokenizer, paths)


def test_passes_of_the_kernels_are_timed(monkeypatch, capsys):
    tiny = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    monkeypatch.setattr(native_kernels, "SHAPE", LlamaConfig(**tiny, **heads))
    native_kernels.main(
        ["--formats", "float32,bfloat16,int8,int4", "--tokens", "1,33", "--context", "3", "--rounds", "2"]
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [line[1:4:2] for line in lines if line[1] == "int4"] == [["int4", "probe"], ["int4", "1"], ["int4", "33"]]
    assert len(lines) == 13


def test_rounding_is_told_from_float32(tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    words = random.Random(0).choices([f"w{i}" for i in range(20, 60)], k=60)
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    options = ["--model", str(tmp_path / "model"), "--windows", "3", "--length", "16", "--without-peers"]
    rounding.main([str(tmp_path / "text.txt"), *options])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [line[1].strip() for line in lines] == ["offramp bfloat16", "offramp int8", "transformers bfloat16"]
    assert all(0 < float(line[2].split()[0]) < 50 and float(line[3].split()[0]) > 80 for line in lines)
    with pytest.raises(SystemExit):
        rounding.main([str(tmp_path / "text.txt"), *options[:4], "--length", "30"])


def test_divergences_and_their_intervals_are_those_of_the_formula():
    halves, tenths = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.1, 0.9]]).log()
    assert rounding.compared(halves, tenths + 3) == pytest.approx([math.log(0.5 / 0.3), 0.0])
    assert rounding.compared(tenths, tenths) == pytest.approx([0.0, 1.0], abs=1e-7)
    assert claims.shown(seeds.over([1.0, 2.0, 3.0]), 2, 10) == "20.00 (-4.84 to 44.84)"  # 2 ± 4.303 / √3

"""The end of a run: nothing lost when it is cut short, early exits that are taught, groups where they are needed."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors import safe_open

from distillation_runs import READOUT
from offramp.classifiers.loading import load
from offramp.distillation import DataConfig, Network, Study, judging, runs
from offramp.distillation import run as run_module
from offramp.distillation.data import load_set
from offramp.distillation.distill_grid import study_of as study_of_command
from offramp.distillation.grid import ensure
from offramp.distillation.linear_probes import fit_early_exits, require_linear
from offramp.distillation.networks import build, rows_for, word_tokenizer
from offramp.distillation.teacher import logits_of_all
from offramp.families.backbone import SplitEncoder
from tiny_encoders import build as tiny_classifier

WORDS = "a dog man woman runs sleeps sings in the park red blue old".split()


def write_texts(path, known=("train", "val", "test"), counts=(48, 32, 24)):
    """y is whether "good" is in the text, a whether "never" is; a is told in some splits only."""
    draw, rows = random.Random(0), []
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for n in range(count):
            y, a = n % 2, n // 2 % 2
            said = [*draw.choices(WORDS, k=4), *["good"] * y, *["never"] * a]
            rows.append({"id": f"{split} {n}", "text": " ".join(said), "split": split, "y": y,
                         "a": a if split in known else ""})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(str(path), "groups", {"text": "text"})


def study_of(data, source="text:2x32", epochs=2, **changes):
    made = Study(data, Network(source), Network(source), **changes)
    return replace(
        made, training=replace(made.training, epochs=epochs), teacher_training=replace(made.teacher_training, epochs=1)
    )


@pytest.fixture
def study(tmp_path):
    return study_of(write_texts(tmp_path / "rows.jsonl"))


def one(study, method, teacher=None):
    return runs(study, [method], [teacher] if teacher else [], [0], READOUT)[0]


def result_of(folder):
    found = json.loads((folder / "result.json").read_text())
    return {name: value for name, value in found.items() if name not in ("seconds", "digest")}


# ---------------------------------------------------------------- cut short


def test_a_run_that_is_killed_while_it_is_judged_is_not_trained_again(study, tmp_path, monkeypatch):
    run = one(study, "dedier", "erm")
    whole = result_of(ensure(run, tmp_path / "whole"))

    save = judging._save_predictions

    def killed(path, *rest):
        if run.key in str(path):
            raise KeyboardInterrupt
        save(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(judging, "_save_predictions", killed)
        with pytest.raises(KeyboardInterrupt):
            ensure(run, tmp_path / "cut")
    metrics = tmp_path / "cut" / "runs" / run.key / "training" / "metrics.jsonl"
    before = metrics.read_bytes()
    trained = []
    monkeypatch.setattr(run_module.InstanceWeights, "due", lambda *_: trained.append("again"))
    folder = ensure(run, tmp_path / "cut")
    assert result_of(folder) == whole
    assert metrics.read_bytes() == before
    assert not trained
    assert not list(folder.glob("**/checkpoint.safetensors"))  # it has served


# ---------------------------------------------------------------- number formats


@pytest.mark.parametrize("method", ["dedier", "nested", "simkd", "jtt", "dfr", "lff"])
@pytest.mark.parametrize("precision", ["bf16", None])
def test_all_passes_of_a_run_compute_in_its_precision(study, tmp_path, monkeypatch, method, precision):
    found, through = set(), SplitEncoder.run

    def noted(*arguments):
        found.add(torch.is_autocast_enabled("cpu"))
        return through(*arguments)

    trainings = {
        name: replace(getattr(study, name), precision=precision) for name in ("training", "teacher_training")
    }  # fmt: skip
    monkeypatch.setattr(SplitEncoder, "run", noted)
    teacher = "erm" if method in ("dedier", "nested", "simkd") else None
    run = one(replace(study, **trainings), method, teacher)
    folder = ensure(run, tmp_path)
    assert found == {precision == "bf16"}
    student, test = load(folder / "model").eval(), load_set(study.data, 0).test.rows
    rows = rows_for(student, test)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        wanted = torch.stack([logits.float() for _, logits in student(rows.inputs(torch.arange(len(test))))])
    with safe_open(folder / "predictions.safetensors", "pt") as file:
        got = file.get_tensor("selected")
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)


# ---------------------------------------------------------------- early exits


@pytest.mark.parametrize("method", ["group_dro", "lff", "simkd", "dett", "erm"])
def test_joint_early_exits_are_taught_whatever_the_loss(study, tmp_path, monkeypatch, method):
    study = replace(study_of(study.data, "text:3x32"), early_exits="joint")
    fitted = []

    def fit(student, rows, precision):
        fit_early_exits(student, rows, precision)
        fitted.append(student.layers)

    monkeypatch.setattr(judging, "fit_early_exits", fit)
    run = one(study, method, "erm" if method in ("simkd", "dett") else None)
    folder = ensure(run, tmp_path)
    own = result_of(folder)
    assert bool(fitted) == (method not in ("erm",))  # those of labels and logits are trained with the student
    first = build(study.student, load_set(study.data, 0).train.rows, 0)
    if method not in ("simkd", "dett"):
        linear = load(folder / "model").heads[0].linear
        assert not torch.equal(linear.weight, first.heads[0].linear.weight)
    assert np.shape(own["exits"]["accuracy"]) == (3, 4)


def save_modernbert(folder):
    torch.manual_seed(0)
    from offramp.tasks.labelled import Labelled

    tokenizer = word_tokenizer(Labelled(("0",), (" ".join([*WORDS, "good never"]),), torch.tensor([0]), ("x", "y")))
    hf.ModernBertModel(hf.ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=40, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3,
        local_attention=4, global_attn_every_n_layers=2,
    )).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_vit(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    hf.ViTModel(hf.ViTConfig(**sizes, image_size=16, patch_size=4)).save_pretrained(folder)
    return str(folder)


def write_images(folder):
    image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    lines, draw = ["id,filename,split,y,a"], np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 32), ("test", 24)):
        for n in range(count):
            y, a = n % 2, n // 2 % 2
            pixels = draw.integers(0, 60, (16, 16, 3)) + np.array([120 * y, 120 * a, 0])
            image.fromarray(pixels.astype(np.uint8)).save(folder / f"{split}{n}.png")
            lines.append(f"{split}{n},{split}{n}.png,{split},{y},{a}")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return DataConfig(str(folder / "rows.csv"), "groups", {"size": 16})


@pytest.mark.parametrize("family", ["modernbert", "vit"])
def test_networks_with_a_final_norm_are_students_and_teachers(tmp_path, family):
    if family == "vit":
        data, source = write_images(tmp_path / "images"), save_vit(tmp_path / "net")
    else:
        data, source = write_texts(tmp_path / "rows.jsonl"), save_modernbert(tmp_path / "net")
    study = study_of(data, source)
    folder = ensure(one(study, "kd", "erm"), tmp_path / "out")
    made, rows = load(folder / "model"), load_set(study.data, 0).train.rows
    found = logits_of_all(made, rows_for(made, rows))
    assert found.shape[0] == 3
    before = {name: t.clone() for name, t in made.state_dict().items()}
    fit_early_exits(made, rows_for(made, rows))  # a second fit finds the same optimum, through norms left alone
    for name, t in made.state_dict().items():
        if "linear" not in name:
            assert torch.equal(before[name], t), name
    torch.testing.assert_close(logits_of_all(made, rows_for(made, rows)), found, atol=1e-2, rtol=1e-2)
    labels = torch.nn.functional.one_hot(rows.labels, 2).float()
    for logits in found[:-1]:  # and optimum it is: the errors have no mean, since a bias is fitted without decay
        assert (logits.softmax(-1) - labels).mean(0).abs().max() < 1e-3


def test_exits_with_more_than_a_linear_layer_are_refused_before_training(study, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="exit 1 has more than a linear layer to learn, .*early_exits joint"):
        require_linear(tiny_classifier("bert", hidden=8))
    with pytest.raises(ValueError, match="exit 1 has more than a linear layer to learn"):
        require_linear(tiny_classifier("msdnet"))
    for name in ("bert", "vit", "modernbert", "resnet basic"):
        require_linear(tiny_classifier(name))
    monkeypatch.setattr(run_module, "build", lambda *_: tiny_classifier("bert", hidden=8))
    monkeypatch.setattr(run_module, "train_exits", None)
    with pytest.raises(ValueError, match="exit 1 has more than"):
        ensure(one(study, "kd", "erm"), tmp_path / "out")
    assert not (tmp_path / "out" / "shared").exists()  # not even its teacher


# ---------------------------------------------------------------- groups of validation rows


def test_groups_of_validation_rows_are_needed_only_where_something_uses_them(tmp_path):
    data = write_texts(tmp_path / "rows.jsonl", known=("test",))
    free = study_of(data, select="val_average")
    found = result_of(ensure(one(free, "kd", "erm"), tmp_path / "out"))
    assert set(found["rules"]) == {"last", "val_average", "val_worst_class", "val_loss"}
    assert found["selected"] == found["rules"]["val_average"]["epoch"]
    assert len(found["rules"]["last"]["groups"]) == 4
    assert found["groups"]["train"] is None
    assert found["history"][0]["groups"] == []
    for study, method, who in (
        (study_of(data), "erm", "the rule val_worst_group"), (free, "dfr", "dfr"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"no groups in split 'val', and {who} needs them; .* val_average"):
            ensure(one(study, method), tmp_path / "refused")
    assert not list((tmp_path / "refused").glob("*/*/training"))
    with pytest.raises(ValueError, match="no groups in split 'test'"):
        load_set(write_texts(tmp_path / "other.jsonl", known=("train", "val")), 0)


def test_a_group_without_validation_rows_stops_only_those_who_select_by_it(tmp_path):
    data = write_texts(tmp_path / "rows.jsonl", counts=(48, 32, 24))
    path = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [row for row in rows if (row["split"], row["y"], row["a"]) != ("val", 1, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    found = result_of(ensure(one(study_of(data, select="val_loss"), "erm"), tmp_path / "out"))
    assert "val_worst_group" not in found["rules"]
    with pytest.raises(ValueError, match="has no row"):
        ensure(one(study_of(data), "erm"), tmp_path / "refused")
    assert not list((tmp_path / "refused").glob("*/*/training"))


def test_validation_rows_need_no_groups_where_no_rule_looks_at_them(tmp_path):
    data = write_texts(tmp_path / "rows.jsonl", known=("train", "test"))
    values = {"data": {"options": {"text": "text"}}, "training": {"epochs": 1}, "teacher_training": {"epochs": 1}}
    command = "text:2x32", [], data.path, "groups", None
    study, _ = study_of_command(values, *command, "val_average")
    assert result_of(ensure(one(study, "kd", "group_dro"), tmp_path / "free"))["selected"] == 1
    study, _ = study_of_command({**values, "teacher_select": "val_group_mean"}, *command, "val_average")
    with pytest.raises(ValueError, match=r"the rule val_group_mean \(teacher_select\) needs them"):
        ensure(one(study, "kd", "group_dro"), tmp_path / "bound")

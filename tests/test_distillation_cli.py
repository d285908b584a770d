"""`offramp distill` from end to end, on stand-ins and on the published layouts in miniature."""

import csv
import json
import random
import re

import numpy as np
import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

from offramp import cli
from offramp.distillation.networks import word_tokenizer
from offramp.tasks.group_texts import FILE, IDENTITIES, MULTINLI
from offramp.tasks.labelled import Labelled

Image = pytest.importorskip("PIL.Image")
FEW = ["--seeds", "1", "--epochs", "1", "--method", "erm,kd,dedier"]


def run_cli(*arguments):
    """Exit status, standard output, and what went wrong."""
    found = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    return found.exit_code, found.stdout, found.stderr + str(found.exception or "")


def write(path, head, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(shade).integers(0, 60, (40, 40, 3)) + shade % 4 * 50
    Image.fromarray(noise.astype(np.uint8)).save(path)


def grouped_rows(each=(3, 8, 3)):
    """(split, y, a) such that every group has some rows in every split."""
    return [(split, y, a) for split, count in enumerate(each) for y in (0, 1) for a in (0, 1) for _ in range(count)]


@pytest.fixture
def waterbirds(tmp_path):
    folder = tmp_path / "birds" / "waterbird_complete95_forest2water2"
    rows = []
    for n, (split, y, place) in enumerate(grouped_rows(), 1):
        picture(folder / f"{n:03d}.jpg", n)
        rows.append([n, f"{n:03d}.jpg", y, split, place, "x"])
    write(folder / "metadata.csv", ["img_id", "img_filename", "y", "split", "place", "place_filename"], rows)
    return ["--task", "waterbirds", "--data", str(folder.parent)]


@pytest.fixture
def celeba(tmp_path):
    folder, attributes, splits = tmp_path / "celeba", [], []
    for n, (split, y, a) in enumerate(grouped_rows(), 1):
        picture(folder / "img_align_celeba" / f"{n:06d}.jpg", n)
        attributes.append([f"{n:06d}.jpg", 2 * y - 1, 2 * a - 1])
        splits.append([f"{n:06d}.jpg", split])
    write(folder / "list_attr_celeba.csv", ["image_id", "Blond_Hair", "Male"], attributes)
    write(folder / "list_eval_partition.csv", ["image_id", "partition"], splits)
    return ["--task", "celeba", "--data", str(folder)]


WORDS = "a dog man woman runs sleeps sings never no not in the park red blue old you are kind awful men women".split()


@pytest.fixture
def multinli(tmp_path):
    draw, folder = random.Random(0), tmp_path / "nli"
    folder.mkdir()
    for file, count in zip(MULTINLI, (200, 40, 40), strict=True):
        with (folder / file).open("w") as out:
            for n in range(count):
                said = [draw.choice(WORDS[:7]) for _ in range(4)] + ["never"] * (n % 2)
                label = ("contradiction", "entailment", "neutral")[n // 2 % 3]
                out.write(
                    json.dumps({"gold_label": label, "sentence1": "a dog runs", "sentence2": " ".join(said)}) + "\n"
                )
    return ["--task", "multinli", "--data", str(folder)]


@pytest.fixture
def civilcomments(tmp_path):
    draw, rows = random.Random(0), []
    for split, y, a in grouped_rows():
        text = " ".join(draw.choice(WORDS) for _ in range(6))
        identities = [a if name == "male" else 0 for name in IDENTITIES]
        rows.append([text, ("train", "val", "test")[split], y, *identities, a])
    write(tmp_path / "civil" / FILE, ["comment_text", "split", "toxicity", *IDENTITIES, "identity_any"], rows)
    return ["--task", "civilcomments", "--data", str(tmp_path / "civil")]


def resnet(folder, seed):
    torch.manual_seed(seed)
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic")
    hf.ResNetModel(config).save_pretrained(folder)
    return str(folder)


def bert(folder, seed, layers):
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(Labelled(("0",), (" ".join(WORDS),), torch.tensor([0]), ("x", "y")))
    hf.BertModel(
        hf.BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=256,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["waterbirds", "celeba"])
def test_published_image_sets(name, request, tmp_path):
    data = request.getfixturevalue(name)
    student, teacher = resnet(tmp_path / "small", 0), resnet(tmp_path / "large", 1)
    values = json.loads(run_settings(name))
    values["data"]["options"]["size"] = 32  # the one thing that a test changes
    (tmp_path / "settings.json").write_text(json.dumps(values))
    code, out, err = run_cli(
        "distill", student, "--teacher", teacher, *data, "--config", str(tmp_path / "settings.json"), *FEW,
        "--teacher-method", "group_dro", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, err
    expected = ("Teacher: group_dro", "| dedier", "val_group_mean", "teacher training train", "no worst group can be")
    for said in expected:
        assert said in out


@pytest.mark.parametrize("name", ["multinli", "civilcomments"])
def test_published_text_sets(name, request, tmp_path):
    data = request.getfixturevalue(name)
    student, teacher = bert(tmp_path / "small", 0, 3), bert(tmp_path / "large", 1, 3)
    code, out, err = run_cli(
        "distill", student, "--teacher", teacher, *data, "--config", name, *FEW, "--teacher-method", "erm",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, err
    assert "Teacher: erm" in out
    result = json.loads(next((tmp_path / "out" / "runs").glob("dedier*/result.json")).read_text())
    assert result["method"]["weights"]["readout"]["depth"] == {"multinli": 2, "civilcomments": 1}[name]
    assert result["groups"]["names"][0] in ("contradiction, no negation", "non-toxic, no identity")


def run_settings(name):
    from offramp.distillation.config import bundled

    return json.dumps(bundled(name))


def test_a_stand_in_needs_nothing_else(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    command = "distill small-cnn:4 --teacher small-cnn:4 --data stand-in:digits-on-colour --seeds 2 --epochs 2".split()
    command += ["--method", "erm,kd,dedier+alpha=1", "--teacher-method", "erm"]
    folder = tmp_path / "runs" / "distill-digits-on-colour"
    code, out, err = run_cli(*command, "--json", str(tmp_path / "found.json"))
    assert code == 0, err
    found = json.loads((tmp_path / "found.json").read_text())["teachers"]["erm"]
    assert set(found) == {"erm", "kd", "dedier+alpha=1"}
    assert found["kd"]["difference"] is None
    assert found["erm"]["difference"]["low"] <= found["erm"]["difference"]["mean"]
    assert (folder / "report.md").read_text() in out
    titles = ["Worst group", "Every group", "What distillation cost each group", "Exits by group"]
    titles += ["Weights of training rows", "Worst group by what each selection rule would have chosen"]
    assert re.findall("^### (.*)$", out, re.MULTILINE) == [*titles, "Where group labels were used"]
    config = json.loads(next((folder / "runs").glob("erm*/config.json")).read_text())
    assert config["study"]["data"]["options"] == {"agreement": 0.95}
    code, again, err = run_cli(*command)
    assert (code, again) == (0, out)  # nothing is done twice


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["small-cnn:4"], "--data is missing"),
        (["--data", "stand-in:digits-on-colour", "--config", "{}"], "no such file"),
        (["small-cnn:4", "--data", "stand-in:digits-on-colour", "--device", "moon"], "device 'moon' is not available"),
        (["small-cnn:4", "--data", "stand-in:colours"], "the stand-in is 'colours'; allowed are 'digits-on-colour'"),
        (["small-cnn:4", "--data", "somewhere"], "the task is None; choose one of waterbirds"),
        (["small-cnn:4", "--data", "no-folder", "--task", "waterbirds", "--seeds", "1"], "no-folder is missing"),
        (["small-cnn:4", "--data", "stand-in:digits-on-colour", "--method", "dedeir"], "there is no method 'dedeir'"),
        (["small-cnn:4", "--data", "stand-in:digits-on-colour", "--teacher", "a:1", "--teacher", "b:2"], "one network"),
        (["small-cnn:4", "--data", "stand-in:mnist-on-colour", "--seeds", "1"], "give stand-in:mnist-on-colour:FOLDER"),
        (["small-cnn:4", "--data", "stand-in:digits-on-colour", "--teacher-method", "best"], "the teacher is 'best'"),
    ],
)  # fmt: skip
def test_wrong_options(options, said, tmp_path):
    code, _, err = run_cli("distill", *options, "--out", str(tmp_path))
    assert code != 0
    assert said in " ".join(err.replace("│", " ").split())

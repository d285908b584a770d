"""What a run is made of besides its options: data that changed, logits of other rows, teachers that know test rows."""

import hashlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offramp.classifiers.config import ClassifierTrainConfig
from offramp.classifiers.loading import load
from offramp.distillation import DataConfig, Network, Study, run_grid, runs
from offramp.distillation.data import load_set
from offramp.distillation.grid import digests
from offramp.distillation.results import results_in
from offramp.distillation.teacher import load_logits, require_unseen, save_logits
from offramp.report.distillation import grid_page, run_page
from offramp.report.grids import tables
from offramp.runs.tensor_files import write_tensors
from offramp.tasks.labelled import input_hashes, row_hashes
from sealing import rewrite

TRAINING = ClassifierTrainConfig(epochs=1, batch_size=16)
WORDS = "red blue old young".split()


def rows(counts=(16, 16, 12)):
    """y is whether "good" is in the text, a whether "never" is."""
    return [
        {"id": f"{split} {n}", "split": split, "y": n % 2, "a": n // 2 % 2,
         "text": " ".join([WORDS[n % 4], str(n), split, *["good"] * (n % 2), *["never"] * (n // 2 % 2)])}
        for split, count in zip(("train", "val", "test"), counts, strict=True) for n in range(count)
    ]  # fmt: skip


def write(path, given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given))


def study_of(path, task="groups", **options):
    data = DataConfig(str(path), task, options or {"text": "text"})
    network = Network("text:1x8")
    return Study(data, network, network, training=TRAINING, teacher_training=TRAINING, select="last")


def one(study, method="erm", teacher=None, seed=0):
    return runs(study, [method], [teacher] if teacher else [], [seed])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A set, and a grid of one run."""
    folder = tmp_path_factory.mktemp("made")
    write(folder / "rows.jsonl", rows())
    study = study_of(folder / "rows.jsonl")
    run_grid(one(study), folder / "grid")
    return folder, study


# ---------------------------------------------------------------- data that changed


@pytest.mark.parametrize(
    ("split", "key", "value"),
    [
        ("test", "y", 1),
        ("test", "text", "something else"),
        ("val", "a", 1),
        ("train", "text", "else"),
        ("test", "a", 1),
    ],
)
def test_a_grid_goes_on_with_the_same_data_only(made, split, key, value):
    folder, study = made
    path, result = folder / "rows.jsonl", folder / "grid" / "runs" / "erm--seed0" / "result.json"
    before = result.read_bytes()
    write(path, [{**row, key: value} if row["id"] == f"{split} 0" else row for row in rows()])
    try:
        with pytest.raises(ValueError, match=f"of other data: .* is {split} rows; give the same files"):
            run_grid([*one(study), *one(study, seed=1)], folder / "grid")
    finally:
        write(path, rows())
    assert not (folder / "grid" / "runs" / "erm--seed1").exists()
    assert run_grid(one(study), folder / "grid")[0]["key"] == "erm--seed0"
    assert result.read_bytes() == before


def without_rows(values):
    """A classifier that says nothing of what it was trained on."""
    del values["files"]["training_rows.safetensors"]


def test_runs_of_older_versions_have_no_digests_and_are_taken(made, tmp_path):
    folder, study = made
    shutil.copytree(folder / "grid", tmp_path / "grid")
    config = tmp_path / "grid" / "runs" / "erm--seed0" / "config.json"
    assert set(json.loads(config.read_text())["digests"]) == {"train rows", "val rows", "test rows"}
    rewrite(config, lambda values: {name: value for name, value in values.items() if name != "digests"})
    assert [result["key"] for result in run_grid(one(study), tmp_path / "grid")] == ["erm--seed0"]
    assert len(results_in(tmp_path / "grid")[0]) == 1


def test_a_given_teacher_is_known_by_what_it_holds(made, tmp_path):
    folder, study = made
    model = shutil.copytree(folder / "grid" / "runs" / "erm--seed0" / "model", tmp_path / "model")
    for teacher, file in ((f"folder:{model}", model / "model.safetensors"), (f"logits:{tmp_path}/l", tmp_path / "l")):
        for content in (b"one", b"other"):
            file.write_bytes(content)
            assert digests(one(study, "kd", teacher)[0])["teacher"] == hashlib.sha256(content).hexdigest()
    assert "teacher" not in digests(one(study, "kd", "erm")[0])


# ---------------------------------------------------------------- logits of other rows


@pytest.mark.parametrize("name", ["template-nli", "template-toxicity"])
def test_logits_of_another_seeds_sentences_are_refused(tmp_path, name):
    """Both name their rows by place, but draw the sentences anew."""
    options = {"train": 1200, "val": 60, "test": 60}
    first, other = (load_set(DataConfig(f"stand-in:{name}", options=options), seed).train.rows for seed in (0, 1))
    assert first.ids == other.ids
    logits, path = torch.arange(float(len(first.classes)) * len(first)).reshape(len(first), -1), tmp_path / "logits"
    save_logits(path, logits, first.ids, first.classes, "someone", first.inputs)
    assert torch.equal(load_logits(path, first.take([5, 3])), logits[[5, 3]])
    differing = sum(a != b for a, b in zip(first.inputs, other.inputs, strict=True))
    with pytest.raises(ValueError, match=f"is of other data: {differing} of 1200 rows .* such as 'train-"):
        load_logits(path, other)
    save_logits(path, logits, first.ids, first.classes, "someone")  # as older versions did
    assert torch.equal(load_logits(path, other), logits)


def test_images_in_memory_are_known_by_their_values_and_those_in_files_by_their_names():
    images = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)
    first, again = input_hashes(images), input_hashes(images.copy()[:, ::-1, ::-1][:, ::-1, ::-1])
    assert torch.equal(first, again)
    images[1, 2, 2, 2] += 1
    assert (input_hashes(images) == first).tolist() == [True, False]
    assert (input_hashes(("a", "b")) == input_hashes(("a", "c"))).tolist() == [True, False]
    assert input_hashes(SimpleNamespace(paths=())) is None


# ---------------------------------------------------------------- teachers that know test rows


def test_a_teacher_that_was_trained_on_test_rows_is_refused(tmp_path):
    """Seed 1 divides the digits anew, so that test digits of it were training digits of seed 0."""
    pytest.importorskip("sklearn")
    options = {"train": 200, "val": 40, "test": 100, "agreement": 0.8}
    study = study_of("stand-in:digits-on-colour", None, **options)
    study = replace(study, student=Network("small-cnn:2"), teacher=Network("small-cnn:2"))
    run_grid(one(study), tmp_path / "first")
    model = tmp_path / "first" / "runs" / "erm--seed0" / "model"
    taught = load(model).training_rows
    data = [load_set(study.data, seed) for seed in (0, 1)]
    assert taught.tolist() == row_hashes(data[0].train.rows, "digits-on-colour").tolist()
    seen = len(set(data[0].train.rows.ids) & set(data[1].test.rows.ids))
    asked = runs(study, ["erm", "kd"], [f"folder:{model}"], [0, 1])
    with pytest.raises(ValueError, match=f"was trained on {seen} of the 200 test rows .*seed 1"):
        run_grid(asked, tmp_path / "grid")
    assert seen > 0
    assert not (tmp_path / "grid" / "runs").exists()  # nothing was trained
    (found,) = run_grid(asked[1:2], tmp_path / "grid")
    assert found["teacher_unseen"] is True
    assert found["changes"] is not None
    assert "does not say what it was trained on" not in tables([found], "last")
    older = shutil.copytree(model, tmp_path / "older")
    (older / "training_rows.safetensors").unlink()
    rewrite(older / "config.json", without_rows)
    assert load(older).training_rows is None
    (found,) = run_grid(one(study, "kd", f"folder:{older}", seed=1), tmp_path / "grid")
    assert found["teacher_unseen"] is None
    assert "does not say what it was trained on" in tables([found], "last")


def test_a_student_that_was_trained_on_test_rows_is_refused_and_remembers_what_it_began_as(tmp_path):
    pytest.importorskip("sklearn")
    options = {"train": 200, "val": 40, "test": 100, "agreement": 0.8}
    study = study_of("stand-in:digits-on-colour", None, **options)
    study = replace(study, student=Network("small-cnn:2"), teacher=Network("small-cnn:2"))
    run_grid(one(study, "group_dro"), tmp_path / "first")
    model = tmp_path / "first" / "runs" / "group_dro--seed0" / "model"
    further, taught = (replace(study, **{part: Network(str(model))}) for part in ("student", "teacher"))
    for asked in (one(further, "erm", seed=1), one(taught, "kd", "erm", seed=1)):
        with pytest.raises(ValueError, match=f"{model} was trained on .* of the 200 test rows .*seed 1"):
            run_grid(asked, tmp_path / "grid")
    assert not (tmp_path / "grid" / "runs").exists()  # nothing was trained
    (found,) = run_grid(one(further), tmp_path / "grid")
    known = [each for each in found["budget"] if each[0] == "student training"]
    assert known == [["student training", "train", 200]]  # GroupDRO's, not plain training's
    saved = tmp_path / "grid" / "runs" / "erm--seed0" / "model"
    assert load(saved).training_rows.tolist() == load(model).training_rows.tolist() * 2
    (model / "training_rows.safetensors").unlink()
    rewrite(model / "config.json", without_rows)
    run_grid(one(further), tmp_path / "unknown")
    assert load(tmp_path / "unknown" / "runs" / "erm--seed0" / "model").training_rows is None


def test_a_folder_is_of_one_study(made, tmp_path):
    folder, study = made
    other = replace(study, training=replace(study.training, epochs=2))
    with pytest.raises(ValueError, match="holds runs of another study, such as erm--seed0: training.epochs was 1 and"):
        run_grid(one(other, "group_dro"), folder / "grid")
    assert not (folder / "grid" / "runs" / "group_dro--seed0").exists()
    shutil.copytree(folder / "grid", tmp_path / "mixed")  # as older versions let it be
    run_grid(one(other, "group_balanced"), tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "runs", tmp_path / "mixed" / "runs", dirs_exist_ok=True)
    said = _texts(grid_page(tmp_path / "mixed"))
    assert any("1 runs are of another study (training.epochs was" in text for text in said)
    assert not any("another study" in text for text in _texts(grid_page(folder / "grid")))


def test_test_rows_that_the_set_repeats_in_training_are_not_the_teachers_fault(tmp_path):
    data = load_set(DataConfig("stand-in:template-toxicity", options={"train": 1200, "val": 60, "test": 600}), 0)
    assert set(data.train.rows.inputs) & set(data.test.rows.inputs)
    for rows, unseen in ((data.train.rows, True), (data.test.rows, False)):
        write_tensors(tmp_path / "training_rows.safetensors", {"rows": row_hashes(rows, "")})
        if unseen:
            assert require_unseen(f"folder:{tmp_path}", data) is True
        else:
            others = sum(text not in data.train.rows.inputs for text in data.test.rows.inputs)
            with pytest.raises(ValueError, match=f"was trained on {others} of the 600 test rows"):
                require_unseen(f"folder:{tmp_path}", data)
    assert require_unseen(f"logits:{tmp_path}", data) is None


# ---------------------------------------------------------------- what cannot be, before anything is trained


def test_groups_that_overlap_are_not_for_dfr(tmp_path):
    options = {"train": 1200, "val": 60, "test": 600}
    study = replace(study_of("stand-in:template-toxicity", None, **options), select="val_worst_group")
    with pytest.raises(RuntimeError, match="validation rows in several groups or in none, and dfr needs each in one"):
        run_grid(one(study, "dfr"), tmp_path)
    assert not (tmp_path / "shared").exists()  # no plain student whose layer would be refitted


def test_texts_are_not_augmented(made, tmp_path):
    _, study = made
    with pytest.raises(RuntimeError, match="pad and flip change images, but .* holds texts"):
        run_grid(one(replace(study, flip=True)), tmp_path)


# ---------------------------------------------------------------- texts that were cut


def test_texts_that_were_cut_are_counted_and_told(made, tmp_path):
    folder, study = made
    short = replace(study, student=Network("text:1x8", longest=6))
    words = {row["id"]: len(row["text"].split()) for row in rows()}  # each a token; [CLS] and [SEP] come besides
    split = {name: sum(n > 4 for id, n in words.items() if id.startswith(name)) for name in ("train", "val", "test")}
    (found,) = run_grid(one(short), tmp_path)
    assert found["truncated"] == split == {"train": 4, "val": 4, "test": 3}
    said = "Texts longer than the student takes were cut: 4 in train, 4 in val, 3 in test"
    assert f"{said}." in tables([found], "last")
    assert f"{said} at most." in tables([found, {**found, "seed": 1}], "last")
    assert any(said in text for text in _texts(run_page(tmp_path / "runs" / found["key"], found)))
    (whole,) = run_grid(one(study), folder / "grid")
    older = {name: value for name, value in whole.items() if name != "truncated"}
    assert set(whole["truncated"].values()) == {0}
    for result in (whole, older):
        assert "were cut" not in tables([result], "last")


def _texts(page):
    return [line for section in page.sections for block in section.blocks for line in getattr(block, "paragraphs", ())]

"""What files and names may set, what a run is called, and what is said of teachers that were not trained here."""

import json
from dataclasses import replace

import pytest

from offramp.distillation import DataConfig, Network, Study, runs
from offramp.distillation.config import BUNDLED, Run, bundled, study_from
from offramp.distillation.grid import run_grid
from offramp.distillation.judging import label_budget
from offramp.distillation.methods import METHODS, method
from offramp.metrics.selection import LabelBudget
from offramp.runs.codec import encode

STUDY = Study(DataConfig("folder", "groups"), Network("small-cnn:4"), Network("small-cnn:6"))


def one(name, teacher=None, settings=None, study=STUDY):
    return runs(study, [name], [teacher] if teacher else [], [0], settings)[0]


# ---------------------------------------------------------------- files


def test_lists_in_a_file_become_tuples():
    made = study_from(
        {"student": {"exits": [1, 2]}, "teacher": {"exits": None}, "training": {"weights": "uniform"}}, STUDY
    )
    assert made.student.exits == (1, 2)
    assert made.teacher.exits is None
    assert made.training.weights == "uniform"
    run = one("erm", study=made)
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"student": {"exits": [1, "2"]}}, r"exits is \[1, '2'\]; a list of int or null is needed"),
        ({"student": {"exits": 2}}, "exits is 2; a list of int or null is needed"),
        ({"student": {"exits": [True]}}, "exits is"),
        ({"training": {"weights": ["a"]}}, r"weights is \['a'\]; a str or a list of float is needed"),
        ({"training": {"epochs": {"a": 1}}}, "epochs is .*; an int is needed"),
        ({"training": {"epochs": 1.5}}, "epochs is 1.5; an int is needed"),
        ({"training": {"clip": True}}, "clip is True; a float or null is needed"),
        ({"training": 3}, "training is 3; a ClassifierTrainConfig is needed"),
        ({"data": {"options": "size"}}, "options is 'size'; a Mapping is needed"),
        ({"flip": 1}, "flip is 1; a bool is needed"),
        ({"training": {"weights": [0, 1.5, 2]}}, r"training has label_smoothing 0.0 and weights \(0, 1.5, 2\)"),
        ({"teacher_training": {"label_smoothing": 0.1}}, "training has label_smoothing 0.1 and weights 'uniform'"),
    ],
)
def test_values_of_another_type_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        study_from(values, STUDY)


@pytest.mark.parametrize("changes", [{"flip": True}, {"pad": 2}])
@pytest.mark.parametrize(
    ("name", "teacher", "said"),
    [
        ("simkd", "erm", "simkd learns from the teacher's features of images as they are"),
        ("dett", "folder:x", "dett learns from the teacher's features"),
        ("kd", "logits:x.safetensors", "kd learns from logits:x.safetensors of images as they are"),
    ],
)
def test_what_a_teacher_said_once_is_not_for_augmented_images(changes, name, teacher, said):
    augmented = replace(STUDY, **changes)
    with pytest.raises(ValueError, match=f"{said}.*leave both out"):  # before a teacher is trained
        one(name, teacher, study=augmented)
    assert one("kd", "erm", study=augmented).study.augments
    assert one(name, teacher).name == name


@pytest.mark.parametrize("name", BUNDLED)
def test_no_readout_takes_over_a_rate_of_another_optimiser(name):
    """As SGD took over AdamW's 2e-5 in the settings for texts, by which it learnt nothing."""
    values = bundled(name)
    training, general = values["training"], values["methods"]["*"]["weights"]["readout"]
    assert "learning_rate" in general or general["optimiser"] == training["optimiser"]
    task = values["data"].get("task")
    base = Study(DataConfig("folder" if task else f"stand-in:{name}", task), Network("small-cnn:4"), Network("x"))
    own = {key: value for key, value in values.items() if key not in ("data", "student", "teacher")}
    made = one("dedier", "erm", values["methods"], study_from(own, base)).method.weights.readout
    if training["optimiser"] == "adamw":
        assert (made.optimiser, made.learning_rate) == ("adamw", 0.005)


def test_a_readout_with_an_optimiser_of_its_own_needs_a_rate():
    adamw = {"weights": {"readout": {"optimiser": "sgd"}}}
    with pytest.raises(
        ValueError, match="dedier: the readout learns by sgd, .* is one of adamw, .* give a readout.lear"
    ):
        one("dedier", "erm", {"*": adamw})
    with pytest.raises(ValueError, match="the readout learns by sgd"):
        one("dedier+readout.optimiser=sgd", "erm")
    assert (
        one("dedier+readout.optimiser=sgd+readout.learning_rate=0.1", "erm").method.weights.readout.optimiser == "sgd"
    )
    assert one("dedier+readout.optimiser=adamw", "erm").method.weights.readout.learning_rate is None  # the student's
    assert one("dedier_oracle", "erm", {"*": adamw}).name == "dedier_oracle"  # which has no readout


def test_settings_of_a_method_leave_the_general_ones_inside_of_them():
    general = {"weights": {"readout": {"optimiser": "adamw", "learning_rate": 0.005}}}
    settings = {"*": general, "dedier": {"weights": {"readout": {"depth": 2}}}}
    made = one("dedier", "erm", settings).method
    assert made == one("dedier+depth=2", "erm", {"*": general}).method
    assert (made.weights.readout.optimiser, made.weights.readout.depth) == ("adamw", 2)


@pytest.mark.parametrize("name", ["kd+refit=true", "group_dro+refit=true", "dedier+refit=true", "dfr+balanced=true"])
def test_a_last_layer_is_refitted_of_a_plain_student_alone(name):
    with pytest.raises(ValueError, match="refit is of a plainly trained student's last layer"):
        method(name)


def test_what_data_are_called(tmp_path):
    assert DataConfig("stand-in:mnist-on-colour:/data/mnist").name == "mnist-on-colour"
    assert DataConfig(str(tmp_path / "rows.jsonl.gz"), "groups").name == "rows"


# ---------------------------------------------------------------- switches behind a name


def test_switches_of_all_parts_can_be_set_behind_a_name():
    found = method("dedier+depth=2+readout.epochs=3+readout.learning_rate=0.1+width=7+learning_rate=0.2")
    readout = found.weights.readout
    assert (readout.depth, readout.epochs, readout.learning_rate, readout.width) == (2, 3, 0.1, 7)
    assert found.learning_rate == 0.2
    assert method("jtt+factor=20+errors.epochs=3").errors == replace(METHODS["jtt"].errors, factor=20, epochs=3)
    assert method("dett+errors.by=sampling").errors.by == "sampling"
    clipped = method("dedier+normalise=clip+largest=10").weights  # neither can be set without the other
    assert (clipped.normalise, clipped.largest) == ("clip", 10)
    for text, said in {
        "kd+depth=2": "has no weights", "jtt+epochs=3": "has no 'epochs'", "dedier+readout.deep=2": "has no 'deep'",
        "dedier+readout=2": "readout", "dedier+weights=null+alpha=1": "sets weights and something of it",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=said):
            method(text)


@pytest.mark.parametrize("name", METHODS)
def test_every_switch_can_be_set_behind_a_name(name):
    """Each field of a method, set to the value that it has, leaves the method as it is."""

    def switches(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from switches(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}={json.dumps(value)}"

    found = METHODS[name]
    assert method("+".join((name, *switches(encode(found))))) == found


# ---------------------------------------------------------------- teachers that are trained here


def test_a_teacher_learns_by_the_settings_of_the_file():
    settings = bundled("waterbirds")["methods"]
    taught = one("kd", "jtt", settings).teacher_run()
    assert (taught.method.errors.epochs, taught.method.errors.factor) == (60, 100)
    assert (taught.method.learning_rate, taught.method.weight_decay) == (1e-5, 1.0)
    first = taught.first_run()
    assert first.study.training.epochs == 60
    assert (first.method.learning_rate, first.method.weight_decay) == (1e-5, 1.0)
    dro = one("kd", "group_dro", {"group_dro": {"adjustment": 2.0, "step": 0.1}}).teacher_run()
    assert (dro.method.adjustment, dro.method.step) == (2.0, 0.1)
    assert dro.study.select == STUDY.teacher_select
    for teacher in ("jtt", "dfr"):
        run = one("kd", teacher, settings)
        again = Run.from_dict(json.loads(json.dumps(run.to_dict())))
        assert again == run
        assert again.teacher_run() == run.teacher_run()


def test_runs_without_settings_for_their_teacher_are_what_they_were():
    """So that grids that were begun by an older version go on."""
    for settings in (None, bundled("digits-on-colour")["methods"]):
        for teacher in ("erm", "group_dro"):
            found = one("dedier", teacher, settings).to_dict()
            assert list(found) == ["schema", "study", "name", "method", "teacher", "seed", "apart"]
            assert one("kd", teacher, settings).teacher_run().method == METHODS[teacher]
    run = one("kd", "erm")
    assert (run.key, run.digest) == ("kd--erm--seed0", "a116183e791f")


# ---------------------------------------------------------------- teachers that are given


def test_teachers_of_one_name_have_runs_of_their_own(tmp_path, monkeypatch):
    folders = [f"folder:{tmp_path / name / 'model'}" for name in ("a", "b")]
    keys = [run.key for run in runs(STUDY, ["kd"], folders, [0])]
    assert len(set(keys)) == 2
    assert [key.rpartition("-")[0].rpartition("-")[0] for key in keys] == [
        "kd--a-" + keys[0][6:14],
        "kd--b-" + keys[1][6:14],
    ]
    monkeypatch.chdir(tmp_path)
    assert one("kd", "folder:a/model") == one("kd", folders[0])  # by whatever path
    assert one("kd", "erm").key == "kd--erm--seed0"
    assert one("kd", "logits:x/y.safetensors").key == "kd--y.safetensors--seed0"
    both = runs(STUDY, ["kd"], ["logits:x/y.safetensors", "logits:z/y.safetensors"], [0])
    with pytest.raises(ValueError, match=r"rename the file of logits:x/y.safetensors or that of logits:z/y"):
        run_grid(both, tmp_path)


@pytest.mark.parametrize("teacher", ["folder:somewhere/model", "logits:somewhere"])
def test_what_a_given_teacher_was_trained_on_is_unknown(teacher):
    run = one("kd", teacher, study=replace(STUDY, select="val_average"))
    budget = label_budget(run, 100, 20, 30)
    assert budget.label_free is None
    assert budget.line() == (
        "Group labels used (label-free as far as is known): teacher training unknown; student training none; weights "
        "none; selection none; calibration none; reporting train 100 and test 30."
    )
    rows = json.loads(json.dumps([[use, split, count] for (use, split), count in budget.used.items()]))
    assert LabelBudget({(use, split): count for use, split, count in rows}) == budget
    selected = label_budget(replace(run, study=STUDY), 100, 20, 30)
    assert selected.label_free is False
    assert "teacher training unknown" in selected.line()
    assert label_budget(one("erm", study=replace(STUDY, select="last")), 100, 20, 30).label_free is True


def saved(folder, budget, schema="offramp/distill/1"):
    """As a finished run leaves its folder; the teacher in it, as it is given."""
    (folder / "model").mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"schema": schema, "budget": budget}))
    return f"folder:{folder / 'model'}"


@pytest.mark.parametrize(
    ("used", "said", "free"),
    [
        ([["reporting", "train", 90], ["reporting", "test", 30]], "none", True),
        ([["student training", "train", 90], ["weights", "train", 80], ["selection", "val", 20]],
         "train 90 and val 20", False),
        ([["teacher training", "train", None], ["selection", "val", 20]], "unknown", False),
        ([["teacher training", "train", None]], "unknown", None),
        ([["teacher training", "train", None], ["weights", "train", 80]], "train 80", False),
    ],
)  # fmt: skip
def test_a_teacher_of_a_finished_run_brings_its_account(tmp_path, used, said, free):
    run = one("kd", saved(tmp_path / "run", used), study=replace(STUDY, select="val_average"))
    budget = label_budget(run, 100, 20, 30)
    assert f"teacher training {said};" in budget.line()
    assert budget.label_free is free


def test_of_other_folders_nothing_is_known(tmp_path):
    known = [["reporting", "test", 30]]
    saved(tmp_path / "moved", known)
    (tmp_path / "moved" / "model").rename(tmp_path / "moved" / "elsewhere")
    saved(tmp_path / "damaged", known)
    (tmp_path / "damaged" / "result.json").write_text("{")
    saved(tmp_path / "unfinished", known)
    (tmp_path / "unfinished" / "result.json").unlink()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "result.json").write_text("[]")
    teachers = [
        saved(tmp_path / "other", known, schema="offramp/calibrate/1"), f"folder:{tmp_path / 'moved' / 'elsewhere'}",
        *(f"folder:{tmp_path / name / 'model'}" for name in ("damaged", "unfinished", "list")),
        f"logits:{tmp_path / 'moved' / 'model'}",
    ]  # fmt: skip
    for teacher in teachers:
        assert "teacher training unknown;" in label_budget(one("kd", teacher), 100, 20, 30).line()

"""Whole runs on small sets: seeds, resuming, teachers, group labels, baselines, grids."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny_encoders as encoders
from distillation_runs import READOUT, small_study
from local_ray import local_ray
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.convolutional import SmallCNN, SmallCNNConfig
from offramp.classifiers.loading import load
from offramp.classifiers.projected import ProjectedHead
from offramp.distillation import DataConfig, Network, Study, networks, run_grid, runs
from offramp.distillation import run as run_module
from offramp.distillation.config import BUNDLED, PUBLISHED, Run, bundled, study_from
from offramp.distillation.data import load_set, minority_of, split_validation
from offramp.distillation.grid import ensure, execute
from offramp.distillation.linear_probes import balanced, fit_early_exits, l1_logistic, refitted
from offramp.distillation.methods import METHODS as ALL
from offramp.distillation.networks import Prepared, build, rows_for
from offramp.distillation.results import History
from offramp.distillation.run import features_of, with_teachers_classifier
from offramp.distillation.teacher import load_logits, logits_of_all, save_logits
from offramp.metrics.selection import Judged
from offramp.tasks.labelled import Labelled

pytest.importorskip("sklearn")
STUDY = small_study(3)


def one(method, teacher=None, study=STUDY, seed=0):
    return runs(study, [method], [teacher] if teacher else [], [seed], READOUT)[0]


def without_time(result):
    return {name: value for name, value in result.items() if name not in ("seconds", "digest")}


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


# ---------------------------------------------------------------- every method runs, and keeps what it should

METHODS = [
    "erm", "jtt", "group_balanced", "group_dro", "lff", "dfr", "kd", "simkd", "dett", "dedier", "laplace_variance",
    "avcs", "nested", "dedier_permuted", "dedier_oracle",
]  # fmt: skip


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    root = tmp_path_factory.mktemp("grid")
    return root, run_grid(runs(STUDY, METHODS, ["group_dro"], [0], READOUT), root)


def test_every_method_is_judged(grid):
    root, results = grid
    for name, result in zip(METHODS, results, strict=True):
        folder = root / "runs" / result["key"]
        names = result["groups"]["names"]
        assert len(names) == 4
        epochs = 1 if name == "dfr" else 3
        assert sorted(path.name for path in (folder / "history").iterdir()) == ["history.json"]  # weights are large
        assert [row["epoch"] for row in result["history"]] == list(range(1, epochs + 1))
        assert all(len(row["groups"]) == 4 for row in result["history"])
        for rule, chosen in result["rules"].items():
            vals = [row["val"] for row in result["history"]]
            key = {"val_average": "average", "val_worst_group": "worst_group", "val_group_mean": "group_mean"}.get(rule)
            if key:
                assert chosen["val"][key] == max(val[key] for val in vals)
            assert min(chosen["groups"]) == pytest.approx(chosen["test"]["worst_group"])
        assert np.shape(result["exits"]["accuracy"]) == (3, 4)
        assert np.allclose(np.sum(result["exits"]["exit_rate"], 0), 1)
        assert np.allclose(result["exits"]["accuracy"][-1], result["rules"]["val_worst_group"]["groups"])
        assert load(folder / "model").labels == ("low", "high")


def test_predictions_are_kept_of_the_last_and_the_selected_epoch(grid):
    from safetensors.torch import load_file

    root, results = grid
    data = load_set(STUDY.data, 0)
    for result in results:
        kept = load_file(root / "runs" / result["key"] / "predictions.safetensors")
        model = load(root / "runs" / result["key"] / "model")  # of SimKD with the teacher's exit too
        assert torch.equal(logits_of_all(model, rows_for(model, data.test.rows)), kept["selected"])
        for logits, rule in ((kept["selected"][-1], "val_worst_group"), (kept["last"], "last")):
            right = (logits.argmax(-1) == data.test.rows.labels).double()
            found = right @ data.test.groups.members.double() / data.test.groups.counts
            assert found.tolist() == pytest.approx(result["rules"][rule]["groups"])


def test_where_group_labels_were_used(grid):
    _, results = grid
    budgets = {r["name"]: {(use, split): n for use, split, n in r["budget"]} for r in results}
    reporting = {("reporting", "train"): 200, ("reporting", "test"): 220, ("selection", "val"): 92}
    assert budgets["erm"] == budgets["jtt"] == budgets["lff"] == reporting
    taught = {("teacher training", "train"): 200, ("teacher training", "val"): 92}
    assert budgets["kd"] == budgets["dedier"] == budgets["avcs"] == reporting | taught
    assert budgets["group_dro"] == reporting | {("student training", "train"): 200}
    assert budgets["dfr"] == reporting | {("student training", "val"): 92}
    assert budgets["dedier_oracle"] == reporting | taught | {("weights", "train"): 200}


def test_methods_without_groups_never_see_them(tmp_path, monkeypatch):
    """The rows that the trainer is given have no groups."""
    seen = {}

    def watched(model, train, *rest, **options):
        seen[options["settings"]["run"]] = train.data.groups
        raise InterruptedError

    monkeypatch.setattr(run_module, "train_exits", watched)
    for name, teacher, known in (("erm", None, False), ("jtt", None, False), ("group_dro", None, True)):
        run = replace(one(name, teacher), method=replace(one(name, teacher).method, errors=None))
        with pytest.raises(InterruptedError):
            ensure(run, tmp_path)
        assert (seen[run.digest] is not None) == known


def test_weights_are_recorded(grid):
    _, results = grid
    found = {r["name"]: [row["weights"] for row in r["history"]] for r in results if "weights" in r["history"][0]}
    for name in ("dedier", "dedier_permuted", "dedier_oracle"):
        assert all(0 < w["reweighted"] < 1 for w in found[name])
    assert found["dedier_oracle"][0]["auroc"] == 1.0
    assert found["dedier_permuted"][0]["mean"] == pytest.approx(
        found["dedier"][0]["mean"]
    )  # the first is of one student
    assert found["jtt"][0]["quantiles"][-1] == 50
    assert found["lff"][-1]["reweighted"] > 0.9


# ---------------------------------------------------------------- the same again, and after an interruption


def test_the_same_seed_gives_the_same_result(tmp_path):
    run = one("dedier", "erm")
    first, again = (result_of(ensure(run, tmp_path / place)) for place in ("a", "b"))
    assert without_time(first) == without_time(again)
    other = result_of(ensure(one("dedier", "erm", seed=1), tmp_path / "a"))
    assert other["rules"] != first["rules"]


@pytest.mark.parametrize("name", ["laplace", "lff", "group_dro"])
def test_an_interrupted_run_ends_as_if_nothing_had_been(tmp_path, monkeypatch, name):
    run = one(name, "erm" if name == "laplace" else None)
    whole = result_of(ensure(run, tmp_path / "whole"))
    add, calls = History.add, []

    def failing(self, *given):
        add(self, *given)
        calls.append(given[0])
        if self.folder.parent.name == run.key and given[0] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(History, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        ensure(run, tmp_path / "cut")
    assert not (tmp_path / "cut" / "runs" / run.key / "result.json").exists()
    monkeypatch.setattr(History, "add", add)
    found = result_of(ensure(run, tmp_path / "cut"))
    assert without_time(found) == without_time(whole)


def test_another_run_in_the_folder_is_refused(tmp_path):
    run = one("erm")
    ensure(run, tmp_path)
    other = replace(run, study=replace(STUDY, threshold=0.5))
    with pytest.raises(ValueError, match=r"holds another run: study.threshold was 0.9 and is now 0.5"):
        run_grid([other], tmp_path)


def test_a_run_survives_json():
    study = replace(STUDY, student=Network("small-cnn:4", (1,)))
    for name in ("dedier", "dett", "erm"):
        run = one(name, "erm", study)
        assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run
        assert Run.from_dict(json.loads(json.dumps(run.to_dict()))).digest == run.digest


# ---------------------------------------------------------------- grids


def test_a_grid_goes_on_where_it_was(grid, tmp_path):
    root, results = grid
    shutil.copytree(root, tmp_path / "grid")
    (tmp_path / "grid" / "runs" / results[0]["key"] / "result.json").unlink()
    done = []
    again = run_grid(
        runs(STUDY, METHODS, ["group_dro"], [0], READOUT), tmp_path / "grid", progress=lambda *a: done.append(a[2])
    )
    assert done == [results[0]["key"]]
    assert [without_time(r) for r in again[1:]] == [without_time(r) for r in results[1:]]


def test_a_run_that_fails_stops_no_other(tmp_path):
    both = [one("dedier+depth=9", "erm"), one("erm")]
    with pytest.raises(
        RuntimeError, match=r"1 of 2 runs failed, the first is dedier.*: the readout reads after block 9"
    ):
        run_grid(both, tmp_path)
    assert result_of(tmp_path / "runs" / "erm--seed0")["name"] == "erm"
    assert "Traceback" in (tmp_path / "runs" / "dedier+depth=9--erm--seed0" / "error.txt").read_text()
    assert not (tmp_path / "shared").exists()  # seen before its teacher was trained
    with pytest.raises(ValueError, match="engine is 'threads'"):
        run_grid(both, tmp_path, engine="threads")
    with pytest.raises(ValueError, match="two runs are named erm--seed0"):
        run_grid([one("erm"), one("erm")], tmp_path)


def test_data_that_cannot_be_is_refused_before_anything_is_trained(tmp_path):
    bad = replace(STUDY, data=replace(STUDY.data, options={**STUDY.data.options, "colours": 3}))
    with pytest.raises(ValueError, match="unexpected keyword argument 'colours'; look at the options of the data"):
        run_grid([one("erm"), replace(one("erm", study=bad, seed=1))], tmp_path)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ValueError, match="0 methods and 1 seeds make no run"):
        runs(STUDY, [], ["erm"], [0])


@pytest.mark.slow
def test_two_processes_share_a_teacher(tmp_path):
    asked = runs(STUDY, ["kd", "dedier"], ["erm"], [0], READOUT)
    found = run_grid(asked, tmp_path, processes=2)
    alone = run_grid(asked, tmp_path / "alone")
    assert [without_time(r) for r in found] == [without_time(r) for r in alone]
    assert len(list((tmp_path / "shared").iterdir())) == 1


@pytest.mark.slow
def test_two_workers_of_ray(tmp_path, monkeypatch):
    asked = runs(STUDY, ["kd", "dedier"], ["erm"], [0], READOUT)
    with local_ray(monkeypatch):
        found = run_grid(asked, tmp_path, engine="ray")
    alone = run_grid(asked, tmp_path / "alone")
    assert [without_time(r) for r in found] == [without_time(r) for r in alone]
    assert len(list((tmp_path / "shared").iterdir())) == 1


def _held(folder, ready, go):
    from filelock import FileLock

    with FileLock(Path(folder) / ".lock"):
        ready.set()
        go.wait(30)


def test_a_run_waits_for_whoever_trains_it(tmp_path):
    run = one("erm")
    ensure(run, tmp_path)
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    other = context.Process(target=_held, args=(str(tmp_path / "runs" / run.key), ready, go))
    other.start()
    ready.wait(10)
    waiting = context.Process(target=execute, args=(run.to_dict(), str(tmp_path)))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    go.set()
    waiting.join(30)
    other.join(30)
    assert waiting.exitcode == 0


# ---------------------------------------------------------------- teachers


def test_logits_on_disk_go_by_row_and_class(tmp_path):
    data = load_set(STUDY.data, 0)
    rows, path = data.train.rows, tmp_path / "logits.safetensors"
    logits = torch.arange(400.0).reshape(200, 2)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    save_logits(path, logits[order], [rows.ids[i] for i in order.tolist()], rows.classes, "someone")
    assert torch.equal(load_logits(path, rows), logits)
    with pytest.raises(ValueError, match="made by another teacher"):
        load_logits(path, rows, "someone else")
    save_logits(path, logits[:7], rows.ids[:7], rows.classes, "someone")
    with pytest.raises(ValueError, match=f"says nothing of the training row '{rows.ids[7]}'"):
        load_logits(path, rows)
    save_logits(path, logits, rows.ids, ("low", "big"), "someone")
    with pytest.raises(ValueError, match="class 1 is 'high' for the student and 'big' for the teacher"):
        load_logits(path, rows)
    broken = logits.clone()
    broken[5, 1] = torch.nan
    save_logits(path, broken, rows.ids, rows.classes, "someone")
    with pytest.raises(ValueError, match=f"holds logits of row '{rows.ids[5]}' that are not finite"):
        load_logits(path, rows)
    with pytest.raises(ValueError, match="is missing or damaged"):
        load_logits(tmp_path / "nothing", rows)


def test_a_teacher_from_disk_is_the_teacher(grid, tmp_path):
    root, results = grid
    taught = next((root / "shared").glob("group_dro*"))
    data = load_set(STUDY.data, 0)
    kd = results[METHODS.index("kd")]
    folder = result_of(ensure(one("kd", f"folder:{taught / 'model'}"), tmp_path))
    logits = result_of(ensure(one("kd", f"logits:{taught / 'train_logits.safetensors'}"), tmp_path))
    assert folder["rules"] == logits["rules"] == kd["rules"]
    assert sorted(folder["budget"]) == sorted(kd["budget"])  # as if it had been trained here
    assert ["teacher training", "train", None] in logits["budget"]
    teacher = load(taught / "model")
    kept = load_logits(taught / "train_logits.safetensors", data.train.rows)
    assert torch.equal(kept, logits_of_all(teacher, rows_for(teacher, data.train.rows))[-1])
    with pytest.raises(ValueError, match="simkd needs the teacher itself"):
        one("simkd", "logits:x")
    with pytest.raises(ValueError, match="kd needs a teacher"):
        Run(STUDY, "kd", one("kd", "erm").method, None, 0)


def test_simkd_moves_encoder_and_projector_only(tmp_path):
    data = load_set(STUDY.data, 0)
    student, teacher = (build(Network(n), data.train.rows, 0) for n in ("small-cnn:4", "small-cnn:6"))
    rows = rows_for(teacher, data.train.rows)
    table = features_of(teacher, rows)
    assert table.shape == (200, 24, 2, 2)
    plain = float(student.costs()[-1])
    student = with_teachers_classifier(student, teacher, table.shape[1:])
    head = student.heads[-1]
    assert isinstance(head, ProjectedHead)
    images, table = rows.inputs(torch.arange(64)), table.kept
    student.train()
    before = {name: t.clone() for name, t in student.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        output = student(images)[-1]
        (output.matched - table[:64]).square().mean().backward()
        optimiser.step()
    after = student.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in moved if name.startswith("heads.2.classifier")]
    assert {"backbone.blocks.0.0.weight", "heads.2.projector.0.weight", "heads.2.projector.6.weight"} <= moved
    assert float(student.eval().costs()[-1]) > plain + 2 * 4 * (16 * 12 + 12 * 12 * 9 + 12 * 24) - 1  # counted
    # a student whose projected maps are the teacher's is the teacher
    head.projector = torch.nn.Identity()
    from offramp.families.backbone import Activations

    given = head(Activations((table[:8],)))
    torch.testing.assert_close(given.logits, teacher.eval()(images[:8])[-1].logits)


@pytest.mark.parametrize("name", ["simkd", "dedier"])
def test_what_does_not_fit_in_memory_is_made_batch_by_batch(grid, tmp_path, monkeypatch, name):
    """A run that may keep nothing ends like one that keeps all."""
    root, results = grid
    kept = results[METHODS.index(name)]
    shutil.copytree(root / "shared", tmp_path / "shared")
    monkeypatch.setattr(networks, "MEMORY", 0)
    found = result_of(ensure(one(name, "group_dro"), tmp_path))
    for term, values in kept["terms"].items():
        assert found["terms"][term] == pytest.approx(values, rel=1e-3)
    for a, b in zip(found["history"], kept["history"], strict=True):
        assert a["val"]["loss"] == pytest.approx(b["val"]["loss"], rel=1e-2)


def small_cnn(size, channels=3):
    torch.manual_seed(size)
    config = SmallCNNConfig(4, image_size=size, in_channels=channels)
    return EarlyExitClassifier(SmallCNN(config), [1, 2], 5).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["resnet of cnn", "cnn of msdnet", "bert of bert"])
def test_a_student_with_its_teachers_exit_is_saved(tmp_path, kind):
    student, teacher, inputs = {
        "resnet of cnn": (encoders.build("resnet basic"), small_cnn(32), torch.rand(5, 3, 32, 32)),
        "cnn of msdnet": (small_cnn(32, 1), encoders.build("msdnet"), torch.rand(5, 1, 32, 32)),
        "bert of bert": (encoders.build("bert"), encoders.build("bert", hidden=7, dropout=0.5),
                         encoders.inputs_for("bert")),
    }[kind]  # fmt: skip
    data = Labelled(("0", "1"), np.zeros((2, 1)), torch.tensor([0, 1]), teacher.labels)
    given = inputs if isinstance(inputs, torch.Tensor) else inputs["input_ids"]
    rows = SimpleNamespace(data=data, lengths=torch.ones(len(data)), inputs=lambda places: given[places])
    student = with_teachers_classifier(student, teacher, features_of(teacher, rows).shape[1:], seed=1).eval()
    student.save(tmp_path / "model")
    again = load(tmp_path / "model")
    for a, b in zip(student(inputs), again(inputs), strict=True):
        assert torch.equal(a.logits, b.logits)
    assert torch.equal(again.heads[-1].linear.weight, teacher.heads[-1].linear.weight)
    assert not any(p.requires_grad for p in again.heads[-1].classifier.parameters())
    assert torch.equal(again.costs(inputs), student.costs(inputs))
    assert again.device.type == "cpu"


def test_a_projector_depends_on_its_seed_alone():
    drawn = []
    for seed in (1, 1, 2):
        student = with_teachers_classifier(small_cnn(16), small_cnn(16), torch.Size((16, 4, 4)), seed)
        drawn.append(student.heads[-1].projector[0].weight)
        torch.rand(3)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", ["dedier", "simkd", "dett", "lff", "dfr"])
def test_every_network_goes_to_the_device(tmp_path, monkeypatch, name):
    """Those that are built and those that are loaded: students, teachers, first students, LfF's second network."""
    told = []

    def watched(make):
        def made(*args, **options):
            told.append(options.get("device", args[3] if len(args) > 3 else None))
            return make(*args, **options)

        return made

    monkeypatch.setattr(run_module, "build", watched(build))
    monkeypatch.setattr(run_module, "load", watched(load))
    study = replace(
        STUDY, training=replace(STUDY.training, epochs=1), teacher_training=replace(STUDY.teacher_training, epochs=1)
    )
    ensure(one(name, "erm", study), tmp_path, device="cpu:0")
    assert len(told) >= 2
    assert {str(device) for device in told} <= {"cpu:0", "cpu"}
    with pytest.raises(ValueError, match="device 'moon' is not available on this machine; choose one of cpu"):
        run_grid([one(name, "erm", study)], tmp_path, device="moon")


# ---------------------------------------------------------------- DFR, early exits, data


def test_l1_logistic_regression_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    random = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=random, dtype=torch.float64)
    y = (x[:, 0] - 0.5 * x[:, 1] + 0.5 * torch.randn(120, generator=random) > 0.3).long()
    for strength in (1.0, 0.1):
        weight, bias = l1_logistic(x, y, 2, strength, steps=3000)
        # softmax of two classes with an L1 norm on both rows: the difference has half of the penalty on each side
        model = linear_model.LogisticRegression(l1_ratio=1, C=strength, solver="saga", max_iter=20_000, tol=1e-8)
        model.fit(x.numpy(), y.numpy())
        torch.testing.assert_close(weight[1] - weight[0], torch.from_numpy(model.coef_[0]), atol=2e-3, rtol=1e-3)
        assert float(bias[1] - bias[0]) == pytest.approx(float(model.intercept_[0]), abs=2e-3)


def test_subsets_are_balanced_and_the_layer_ignores_the_shortcut():
    random = torch.Generator().manual_seed(1)
    groups = torch.tensor([0] * 300 + [1] * 40 + [2] * 40 + [3] * 300)
    rows = balanced(groups, random)
    assert groups[rows].bincount().tolist() == [40] * 4
    assert len(rows.unique()) == 160
    y = groups // 2
    core = y + 0.3 * torch.randn(680, generator=random)
    shortcut = groups % 2 + 0.05 * torch.randn(680, generator=random)
    layer = refitted(torch.stack([core, shortcut, torch.randn(680, generator=random)], 1), y, groups, 2, seed=0)
    w = layer.weight[1] - layer.weight[0]
    assert float(w[0]) > 10 * max(abs(float(w[1])), abs(float(w[2])))


def test_early_exits_are_fitted_and_nothing_else_changes():
    data = load_set(STUDY.data, 0)
    student = build(STUDY.student, data.train.rows, 0)
    rows = rows_for(student, data.train.rows)
    before = {name: t.clone() for name, t in student.state_dict().items()}
    untaught = logits_of_all(student, rows)
    fit_early_exits(student, rows)
    for name, t in student.state_dict().items():
        assert torch.equal(before[name], t) != name.startswith(("heads.0.linear", "heads.1.linear")), name
    found = logits_of_all(student, rows)
    assert torch.equal(found[-1], untaught[-1])
    right = (found.argmax(-1) == data.train.rows.labels).double().mean(1)
    assert right[0] > 0.8


def test_renderings_of_one_thing_are_tuned_or_selected_on_together():
    data = load_set(STUDY.data, 0)
    select, tune = split_validation(data.val, 0.25, 0)
    assert not set(select.pairs.tolist()) & set(tune.pairs.tolist())
    assert (len(select), len(tune)) == (92, 28)
    assert int(minority_of(data.train).sum()) == sum(
        count for name, count in data.counts()["train"].items() if name in ("low, blue", "high, green")
    )


def test_networks_depend_on_their_seed_alone():
    data = load_set(STUDY.data, 0)
    first = build(STUDY.student, data.train.rows, 3)
    torch.rand(5)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.parameters(), build(STUDY.student, data.train.rows, 3).parameters(), strict=True)
    )
    for source, said in (("small-cnn:x", "cannot be read"), ("text:2", "cannot be read"), ("text:1x32", "needs texts")):
        with pytest.raises(ValueError, match=said):
            build(Network(source), data.train.rows, 0)


def test_prepared_texts_are_what_the_tokenizer_makes():
    data = load_set(DataConfig("stand-in:template-nli", options={"train": 900, "val": 300, "test": 300}), 0)
    student = build(Network("text:1x32"), data.train.rows, 0)
    from offramp.classifiers.batches import TextRows

    made, plain = rows_for(student, data.val.rows), TextRows(data.val.rows, student.tokenizer)
    assert isinstance(made, Prepared)
    places = torch.tensor([5, 0, 17])
    for name, values in plain.inputs(places).items():
        assert torch.equal(made.inputs(places)[name], values)
    assert 3 in made.inputs(places)["input_ids"]


def test_history_keeps_only_weights_that_a_rule_would_choose(tmp_path):
    model, history = torch.nn.Linear(2, 2), History(tmp_path)
    for epoch, (average, worst) in enumerate([(0.5, 0.4), (0.6, 0.1), (0.7, 0.3), (0.6, 0.2)], 1):
        with torch.no_grad():
            model.bias.fill_(epoch)
        history.add(epoch, Judged(average, 1.0, 0.5, average, worst), {}, model)
    assert history.choices() == {
        "last": 4, "val_average": 3, "val_worst_class": 3, "val_group_mean": 3, "val_worst_group": 1, "val_loss": 3
    }  # fmt: skip
    assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == ["1", "3", "4"]
    again = History(tmp_path)
    assert again.weights(3)["bias"].tolist() == [3.0, 3.0]
    again.add(2, Judged(0.9, 0.1, 0.9, 0.9, 0.9), {}, model)  # an interrupted run repeats epoch 2
    assert [row["epoch"] for row in again.rows] == [1, 2]


def test_all_settings_that_come_along_can_be_read():
    for name in BUNDLED:
        values = bundled(name)
        base = Study(DataConfig("folder", "groups"), Network("s"), Network("t"))
        study = study_from({**values, "data": {}}, base)
        runs(study, list(ALL), ["erm"], [0], values["methods"])


def test_published_settings_are_those_of_the_paper():
    alphas = {"waterbirds": (0.05, 4.0, 1), "celeba": (0.1, 3.5, 1), "multinli": (0.2, 3.0, 2),
              "civilcomments": (0.05, 3.0, 1)}  # fmt: skip
    for name in PUBLISHED:
        values = bundled(name)
        base = Study(DataConfig("folder", name), Network("s"), Network("t"))
        study = study_from(
            {key: value for key, value in values.items() if key not in ("data", "student", "teacher")}, base
        )
        dedier = runs(study, ["dedier"], ["group_dro"], [0], values["methods"])[0].method
        assert (dedier.weights.alpha, dedier.weights.beta, dedier.weights.readout.depth) == alphas[name]
        assert (dedier.temperature, dedier.fraction, study.select) == (3.0, 1.0, "val_group_mean")
        gate = runs(study, ["dedier_gate"], ["group_dro"], [0], values["methods"])[0].method
        assert (gate.weights.alpha, gate.weights.beta) == (0.0, alphas[name][1])
    assert bundled("waterbirds")["training"]["epochs"] == 300

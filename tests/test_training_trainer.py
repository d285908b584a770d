"""Exits learn, the model does not change, and a run that was killed ends as if it had not been."""

import json
import math
import multiprocessing
import random
import time

import pytest
import torch
from accelerate.tracking import GeneralTracker
from filelock import FileLock
from safetensors.torch import load_file

import training_runs
from offramp.core.exits import Exits
from offramp.hub.exit_files import load_exits
from offramp.runs import folder as run_folder
from offramp.runs.folder import TrainingError
from offramp.runs.resume import read_lines
from offramp.training import loop
from offramp.training.config import TrainConfig
from offramp.training.objectives import OBJECTIVES
from offramp.training.trainer import train
from training_runs import config, data, model


def rows(folder):
    return read_lines(folder / "metrics.jsonl", "metrics")


def lenses(folder):
    return load_file(folder / "exits" / "exits.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("objective", ["forward-kl", "reverse-kl", "teacher-argmax"])
def test_exits_learn_and_the_model_stays_as_it_is(tmp_path, objective):
    lm, ids = model(), data().held_out.ids
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    logits, drawn = lm.model(ids).logits, torch.random.get_rng_state()
    lm.model.train()
    result = train(lm, data(), config(objective=objective), tmp_path)
    assert lm.model.training
    lm.model.eval()
    assert all(later < earlier for later, earlier in zip(result.loss_after, result.loss_before, strict=True))
    if objective != "reverse-kl":
        assert all(new > old for new, old in zip(result.agreement_after, result.agreement_before, strict=True))
    assert torch.equal(lm.model(ids).logits, logits)
    assert same(lm.model.state_dict(), before)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())
    assert (result.steps, result.tokens, result.positions) == (80, 80 * 4 * 11, 8 * 11)
    exits = load_exits(result.exits)
    assert exits.layers == result.layers == (1, 3)
    lm.attach_exits(exits)
    output = lm.model(ids[:, :-1], output_hidden_states=True)
    for layer, share in zip(result.layers, result.agreement_after, strict=True):
        choice = lm.split.readout(output.hidden_states[layer], layer).argmax(-1)
        assert share == pytest.approx(float((choice == output.logits.argmax(-1)).float().mean()))


def test_blocks_of_the_exits_own_learn_and_the_model_stays_as_it_is(tmp_path):
    lm, ids = model(), data().held_out.ids
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    result = train(lm, data(), config(blocks=2, learning_rate=3e-3), tmp_path / "run")
    assert all(later < 0.8 * earlier for later, earlier in zip(result.loss_after, result.loss_before, strict=True))
    assert same(lm.model.state_dict(), before)
    assert lm.split.branches == {}
    again = train(lm, data(), config(blocks=2, learning_rate=3e-3, steps=40), tmp_path / "half")
    assert again.loss_before == result.loss_before
    exits = load_exits(result.exits)
    assert (exits.blocks, exits.rank, [*exits.branches]) == (2, None, ["1", "3"])
    lm.attach_exits(exits)
    states = lm.split.states(ids[:, :-1], [1, 3])
    chosen = lm.model(ids[:, :-1]).logits.argmax(-1)
    for layer, state, share in zip((1, 3), states, result.agreement_after, strict=True):
        choice = lm.split.readout(state, layer).argmax(-1)
        assert share == pytest.approx(float((choice == chosen).float().mean()), abs=0.03)  # kept in bfloat16


def test_exits_that_are_attached_do_not_change_what_new_ones_learn(tmp_path):
    plain, other = model(), model()
    exits = Exits.fresh(other.split, (1, 3), blocks=1)
    with torch.no_grad():
        for parameter in exits.branches.parameters():
            parameter += torch.randn_like(parameter)
    other.attach_exits(exits)
    results = [train(lm, data(), config(steps=8), tmp_path / name) for lm, name in ((plain, "a"), (other, "b"))]
    assert results[0].loss_before == results[1].loss_before
    assert same(lenses(tmp_path / "a"), lenses(tmp_path / "b"))
    assert other.split.branches == {1: range(4, 5), 3: range(5, 6)}


def test_branches_are_trained_on_a_frozen_model_only():
    with pytest.raises(ValueError, match="trained on a model that stays as it is"):
        config(blocks=1, trainable="all")
    with pytest.raises(ValueError, match="behind whole prompts"):
        config(blocks=1, prompt_layer=2)


def test_agreement_is_counted_as_the_model_itself_sees_it(tmp_path):
    result = train(model(), data(), config(steps=1), tmp_path)
    ids = data().held_out.ids[:, :-1]
    output = model().model(ids, output_hidden_states=True)
    for layer, share in zip(result.layers, result.agreement_before, strict=True):
        choice = model().split.readout(output.hidden_states[layer]).argmax(-1)
        assert share == pytest.approx(float((choice == output.logits.argmax(-1)).float().mean()))


@pytest.mark.parametrize("options", [{"rank": 4}, {"weights": "layer", "schedule": "constant", "clip": None}])
def test_the_same_seed_gives_the_same_bits(tmp_path, options):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        training_runs.run(tmp_path / name, steps=5, seed=seed, **options)
    assert same(lenses(tmp_path / "a"), lenses(tmp_path / "b"))
    assert not same(lenses(tmp_path / "a"), lenses(tmp_path / "c"))


def test_metrics_and_budget_of_tokens(tmp_path):
    progress = []
    settings = config(steps=None, tokens=100, validate_every=2)
    result = train(model(), data(), settings, tmp_path, lambda *a: progress.append(a))
    assert (result.steps, result.tokens) == (3, 132)
    assert [a[:2] for a in progress] == [(0, 100), (44, 100), (88, 100), (100, 100)]
    assert [(row["kind"], row["step"]) for row in rows(tmp_path)] == [
        ("validation", 0), ("step", 1), ("step", 2), ("validation", 2), ("step", 3), ("validation", 3),
    ]  # fmt: skip
    assert {"loss", "agreement", "tokens_per_second", "learning_rate", "gradient_norm"} <= rows(tmp_path)[1].keys()
    assert "-> " in result.table()
    assert type(result).from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result


class Notebook(GeneralTracker):
    """A tracker that remembers."""

    name, requires_logging_directory, tracker = "notebook", False, None

    def __init__(self):
        super().__init__()
        self.config, self.values, self.finished = None, [], 0

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        self.values.append((step, values))

    def finish(self):
        self.finished += 1


def test_trackers_get_what_the_metrics_get(tmp_path):
    notebook = Notebook()
    train(model(), data(), config(steps=2), tmp_path, report_to=notebook)
    assert notebook.config["config.learning_rate"] == "0.01"
    assert [step for step, _ in notebook.values] == [0, 1, 2, 2]
    for (_, values), row in zip(notebook.values, rows(tmp_path), strict=True):
        assert values[f"{row['kind']}/loss_3"] == row["loss"][1]
        assert values[f"{row['kind']}/full_loss"] == row["full_loss"]
    assert notebook.finished == 1


def killed_runs(folder, count, arguments=(), *, most=20, options=None):
    """Runs that are killed at random moments, each going on where the one before was."""
    context = multiprocessing.get_context("forkserver")  # imports once; its children are processes of their own
    context.set_forkserver_preload(["offramp.training", "transformers.models.llama.modeling_llama"])
    chance, reached = random.Random(0), 0  # noqa: S311
    for _ in range(count):
        process = context.Process(target=training_runs.run, args=(folder, *arguments), kwargs=options or {})
        process.start()
        goal, deadline = reached + chance.randint(2, most), time.monotonic() + 60
        while reached < goal:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(chance.uniform(0, 0.003))
            path = folder / "metrics.jsonl"
            reached = path.read_bytes().count(b"\n") if path.exists() else 0
        process.kill()
        process.join()
        assert process.exitcode == -9


def timeless(folder):
    return [{**row, "tokens_per_second": 0} for row in rows(folder)]


def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = training_runs.run(whole)
    killed_runs(killed, 3)
    assert not (killed / "exits").exists()
    result = training_runs.run(killed)
    assert same(lenses(killed), lenses(whole))
    assert (result.steps, result.agreement_before, result.agreement_after, result.loss_after) == (
        80, expected.agreement_before, expected.agreement_after, expected.loss_after,
    )  # fmt: skip
    assert timeless(killed) == timeless(whole)


@pytest.mark.parametrize("kind", training_runs.BACKBONES)
def test_a_backbone_whose_training_was_killed_ends_with_the_same_bits(tmp_path, kind):
    """With dropout (T5), adapters, dropped blocks, micro-batches, drawn positions and master weights."""
    name, options = training_runs.BACKBONES[kind]
    options = {"steps": 12, "layers": (2,), **options}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    training_runs.run(whole, name, **options)
    killed_runs(killed, 1, (name,), most=6, options=options)
    assert not (killed / "model").exists()
    training_runs.run(killed, name, **options)
    assert same(*(load_file(folder / "model" / "model.safetensors") for folder in (killed, whole)))
    assert same(*(load_file(folder / "checkpoint.safetensors") for folder in (killed, whole)))
    assert timeless(killed) == timeless(whole)


def test_a_crash_before_or_after_any_write_loses_nothing(tmp_path, monkeypatch):
    whole, options = tmp_path / "whole", {"steps": 4, "save_every": 2, "validate_every": 3}
    training_runs.run(whole, **options)
    writes = []

    def crashing(write, at):
        def wrapped(*args, **keywords):
            writes.append(at)
            if len(writes) == at:
                raise KeyboardInterrupt  # before
            write(*args, **keywords)
            if len(writes) == -at:
                raise KeyboardInterrupt  # after

        return wrapped

    for at in [sign * number for number in range(1, 11) for sign in (1, -1)]:
        folder = tmp_path / str(at)
        writes.clear()
        with monkeypatch.context() as patch:
            patch.setattr(run_folder, "write_tensors", crashing(run_folder.write_tensors, at))
            patch.setattr(run_folder, "write_lines", crashing(run_folder.write_lines, at))
            patch.setattr(run_folder.RunFolder, "log", crashing(run_folder.RunFolder.log, at))
            with pytest.raises(KeyboardInterrupt):
                training_runs.run(folder, **options)
        training_runs.run(folder, **options)
        assert same(lenses(folder), lenses(whole))
        assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(whole)]


def test_leftovers_of_a_killed_write_are_removed_and_a_finished_run_is_not_repeated(tmp_path):
    first = training_runs.run(tmp_path, steps=4)
    for name in (".checkpoint-abc.safetensors", ".metrics-x.jsonl"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".exits-abc").mkdir()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"half": ')
    again = training_runs.run(tmp_path, steps=4)
    assert again == first
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {
        "config.json", "metrics.jsonl", "checkpoint.safetensors", "exits",
    }  # fmt: skip


def test_a_folder_of_another_run_is_refused(tmp_path):
    training_runs.run(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"config.learning_rate was 0.01 and is now 0.02"):
        training_runs.run(tmp_path, steps=2, learning_rate=0.02)
    with pytest.raises(ValueError, match="data.train was"):
        train(model(), data().__class__(data().held_out, data().held_out), config(steps=2), tmp_path)
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(ValueError, match="another process is training"),
    ):
        training_runs.run(tmp_path, steps=2)


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    training_runs.run(whole, steps=8)
    calls, sound = [], OBJECTIVES["forward-kl"]

    def breaks(logits, teacher, labels):
        calls.append(logits.requires_grad)
        loss = sound(logits, teacher, labels)
        return loss * math.nan if sum(calls) == 2 * 4 + 2 else loss  # layer 3 at step 5

    monkeypatch.setitem(OBJECTIVES, "forward-kl", breaks)
    with pytest.raises(TrainingError, match=r"at step 5 in the exit after layer 3; the last good checkpoint is kept"):
        training_runs.run(tmp_path / "nan", steps=8)
    assert all(
        bool(value.isfinite().all()) for value in load_file(tmp_path / "nan" / "checkpoint.safetensors").values()
    )
    assert not (tmp_path / "nan" / "exits").exists()
    training_runs.run(tmp_path / "nan", steps=8)  # the fault is gone
    assert same(lenses(tmp_path / "nan"), lenses(whole))


def test_a_rate_that_is_too_high_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="lower the learning rate"):
        training_runs.run(tmp_path, steps=9, learning_rate=1e37, warmup=0)


def test_behind_nan_a_run_goes_on_with_another_rate_and_says_so(tmp_path):
    options = {"steps": 9, "schedule": "constant", "warmup": 0}
    with pytest.raises(TrainingError, match="start again in the same folder"):
        training_runs.run(tmp_path, **options, learning_rate=1e37)
    with pytest.raises(ValueError, match=r"config.clip was 1.0 and is now 0.5; config.seed was 0 and is now 1"):
        training_runs.run(tmp_path, **options, learning_rate=1e37, seed=1, clip=0.5)
    result = training_runs.run(tmp_path, **options, learning_rate=1e-3, clip=0.5)
    assert result.steps == 9
    steps = [row for row in rows(tmp_path) if row["kind"] == "step"]
    assert [(row["step"], row["learning_rate"]) for row in steps] == [(step, 1e-3) for step in range(1, 10)]
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["config"]["learning_rate"], written["config"]["clip"]) == (1e-3, 0.5)
    assert "stopped" not in written
    (rate, clip) = written["changed"]
    assert rate.startswith(
        "config.learning_rate was 1e+37 and is now 0.001, after training met NaN or infinity at step"
    )
    assert clip.startswith("config.clip was 1.0 and is now 0.5, after ")
    assert load_exits(result.exits).settings["changed"] == written["changed"]
    training_runs.run(tmp_path, **options, learning_rate=1e-3, clip=0.5)  # the same once more
    with pytest.raises(ValueError, match=r"config.learning_rate was 0.001 and is now 0.002"):
        training_runs.run(tmp_path, **options, learning_rate=2e-3, clip=0.5)  # nothing stopped it since


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "kl"}, "choose one of forward-kl, reverse-kl, labels, teacher-argmax"),
        ({"weights": "x"}, "choose one of uniform, layer"),
        ({"tokens": 5}, "give one of `steps` and `tokens`"),
        ({"steps": 0}, "at least 1"),
        ({"learning_rate": math.nan}, "above 0 and finite"),
        ({"clip": 0.0}, "above 0"),
        ({"temperature": 2.0, "objective": "labels"}, "'labels' has no temperature"),
        ({"warmup": -1}, "negative"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 1, **options})


def test_schedule():
    cosine = TrainConfig(steps=100, warmup=10)
    assert cosine.run_schedule.rate(run_folder.TrainState(0)) == pytest.approx(1e-4)
    assert cosine.run_schedule.rate(run_folder.TrainState(50)) == pytest.approx(5e-4)
    assert cosine.run_schedule.rate(run_folder.TrainState(99)) < 1e-6
    assert TrainConfig(tokens=100, schedule="constant", warmup=0).run_schedule.rate(run_folder.TrainState(0)) == 1e-3


def test_a_training_says_how_much_memory_it_took(tmp_path, monkeypatch):
    peaks = iter([5 * 10**9, 7 * 10**9, 6 * 10**9, 3 * 10**9, 4 * 10**9])
    monkeypatch.setattr(loop, "peak", lambda _: next(peaks))

    def interrupt(done, *_):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training_runs.run(tmp_path, progress=interrupt, steps=4, save_every=2)
    result = training_runs.run(tmp_path, steps=4, save_every=2)  # from step 2 on, and it has not forgotten
    assert result.memory == 7 * 10**9
    assert "peak memory of the process: 7.00 GB" in result.table()
    described = json.loads((result.exits / "exits.json").read_text())
    assert described["settings"]["memory"] == {"bytes": 7 * 10**9, "of": "peak memory of the process"}

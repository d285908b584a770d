"""All exits learn, rows keep their names, and a training that was killed ends as if it had not been."""

import copy
import json
import math
import multiprocessing
import random
import time

import pytest
import torch
from filelock import FileLock
from torch import nn

import classifier_runs
from classifier_runs import images, net, rows, run
from offramp.classifiers.batches import ImagePreprocessing, ImageRows, TextRows, in_order
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.config import ClassifierTrainConfig
from offramp.classifiers.convolutional import MSDNet, MSDNetConfig
from offramp.classifiers.loading import load
from offramp.classifiers.outputs import collect
from offramp.classifiers.trainer import joint_cross_entropy, logits_of, train_exits
from offramp.runs.folder import TrainingError
from offramp.runs.resume import read_lines
from offramp.tasks.labelled import Labelled
from offramp.training.schedule import FALLS
from tiny import tokenizer
from tiny_encoders import encoder


def lines(folder, kind=None):
    found = read_lines(folder / "metrics.jsonl", "metrics")
    return [row for row in found if kind in (None, row["kind"])]


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimiser": "adamw", "learning_rate": 0.01, "schedule": "cosine", "weights": "layer", "clip": 1.0},
        {"precision": "bf16", "nesterov": True, "schedule": "linear", "warmup": 5},
    ],
)
def test_every_exit_learns_what_can_be_told_apart(tmp_path, options):
    progress = []
    model, _, result = run(tmp_path, epochs=30, progress=lambda *a: progress.append(a), **options)
    assert min(result.accuracy[1:]) >= 0.9
    assert result.accuracy[0] >= 0.75
    assert all(after < before for before, after in zip(result.loss_before, result.loss, strict=True))
    assert (result.steps, result.rows, result.epochs, result.validation_rows) == (240, 1800, 30, 24)
    assert (progress[0][:2], progress[-1][:2]) == ((0, 240), (240, 240))
    assert "| 3    | " in result.table()
    assert type(result).from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result
    # the accuracies are those of the model that is handed back, on rows prepared by hand
    judge = rows(24, seed=1, prefix="v")
    pixels = torch.from_numpy(judge.data.inputs).permute(0, 3, 1, 2) / 255
    mean, std = judge.preprocessing.mean[0], judge.preprocessing.std[0]
    assert not model.training
    if "precision" not in options:
        with torch.no_grad():
            outputs = model((pixels - mean) / std)
        for output, share, loss in zip(outputs, result.accuracy, result.loss, strict=True):
            assert float((output.logits.argmax(-1) == judge.data.labels).float().mean()) == pytest.approx(share)
            assert float(nn.functional.cross_entropy(output.logits, judge.data.labels)) == pytest.approx(loss, rel=1e-4)


def test_a_step_is_that_of_torch(tmp_path):
    """One epoch of full batches without augmentation against a loop written out here."""
    data = images(16)
    prepared = ImageRows(data, ImagePreprocessing.of(data))
    config = ClassifierTrainConfig(
        epochs=5,
        batch_size=16,
        learning_rate=0.1,
        weight_decay=0.01,
        schedule="step",
        weights=(0.5, 0.0, 2.0),
        clip=0.7,
    )
    model, twin = net(), net()
    for network in (model, twin):
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    train_exits(model, prepared, rows(6, prefix="v"), config, tmp_path)
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for rate in (0.1, 0.1, 0.1, 0.01, 0.001):  # below .5 of the way, .6, .8
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        first, second, third = (output.logits for output in twin(prepared.inputs(torch.arange(16))))
        losses = [nn.functional.cross_entropy(z, data.labels) for z in (first, second, third)]
        loss = 0.5 * losses[0] + 0 * losses[1] + 2 * losses[2]
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.7)
        optimiser.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert [row["learning_rate"] for row in lines(tmp_path, "step")] == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.001])


def test_weights_of_exits():
    config = ClassifierTrainConfig(epochs=1)
    assert config.exit_weights(4) == [1, 1, 1, 1]  # MSDNet's plain sum
    assert ClassifierTrainConfig(epochs=1, weights="layer").exit_weights(3) == pytest.approx([0.5, 1, 1.5])
    logits, labels = torch.randn(3, 5, 4), torch.tensor([0, 1, 2, 3, 0])
    batch = type("Batch", (), {"labels": labels})
    expected = sum(
        w * nn.functional.cross_entropy(z, labels, label_smoothing=0.1) for w, z in zip((1, 2, 3), logits, strict=True)
    )
    assert float(joint_cross_entropy((1, 2, 3), 0.1)(list(logits), batch)) == pytest.approx(float(expected))


def test_the_step_schedule_divides_by_ten_twice():
    assert [round(FALLS["step"](done), 6) for done in (0, 0.49, 0.5, 0.74, 0.75, 1)] == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_frozen_parameters_stay(tmp_path):
    model = net()
    model.blocks[0].requires_grad_(False)
    before = model.blocks[0][0].weight.clone()
    train_exits(model, rows(), rows(6, prefix="v"), ClassifierTrainConfig(epochs=1), tmp_path)
    assert torch.equal(model.blocks[0][0].weight, before)
    assert not torch.equal(model.blocks[1][0].weight, net().blocks[1][0].weight)


@pytest.mark.parametrize(
    "options", [{"optimiser": "sgd", "learning_rate": 0.05}, {"optimiser": "adamw", "learning_rate": 3e-3}]
)
def test_an_msdnet_learns_is_saved_and_collected(tmp_path, options):
    torch.manual_seed(0)
    shape = MSDNetConfig(
        blocks=2, image_size=16, in_channels=1, channels=4, growth=4, scales=(1, 2), bottlenecks=(1, 2), head_channels=8
    )
    train, judge = rows(augment=False), rows(24, seed=1, prefix="v")
    classifier = EarlyExitClassifier(
        MSDNet(shape), (1,), labels=train.data.classes, preprocessing=train.preprocessing.settings
    )
    config = ClassifierTrainConfig(epochs=12, batch_size=12, **options)
    result = train_exits(classifier, train, judge, config, tmp_path)
    assert min(result.accuracy) > 0.6
    assert result.model is not None
    loaded = load(result.model)
    assert ImagePreprocessing.from_settings(loaded.preprocessing) == train.preprocessing
    outputs = collect(loaded, in_order(judge, 7), ids=judge.data.ids)
    right = (outputs.logits.argmax(-1) == judge.data.labels).double().mean(1)
    assert right.tolist() == pytest.approx(result.accuracy)


def test_an_encoder_learns_pairs_of_texts(tmp_path):
    words = ("sky", "blue", "why", "is")
    texts = tuple((first, second) for first in words for second in words for _ in range(4))
    labels = torch.tensor([int(first == second) for first, second in texts])

    def pairs(prefix):
        ids = tuple(f"{prefix}{row}" for row in range(len(texts)))
        return TextRows(Labelled(ids, texts, labels, ("differ", "same")), tokenizer())

    torch.manual_seed(0)
    classifier = EarlyExitClassifier.from_encoder(copy.deepcopy(encoder("bert")), (2,), 2)
    config = ClassifierTrainConfig(
        epochs=4, batch_size=16, optimiser="adamw", learning_rate=3e-3, schedule="linear", clip=1.0
    )
    result = train_exits(classifier, pairs("t"), pairs("v"), config, tmp_path)
    assert all(after < before for before, after in zip(result.loss_before, result.loss, strict=True))
    assert result.truncated == 0
    labelled = EarlyExitClassifier(classifier.backbone, (2,), labels=("same", "differ"))
    with pytest.raises(ValueError, match="labels are same, differ and the data's classes differ, same"):
        train_exits(labelled, pairs("t"), pairs("v"), config, tmp_path / "other")


# ---------------------------------------------------------------- rows and objectives


def test_objectives_see_rows_by_their_ids(tmp_path):
    """Whatever the order, a row's place, id, label and image belong together; each comes once per epoch."""
    data = images(35)
    prepared = ImageRows(data, ImagePreprocessing.of(data))
    seen = []

    def objective(outputs, batch):
        for at, (place, id) in enumerate(zip(batch.rows.tolist(), batch.ids, strict=True)):
            assert data.ids[place] == id
            assert batch.labels[at] == data.labels[place]
            assert torch.equal(batch.inputs[at], prepared.inputs(batch.rows[at : at + 1])[0])
        seen.append((batch.epoch, batch.ids))
        return sum(z.square().mean() for z in logits_of(outputs))

    ended = []
    config = ClassifierTrainConfig(epochs=3, batch_size=8)
    train_exits(
        net(), prepared, rows(6, prefix="v"), config, tmp_path, objective=objective,
        after_epoch=lambda epoch, model: ended.append((epoch, len(seen))),
    )  # fmt: skip
    assert ended == [(0, 5), (1, 10), (2, 15)]
    orders = [[id for at, ids in seen if at == epoch for id in ids] for epoch in range(3)]
    assert all(sorted(order) == sorted(data.ids) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_a_weight_of_two_is_a_row_twice(tmp_path):
    """Weights follow rows: full batches of 12 rows, one of weight 2, against 13 rows."""
    twice = images(12)
    longer = Labelled(
        (*twice.ids, "again"),
        torch.tensor(twice.inputs)[[*range(12), 4]].numpy(),
        twice.labels[[*range(12), 4]],
        twice.classes,
    )
    preprocessing = ImagePreprocessing.of(twice)
    weights = torch.ones(13)

    def summed(outputs, batch):
        return (
            weights[batch.rows] * nn.functional.cross_entropy(outputs[-1].logits, batch.labels, reduction="none")
        ).sum()

    models = []
    for name, data, weight in (("w", twice, 2.0), ("d", longer, 1.0)):
        model = net()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for block in model.blocks:
            block[1] = nn.Identity()  # batch norm would see the row twice
        weights[4] = weight
        config = ClassifierTrainConfig(epochs=3, batch_size=13, learning_rate=0.01)
        train_exits(
            model, ImageRows(data, preprocessing), rows(6, prefix="v"), config, tmp_path / name, objective=summed
        )
        models.append(model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_an_objective_may_learn_and_log_its_terms(tmp_path):
    _, objective, _ = run(tmp_path, weighted=True)
    torch.manual_seed(1)
    fresh = classifier_runs.Weighted(60)
    assert not torch.equal(objective.projector.weight, fresh.projector.weight)
    assert all(0 < row["terms"]["helped"] < row["objective"] for row in lines(tmp_path, "step"))


def test_sampling_draws_rows_in_proportion(tmp_path):
    drawn = torch.zeros(60)

    def objective(outputs, batch):
        drawn.index_add_(0, batch.rows, torch.ones(len(batch.rows)))
        return outputs[0].logits.mean()

    sampling = torch.ones(60)
    sampling[:20], sampling[59] = 4.0, 0.0
    config = ClassifierTrainConfig(epochs=20)
    train_exits(net(), rows(), rows(6, prefix="v"), config, tmp_path, objective=objective, sampling=sampling)
    assert drawn.sum() == 1200
    assert drawn[59] == 0
    assert float(drawn[:20].sum() / drawn.sum()) == pytest.approx(80 / 119, abs=0.05)


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize(
    "options", [{}, {"weighted": True, "optimiser": "adamw", "learning_rate": 0.01}, {"momentum": 0.0}]
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected, objective, result = run(whole, **options)

    for stop in (2, 7, 8, 19):

        def stops(done, *_, stop=stop):
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(parts, progress=stops, **options)
    model, again, resumed = run(parts, **options)
    assert same(model, expected)
    assert objective is None or same(again, objective)
    assert resumed.accuracy == result.accuracy
    times = {"rows_per_second": 0}
    assert [{**row, **times} for row in lines(parts)] == [{**row, **times} for row in lines(whole)]
    assert same(run(parts, **options)[0], expected)  # nothing is left to do


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected, objective, _ = run(whole, weighted=True, epochs=12)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["offramp.classifiers.trainer", "torch._dynamo"])
    chance, reached = random.Random(0), 0  # noqa: S311
    for _ in range(2):
        process = context.Process(target=classifier_runs.run, args=(killed,), kwargs={"weighted": True, "epochs": 12})
        process.start()
        goal, deadline = reached + chance.randint(3, 25), time.monotonic() + 60
        while reached < goal:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(chance.uniform(0, 0.003))
            metrics = killed / "metrics.jsonl"
            reached = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        process.kill()
        process.join()
        assert process.exitcode == -9
    model, again, _ = run(killed, weighted=True, epochs=12)
    assert same(model, expected)
    assert same(again, objective)


def test_the_seed_decides(tmp_path):
    one, _, _ = run(tmp_path / "one", epochs=1)
    assert same(run(tmp_path / "same", epochs=1)[0], one)
    assert not same(run(tmp_path / "other", epochs=1, seed=1)[0], one)


def test_draws_outside_are_left_alone(tmp_path):
    torch.manual_seed(5)
    model = net()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    train_exits(model, rows(), rows(6, prefix="v"), ClassifierTrainConfig(epochs=1), tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_another_run_is_refused(tmp_path):
    run(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"holds another run: config.batch_size was 8 and is now 4"):
        run(tmp_path, epochs=1, batch_size=4)
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another process is training"):
        run(tmp_path, epochs=1)


# ---------------------------------------------------------------- what goes wrong


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    calls = []

    def objective(outputs, batch):
        calls.append(1)
        return outputs[-1].logits.mean() * (math.nan if len(calls) == 6 else 1.0)

    config = ClassifierTrainConfig(epochs=2, batch_size=8, save_every=2)
    with pytest.raises(TrainingError, match=r"NaN or infinity at step 6 in the objective; the last good checkpoint is"):
        train_exits(net(), rows(), rows(6, prefix="v"), config, tmp_path, objective=objective)
    model, before = net(), len(calls)
    result = train_exits(model, rows(), rows(6, prefix="v"), config, tmp_path, objective=objective)
    assert (len(calls) - before, result.steps) == (12, 16)  # from step 4 on
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_diverging_run_names_the_exit(tmp_path):
    model = net()
    with torch.no_grad():
        model.heads[1].bias[0] = math.inf
    with pytest.raises(TrainingError, match="step 0 in exit 2; nothing saved"):
        train_exits(model, rows(), rows(6, prefix="v"), ClassifierTrainConfig(epochs=1), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"optimiser": "rmsprop"}, "optimiser is 'rmsprop'; allowed are 'sgd', 'adamw'"),
        ({"schedule": "steps"}, "allowed are 'cosine', 'linear', 'constant', 'step'"),
        ({"weights": "heavy"}, "allowed are 'uniform', 'layer'"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov is a kind of momentum"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
        ({"warmup": -1}, "must not be negative"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierTrainConfig(**{"epochs": 1, **options})


def test_weights_for_other_exits_and_other_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"weights are \(1.0, 2.0\); give 3, one per exit"):
        run(tmp_path / "a", weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="the classifier has 4 classes and the data 3"):
        train_exits(net(classes=4), rows(), rows(6, prefix="v"), ClassifierTrainConfig(epochs=1), tmp_path / "b")


def test_bad_data_is_refused(tmp_path):
    config = ClassifierTrainConfig(epochs=1)
    with pytest.raises(ValueError, match="splits train and validation share 6 rows"):
        train_exits(net(), rows(), rows(6), config, tmp_path)
    few = rows()
    one = ImageRows(few.data.take(list(range(0, 60, 3))), few.preprocessing)
    with pytest.raises(ValueError, match="rows of one class only"):
        train_exits(net(), one, rows(6, prefix="v"), config, tmp_path)
    two = ImageRows(few.data.take([row for row in range(60) if row % 3]), few.preprocessing)
    with pytest.warns(UserWarning, match="no training row is of class lying"):
        train_exits(net(), two, rows(6, prefix="v"), config, tmp_path)
    with pytest.raises(ValueError, match="give 60 weights of at least 0"):
        train_exits(net(), rows(), rows(6, prefix="v"), config, tmp_path, sampling=-torch.ones(60))

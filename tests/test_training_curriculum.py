"""LayerSkip's curricula: the paper's formula, losses and gradients of plain autograd, and exact continuation."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file

import training_runs
from offramp.report.training import Curves, curves_figure
from offramp.runs import folder as run_folder
from offramp.training.schedule import CURRICULA, weights_at
from offramp.training.trainer import train
from test_training_backbone import losses_of, unequal
from training_runs import config, data, model


def paper(name, e, t, total):
    """ẽ(t, l) for readouts 0..L-1, the last of which is the model's own, of section 4.1.2."""
    count = len(e)
    if name == "rotational":
        period = count - 1
        c = [1 if l == count - 1 or l % period == t % period else 0 for l in range(count)]  # noqa: E741
    else:
        added = math.floor(t / (total / (2 * count)))  # one layer at a time every T/2L iterations, from L-1 to 0
        c = [1 if l >= count - 1 - added else 0 for l in range(count)]  # noqa: E741
    return [c_l * e_l / sum(x * y for x, y in zip(c, e, strict=True)) for c_l, e_l in zip(c, e, strict=True)]


@pytest.mark.parametrize("name", CURRICULA)
@pytest.mark.parametrize("e", [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5], [0.0, 0.25, 0.75]])
def test_weights_are_those_of_the_paper(name, e):
    total = 8 * len(e)
    for t in range(total):
        found = weights_at(name, e, t, t / total)
        assert [weight or 0.0 for weight in found] == pytest.approx(paper(name, e, t, total)), t
        assert found[-1] is not None
    assert weights_at(None, e, 3, 0.5) == e


@pytest.mark.parametrize(("name", "on"), [("rotational", [0, 2]), ("gradual", [2])])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_step_learns_from_the_exits_that_are_on(tmp_path, monkeypatch, name, on, micro_batch):
    """At the first step; 0, 1 are the exits after layers 1 and 3, and 2 is the last layer."""
    monkeypatch.setattr(
        "offramp.training.trainer.adamw", lambda params, rate, _: torch.optim.SGD(list(params), lr=rate)
    )
    lm, parts = model(still=True), unequal("llama")
    before, twin = copy.deepcopy(lm.model.state_dict()), copy.deepcopy(lm.model)
    losses, _ = losses_of(twin, parts.train)
    (sum(losses[at] for at in on) / len(on)).backward()
    settings = config(
        trainable="all", objective="labels", curriculum=name, steps=1, warmup=0, schedule="constant", clip=None,
        learning_rate=0.25, batch_size=6, micro_batch=micro_batch,
    )  # fmt: skip
    train(lm, parts, settings, tmp_path)
    for key, value in lm.model.named_parameters():
        expected = before[key] - 0.25 * dict(twin.named_parameters())[key].grad
        torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=2e-5)
    (row,) = [r for r in run_folder.RunFolder(tmp_path).rows() if r["kind"] == "step"]
    for at in (0, 1):
        read = pytest.approx(float(losses[at].detach()), rel=1e-4) if at in on else None
        assert row["loss"][at] == read
        assert (row["agreement"][at] is None) == (at not in on)


@pytest.mark.parametrize("name", CURRICULA)
def test_a_continued_run_is_one_that_was_not_interrupted(tmp_path, name):
    """With lenses, which learn at some steps only."""
    options = {"trainable": "all", "rank": 2, "curriculum": name, "steps": 9, "save_every": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    training_runs.run(whole, **options)
    try:
        training_runs.run(parts, progress=training_runs.interrupted, **options)
    except KeyboardInterrupt:
        training_runs.run(parts, **options)
    one, other = (load_file(folder / "checkpoint.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    rows = run_folder.RunFolder(whole).rows()
    steps, judged = ([r for r in rows if r["kind"] == kind] for kind in ("step", "validation"))
    assert all(None not in row["loss"] for row in judged)
    assert any(None in row["loss"] for row in steps)
    curves_figure(Curves("tiny", (1, 3), steps, judged))


def test_a_curriculum_is_for_a_model_that_is_trained(tmp_path):
    with pytest.raises(ValueError, match="curriculum acts on the backbone, which is not trained"):
        train(model(), data(), config(curriculum="gradual"), tmp_path)
    with pytest.raises(ValueError, match="curriculum is 'x'; choose one of None, rotational, gradual"):
        config(curriculum="x")

"""The loss of tokens against its formula, and a step against plain autograd."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import offramp
from offramp.distillation.language_models import distil
from offramp.distillation.objectives import TokenLoss, token_losses
from offramp.distillation.token_weights import new_token_weights
from offramp.training.config import TrainConfig
from offramp.training.data import Data
from offramp.training.objectives import OBJECTIVES
from offramp.training.schedule import WEIGHTS
from offramp.training.trainer import train
from tiny import tiny
from token_distillation import GROUPS, ONE, config, data, rows, same, teacher, texts, token_weights
from training_runs import model

# ---------------------------------------------------------------- the loss


def drawn(seed, count=9, size=5):
    generator = torch.Generator().manual_seed(seed)
    student, guide = (2 * torch.randn(count, size, generator=generator) for _ in range(2))
    labels = torch.randint(size, (count,), generator=generator)
    return student.requires_grad_(), guide, labels, 3 * torch.rand(count, generator=generator)


def losses(student, guide, labels, loss, *, weights=None, count=None, groups=None, rows=4):
    """Of logits: what the states are, and what a readout leaves as it is."""
    groups = torch.full_like(labels, -1) if groups is None else groups
    sides = (student, lambda x: x), (guide, lambda x: x)
    return token_losses(*sides, labels, groups, loss, rows=rows, names=2, weights=weights, count=count)


@given(
    st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1.0, 2.5]),
    st.sampled_from(["kd", "ce", "both"]), st.sampled_from(["forward-kl", "reverse-kl"]), st.integers(1, 9),
)  # fmt: skip
@settings(max_examples=30)
def test_loss_and_gradient_are_the_formula_token_by_token(seed, fraction, temperature, weight_on, objective, rows):
    student, guide, labels, weights = drawn(seed)
    groups = torch.tensor([0, 1, 0, -1, 1, 0, 0, -1, 0])
    loss = TokenLoss(OBJECTIVES[objective], temperature, fraction, weight_on)
    found = losses(student, guide, labels, loss, weights=weights, count=7, groups=groups, rows=rows)
    gradient, student.grad = student.grad, None
    total, sums = 0.0, {name: [0.0] * 5 for name in (0, 1, -1)}
    for z, t, label, weight, group in zip(student, guide, labels, weights, groups.tolist(), strict=True):
        q, p = F.softmax(z / temperature, 0), F.softmax(t / temperature, 0)
        one, other = (p, q) if objective == "forward-kl" else (q, p)
        kd = temperature**2 * (one * (one.log() - other.log())).sum()
        ce = -F.log_softmax(z, 0)[label]
        total = total + (1 - fraction) * ce * (weight if weight_on != "kd" else 1)
        total = total + fraction * kd * (weight if weight_on != "ce" else 1)
        numbers = [1, float(kd.detach()), float(ce.detach()), z.argmax() == t.argmax(), z.argmax() == label]
        sums[group] = [a + float(b) for a, b in zip(sums[group], numbers, strict=True)]
    (total / 7).backward()
    torch.testing.assert_close(gradient, student.grad, rtol=1e-4, atol=1e-6)
    assert float(found.loss) == pytest.approx(float(total.detach()), rel=1e-5)
    for place, name in enumerate((0, 1, -1)):
        assert found.values[place].tolist() == pytest.approx(sums[name], rel=1e-5, abs=1e-6)
    assert found.by_group("agreement") == pytest.approx([sums[g][3] / sums[g][0] for g in (0, 1)])


def gradient_of(loss, seed=0, **options):
    student, guide, labels, _ = drawn(seed)
    losses(student, guide, labels, loss, count=1, **options)
    return student.grad


def test_ends_of_the_mixture_and_of_the_temperature():
    student, guide, labels, _ = drawn(0)
    forward = OBJECTIVES["forward-kl"]
    F.cross_entropy(student, labels, reduction="sum").backward()
    torch.testing.assert_close(gradient_of(TokenLoss(forward, 3.0, 0.0)), student.grad)
    student.grad = None
    F.cross_entropy(student, guide.softmax(-1), reduction="sum").backward()  # soft targets
    torch.testing.assert_close(gradient_of(TokenLoss(forward, 1.0, 1.0)), student.grad)
    equal = losses(guide, guide, labels, TokenLoss(forward, 2.0, 1.0))
    assert equal.mean("kd") == pytest.approx(0, abs=1e-6)
    assert equal.mean("agreement") == 1
    size = [float(gradient_of(TokenLoss(forward, t, 1.0)).norm()) for t in (20.0, 80.0)]
    assert size[0] == pytest.approx(size[1], rel=0.1)  # without T² they would differ 16-fold
    z, t = student.detach(), guide  # and tend to those of matching logits
    matching = ((z - z.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))) / z.shape[-1]
    torch.testing.assert_close(gradient_of(TokenLoss(forward, 1e3, 1.0)), matching, rtol=0.05, atol=2e-3)


def test_a_weight_of_two_is_a_token_that_is_there_twice():
    student, guide, labels, _ = drawn(3)
    loss = TokenLoss(OBJECTIVES["forward-kl"], 2.0, 0.5, "both")
    weighted = gradient_of(loss, 3, weights=torch.tensor([2.0, *[1.0] * 8]))
    again = torch.tensor([0, *range(9)])
    losses(student[again], guide[again], labels[again], loss, count=1, rows=99)
    torch.testing.assert_close(weighted, student.grad)


# ---------------------------------------------------------------- a step of a whole model


def by_transformers(student, guide, part, weights, fraction, temperature):
    """The mixed loss of a step over transformers' own logits."""
    where, total, count = part.counted[:, 1:], 0.0, 0
    z, t = student(part.ids[:, :-1]).logits, guide(part.ids[:, :-1]).logits.detach()
    for row, column in where.nonzero().tolist():
        own, label = z[row, column], part.ids[row, column + 1]
        kd = F.kl_div(
            F.log_softmax(own / temperature, 0), F.softmax(t[row, column] / temperature, 0), reduction="sum"
        )  # fmt: skip
        weight = 1.0 if weights is None else float(weights[row, column + 1])
        ce = F.cross_entropy(own[None], label[None])
        total = total + weight * (fraction * temperature**2 * kd + (1 - fraction) * ce)
        count += 1
    return total / count


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_step_is_gradient_descent_on_the_weighted_loss(tmp_path, monkeypatch, micro_batch):
    monkeypatch.setattr(
        "offramp.distillation.language_models.adamw", lambda params, rate, _: torch.optim.SGD(list(params), lr=rate)
    )
    lm, guide, parts = model(), teacher(), data()
    rule = token_weights(start=0, every=5)
    weights = new_token_weights(lm.split, guide.split, parts.train, rule, step=0, seed=0, size=4, loop=ONE)
    expected = copy.deepcopy(lm.model)
    loss = by_transformers(expected, guide.model, parts.train, weights, 0.7, 2.0)
    loss.backward()
    options = {"steps": 1, "warmup": 0, "schedule": "constant", "clip": None, "learning_rate": 0.1, "batch_size": 12}
    result = distil(
        lm, guide, parts, config(rule, micro_batch=micro_batch, **options), tmp_path, groups=GROUPS
    )  # fmt: skip
    (row,) = [row for row in rows(tmp_path) if row["kind"] == "step"]
    assert row["objective"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, got), parameter in zip(lm.model.named_parameters(), expected.parameters(), strict=True):
        moved = parameter - 0.1 * parameter.grad
        torch.testing.assert_close(got.detach(), moved.detach(), rtol=1e-4, atol=2e-5, msg=name)
    assert same(guide.model.state_dict(), tiny("qwen2").state_dict())
    assert same(offramp.load(result.model).model.state_dict(), lm.model.state_dict())
    assert not lm.model.training


def test_without_a_teacher_it_is_training_on_the_text(tmp_path):
    """λ = 0 against `train` with exits that count for nothing."""
    parts, lm, plain = data(), model(), model()
    distil(lm, teacher(), parts, config(fraction=0.0), tmp_path / "a", groups=GROUPS)
    exits = TrainConfig(layers=(3,), trainable="all", objective="labels", steps=8, learning_rate=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WEIGHTS, "uniform", lambda _: [0.0, 1.0])
        train(plain, parts, exits, tmp_path / "b")
    assert same(lm.model.state_dict(), plain.model.state_dict())


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tmp_path):
    result = distil(model(), model(), data(), config(fraction=1.0, steps=1), tmp_path)
    (row,) = [row for row in rows(tmp_path) if row["kind"] == "step"]
    assert row["gradient_norm"] < 1e-5
    assert result.overall.kd_before == pytest.approx(0, abs=1e-5)
    assert result.overall.agreement_before == 1


@pytest.mark.parametrize("options", [{}, {"objective": "reverse-kl"}, {"trainable": "lora", "learning_rate": 2e-2}])
def test_a_student_comes_closer_to_its_teacher(tmp_path, options):
    settings = config(fraction=1.0, **{"steps": 25, "learning_rate": 1e-2, "batch_size": 6, **options})
    result = distil(model(), teacher(), Data(texts(), texts()), settings, tmp_path)
    assert result.overall.kd < 0.8 * result.overall.kd_before
    assert result.overall.agreement > result.overall.agreement_before

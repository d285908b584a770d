"""What students learn, against closed forms and loops."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from classifier_runs import Output
from offramp.classifiers.batches import Batch
from offramp.distillation.objectives import (
    Distilled,
    FeatureMatching,
    GroupDRO,
    LearningFromFailure,
    TokenLoss,
    divergence,
    token_losses,
)  # fmt: skip
from offramp.training.objectives import OBJECTIVES


def batch_of(labels, rows=None, groups=None, inputs=None):
    labels = torch.as_tensor(labels)
    rows = torch.arange(len(labels)) if rows is None else torch.as_tensor(rows)
    return Batch(rows, tuple(map(str, rows.tolist())), labels, inputs, groups)


def outputs_of(logits):
    return [Output(logits, logits)]


def draw(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- plain distillation


@given(st.integers(0, 1000), st.integers(2, 6), st.floats(0.5, 10))
def test_divergence_is_torchs_row_by_row(seed, classes, temperature):
    student, teacher = draw(7, classes, seed=seed), draw(7, classes, seed=seed + 1)
    found = divergence(student, teacher, temperature)
    for row in range(7):
        expected = F.kl_div(
            (student[row] / temperature).log_softmax(-1), (teacher[row] / temperature).softmax(-1), reduction="sum"
        )
        assert float(found[row]) == pytest.approx(temperature**2 * float(expected), rel=1e-9, abs=1e-12)
    assert divergence(student, student, temperature).abs().max() < 1e-12
    shifted = divergence(student + 5, teacher - 3, temperature)  # offsets of logits mean nothing
    torch.testing.assert_close(shifted, found)


def test_no_fraction_is_cross_entropy_and_all_of_it_is_soft_cross_entropy():
    teacher, batch = draw(6, 3, seed=1), batch_of([0, 1, 2, 0, 1, 2])
    for fraction, temperature in ((0.0, 4.0), (1.0, 1.0)):
        z = draw(6, 3).requires_grad_()
        loss, _ = Distilled(6, lambda _: teacher, fraction=fraction, temperature=temperature)(outputs_of(z), batch)
        loss.backward()
        own = z.detach().requires_grad_()
        target = batch.labels if fraction == 0 else teacher.softmax(-1)
        F.cross_entropy(own.float() if fraction == 0 else own, target).backward()
        torch.testing.assert_close(z.grad, own.grad, atol=1e-7, rtol=1e-5)


def test_the_gradient_hardly_depends_on_the_temperature():
    teacher, norms = draw(200, 4, seed=1), []
    for temperature in (4.0, 8.0, 16.0, 32.0):
        z = draw(200, 4).requires_grad_()
        divergence(z, teacher, temperature).mean().backward()
        norms.append(float(z.grad.norm()))
    assert max(norms) / min(norms) < 1.6
    assert abs(norms[-1] / norms[-2] - 1) < 0.05  # and tends to a constant


def test_weights_of_one_change_nothing_and_two_is_two_rows():
    z, teacher, labels = draw(5, 3).float(), draw(5, 3, seed=1).float(), torch.tensor([0, 1, 2, 0, 1])
    for weight_on in ("kd", "ce", "both"):
        make = lambda rows, t: Distilled(rows, lambda b: t[b.rows], fraction=0.6, temperature=3.0, weight_on=weight_on)  # noqa: B023, E731
        plain = make(5, teacher)
        expected = (
            0.4 * F.cross_entropy(z, labels, reduction="none") + 0.6 * divergence(z, teacher, 3.0)
        ).mean()  # never weighted
        assert torch.equal(plain(outputs_of(z), batch_of(labels))[0], expected)
        if weight_on != "both":
            continue
        heavy = make(5, teacher)
        heavy.weights[2] = 2.0
        order = [0, 1, 2, 2, 3, 4]
        doubled = make(6, teacher[order])
        one = heavy(outputs_of(z), batch_of(labels))[0] * 5
        other = doubled(outputs_of(z[order]), batch_of(labels[order]))[0] * 6
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("weight_on", "ce", "kd"), [("kd", 1.0, 3.0), ("ce", 3.0, 1.0), ("both", 3.0, 3.0)])
def test_only_the_named_term_is_weighted(weight_on, ce, kd):
    z, teacher, batch = draw(1, 3), draw(1, 3, seed=1), batch_of([1])
    objective = Distilled(1, lambda _: teacher.float(), fraction=0.7, temperature=2.0, weight_on=weight_on)
    objective.weights.fill_(3.0)
    loss, terms = objective(outputs_of(z.float()), batch)
    assert float(loss) == pytest.approx(0.3 * ce * float(terms["ce"]) + 0.7 * kd * float(terms["kd"]), rel=1e-5)


@given(st.permutations(range(6)), st.integers(1, 5))
def test_weights_follow_rows_under_any_order(order, cut):
    weights, labels, z = torch.arange(1.0, 7.0), torch.tensor([0, 1, 0, 1, 0, 1]), draw(6, 2).float()
    objective = Distilled(6)
    objective.weights.copy_(weights)
    total = sum(
        len(rows) * float(objective(outputs_of(z[rows]), batch_of(labels[rows], rows))[0])
        for rows in (torch.tensor(order[:cut]), torch.tensor(order[cut:]))
    )
    expected = (weights * F.cross_entropy(z, labels, reduction="none")).sum()
    assert total == pytest.approx(float(expected), rel=1e-5)


def test_different_classes_are_refused():
    with pytest.raises(ValueError, match="they have different classes"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 2), 1.0)


def test_features_are_compared_at_the_smaller_size():
    made, target = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 4, 4)
    objective = FeatureMatching(3, lambda _: target)
    objective.weights.copy_(torch.tensor([1.0, 5.0, 2.0]))
    loss, _ = objective([SimpleNamespace(matched=made)], batch_of([0, 0, 0]))
    pooled = target.reshape(3, 4, 2, 2, 2, 2).mean((3, 5))
    expected = ((made - pooled) ** 2).mean((1, 2, 3)) @ torch.tensor([1.0, 5.0, 2.0]) / 3
    torch.testing.assert_close(loss, expected)


# ---------------------------------------------------------------- baselines


def test_group_dro_against_a_loop():
    counts, objective = torch.tensor([40, 10, 5]), GroupDRO(torch.tensor([40, 10, 5]), step=0.5, adjustment=2.0)
    q = [1 / 3] * 3
    for step in range(4):
        z, labels = draw(8, 2, seed=step).float(), torch.tensor([0, 1] * 4)
        groups = torch.tensor([0, 0, 0, 1, 1, 0, 1, 0]) if step else torch.tensor([0, 1, 2] * 2 + [0, 1])
        loss, _ = objective(outputs_of(z), batch_of(labels, groups=groups))
        losses, means = F.cross_entropy(z, labels, reduction="none"), [0.0, 0.0, 0.0]
        for g in range(3):
            inside = groups == g
            if inside.any():
                means[g] = float(losses[inside].mean())
                q[g] *= float(torch.tensor(0.5 * (means[g] + 2.0 / float(counts[g]) ** 0.5)).exp())
        q = [value / sum(q) for value in q]
        assert float(objective.q.sum()) == pytest.approx(1, abs=1e-6)
        assert objective.q.tolist() == pytest.approx(q, rel=1e-4)
        assert float(loss) == pytest.approx(sum(a * b for a, b in zip(q, means, strict=True)), rel=1e-4)


def test_equal_groups_stay_equal():
    objective = GroupDRO(torch.tensor([10, 10]), step=1.0)
    z = torch.tensor([[1.0, 0.0]] * 4)
    for _ in range(3):
        objective(outputs_of(z), batch_of([0, 0, 0, 0], groups=torch.tensor([0, 1, 0, 1])))
    assert objective.q.tolist() == [0.5, 0.5]


class Scripted(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, rows):
        return outputs_of(self.logits[rows])


def test_learning_from_failure_against_a_loop():
    labels = torch.tensor([0, 0, 1, 1])
    biased, debiased = draw(4, 2, seed=1).float(), draw(4, 2, seed=2).float()
    objective = LearningFromFailure(labels, Scripted(biased.clone()), power=0.7, memory=0.7)
    z = debiased.clone().requires_grad_()
    rows = torch.tensor([2, 0, 3, 1])
    loss, _ = objective(outputs_of(z[rows]), batch_of(labels[rows], rows, inputs=rows))
    loss.backward()
    each = [F.cross_entropy(x, labels, reduction="none") for x in (biased, debiased)]
    scaled = [torch.stack([0.3 * e[i] / max(0.3 * e[j] for j in range(4) if labels[j] == labels[i]) for i in range(4)])
              for e in each]  # fmt: skip
    weights = scaled[0] / (scaled[0] + scaled[1])
    torch.testing.assert_close(objective.weights, weights)
    own = debiased.clone().requires_grad_()
    (weights * F.cross_entropy(own, labels, reduction="none")).mean().backward()
    torch.testing.assert_close(z.grad, own.grad)
    # generalised cross-entropy (1 - p^q) / q has q-free gradient p^q times that of cross-entropy
    other = biased.clone().requires_grad_()
    (0.7 * ((1 - other.softmax(-1)[torch.arange(4), labels] ** 0.7) / 0.7)).mean().backward()
    torch.testing.assert_close(objective.biased.logits.grad, other.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weight_on", ["kd", "ce", "both"])
@pytest.mark.parametrize("fraction", [0.0, 0.6, 1.0])
def test_rows_and_tokens_learn_by_one_loss_which_is_a_plain_loop(fraction, weight_on):
    student, teacher, labels = draw(5, 4).float(), draw(5, 4, seed=1).float(), torch.tensor([0, 3, 1, 1, 2])
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])
    expected = 0.0
    for z, guide, label, weight in zip(student, teacher, labels, weights, strict=True):
        kd = 4 * F.kl_div((z / 2).log_softmax(-1), (guide / 2).softmax(-1), reduction="sum")
        ce = F.cross_entropy(z, label)
        u, v = (weight if weight_on in (name, "both") else 1.0 for name in ("kd", "ce"))
        expected += float((1 - fraction) * v * ce + fraction * u * kd)
    rows = Distilled(5, lambda _: teacher, fraction=fraction, temperature=2.0, weight_on=weight_on)
    rows.weights.copy_(weights)
    assert float(rows(outputs_of(student), batch_of(labels))[0]) == pytest.approx(expected / 5, rel=1e-5)
    loss = TokenLoss(OBJECTIVES["forward-kl"], 2.0, fraction, weight_on)
    sides = (student, lambda z: z), (teacher, lambda z: z)
    sums = token_losses(*sides, labels, torch.full((5,), -1), loss, rows=2, names=0, weights=weights)
    assert float(sums.loss) == pytest.approx(expected, rel=1e-5)

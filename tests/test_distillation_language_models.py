"""Distillation of language models against plain autograd, loops over tokens and brute force over groups."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

import offramp
from offramp import LanguageModel, cli
from offramp.distillation.instance_weights import InstanceWeights
from offramp.distillation.language_models import TokenDistillation, distil, require_same_vocabulary
from offramp.distillation.own_answers import OwnAnswers
from offramp.distillation.prompt_groups import entry_documents, group_names, read_entries, read_prompts
from offramp.distillation.token_losses import TokenLoss, token_losses
from offramp.distillation.token_readout import TokenReadoutConfig
from offramp.distillation.token_report import readouts_table
from offramp.distillation.token_weights import TokenWeights, new_token_weights
from offramp.report.pages import pages_of
from offramp.training import OBJECTIVES, AnswerConfig, TrainConfig, train
from offramp.training.data import Data, Document, Windows, batch, cut
from offramp.training.run_folder import RunFolder
from tiny import VOCABULARY, tiny, tokenizer
from training_runs import model, windows

GROUPS = ("majority", "minority")
ONE = SimpleNamespace(workers=SimpleNamespace(process_index=0, num_processes=1), summed=lambda values: values)
"""A loop of one process."""


def texts(count=12, *, seed=0):
    """Random windows with prompts of different lengths, in two groups."""
    made = windows(count, prompts=5, seed=seed)
    return replace(made, attributes=torch.arange(count) % 2)


def data():
    return Data(texts(), texts(6, seed=1), {"kind": "random"})


def teacher():
    """Another tiny model with the same tokenizer."""
    return LanguageModel(copy.deepcopy(tiny("qwen2")), tokenizer(), name="teacher")


def config(weights=None, fraction=0.7, **options):
    training = {"trainable": "all", "steps": 8, "learning_rate": 1e-3, "save_every": 3, "temperature": 2.0, **options}
    return TokenDistillation(TrainConfig(**training), fraction, weights)


def token_weights(kind="head", rule=None, readout=None, **options):
    rule = InstanceWeights(**{"alpha": 1.0, "beta": 2.0, "n_mc": 7, "weight_on": "both", **(rule or {})})
    settings = {"layer": 2, "kind": kind, "batch_size": 16, "rank": 4, **(readout or {})}
    return TokenWeights(rule, TokenReadoutConfig(**settings), **{"every": 2, **options})


def rows(folder):
    return [{**row, "tokens_per_second": 0} for row in RunFolder(folder).rows()]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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
    monkeypatch.setattr("offramp.training.loop.adamw", lambda params, rate, _: torch.optim.SGD(list(params), lr=rate))
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
        patch.setitem(offramp.training.WEIGHTS, "uniform", lambda _: [0.0, 1.0])
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


# ---------------------------------------------------------------- weights


def early(lm, part, layer):
    """Float64 probabilities after a layer, by transformers' hidden states: one list of [T - 1, V] per window."""
    with torch.no_grad():
        hidden = lm.model(part.ids[:, :-1], output_hidden_states=True).hidden_states[layer]
        return lm.model.lm_head(lm.model.model.norm(hidden)).double().softmax(-1)


@pytest.mark.parametrize("signal", ["margin", "entropy", "loss"])
@pytest.mark.parametrize("gate", ["wrong", "all", "correct"])
@pytest.mark.parametrize("target", ["text", "teacher"])
def test_weights_are_the_rule_token_by_token(signal, gate, target):
    lm, guide, part = model(), teacher(), texts()
    rule = token_weights(rule={"signal": signal, "gate": gate, "alpha": 0.5, "beta": 1.5}, target=target)
    found = new_token_weights(lm.split, guide.split, part, rule, step=3, seed=0, size=5, loop=ONE)
    p, said = early(lm, part, 2), guide.model(part.ids[:, :-1]).logits.argmax(-1)
    places = part.counted[:, 1:].nonzero().tolist()
    u, right = [], []
    for row, column in places:
        q = sorted(p[row, column].tolist(), reverse=True)
        true = int(part.ids[row, column + 1] if target == "text" else said[row, column])
        right.append(int(p[row, column].argmax()) == true)
        own = {"margin": q[0] - q[1], "entropy": -sum(x * math.log(x) for x in q) / math.log(VOCABULARY)}
        u.append({**own, "loss": -math.log(p[row, column, true])}[signal])
    if signal == "loss":
        u = [sorted(u).index(value) / (len(u) - 1) for value in u]
    expected = torch.ones(part.ids.shape)
    for (row, column), value, hit in zip(places, u, right, strict=True):
        if gate == "all" or hit == (gate == "correct"):
            expected[row, column + 1] = math.exp(1.5 * value**0.5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["head", "lens"])
@pytest.mark.parametrize("signal", ["laplace_margin", "laplace_entropy"])
def test_laplace_without_uncertainty_is_the_readout_itself(kind, signal):
    lm, guide, part = model(), teacher(), texts()
    found = {}
    for name in (signal, signal.removeprefix("laplace_")):
        rule = token_weights(
            kind, {"signal": name, "gate": "all", "prior_variance": 1e-12, "beta": 1.0}, candidates=VOCABULARY
        )  # fmt: skip
        found[name] = new_token_weights(lm.split, guide.split, part, rule, step=1, seed=0, size=5, loop=ONE)
    one, other = found.values()
    torch.testing.assert_close(one, other, rtol=5e-3, atol=5e-3)
    wide = token_weights(kind, {"signal": signal, "gate": "all", "prior_variance": 10.0, "beta": 1.0})
    uncertain = new_token_weights(lm.split, guide.split, part, wide, step=1, seed=0, size=5, loop=ONE)
    assert not torch.allclose(uncertain, one, atol=1e-2)
    assert bool((uncertain[part.counted] >= 1).all() & (uncertain <= math.e).all())


@pytest.mark.parametrize(
    ("fit", "target"),
    [("labels", "text"), ("labels", "teacher"), ("forward-kl", "teacher"), ("teacher-argmax", "teacher")],
)
def test_a_lens_is_taught_what_it_should_say(fit, target):
    """It gets fewer tokens wrong than the head: the gate alone, with weight 2, counts them."""
    lm, guide, part, wrong = model(), teacher(), texts(8), {}
    for kind in ("head", "lens"):
        rule = token_weights(
            kind, {"alpha": 0.0, "beta": math.log(2)}, target=target,
            readout={"fit": fit, "epochs": 40, "learning_rate": 2e-2, "rank": None},
        )  # fmt: skip
        w = new_token_weights(lm.split, guide.split, part, rule, step=1, seed=0, size=9, loop=ONE)
        wrong[kind] = float(part.of_tokens(w).mean()) - 1
    assert wrong["lens"] < 0.5 * wrong["head"]


def test_weights_follow_tokens_under_any_shuffling():
    part = texts(30)
    part = replace(part, weights=part.ids.float() * 100 + torch.arange(12))
    seen = []
    for step in range(2 * 8):
        some = batch(part, step, 4, seed=5, most=None if step % 2 else 3)
        ids, weights = some.of_tokens(some.ids), some.of_tokens(some.weights)
        assert torch.equal(weights // 100, ids.float())
        columns = some.of_tokens(torch.arange(some.ids.shape[1]).expand_as(some.ids))
        assert torch.equal(weights % 100, columns.float())
        seen += some.attributes.tolist()
    assert seen.count(0) == seen.count(1) == 30


def test_weights_do_not_depend_on_the_order_of_windows_nor_on_processes():
    lm, guide, part = model(), teacher(), texts()
    rule = token_weights(rule={"gate": "all"})
    options = {"step": 0, "seed": 0, "size": 5}
    whole = new_token_weights(lm.split, guide.split, part, rule, loop=ONE, **options)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = Windows(part.ids[order], part.counted[order])
    torch.testing.assert_close(new_token_weights(lm.split, guide.split, mixed, rule, loop=ONE, **options), whole[order])
    sums = []

    def of(rank):
        loop = SimpleNamespace(workers=SimpleNamespace(process_index=rank, num_processes=2))
        loop.summed = lambda values: (sums.append(values), values)[1]
        new_token_weights(lm.split, guide.split, part, rule, loop=loop, **options)

    of(0)
    of(1)
    ready = SimpleNamespace(workers=ONE.workers, summed=lambda _: sum(sums))
    torch.testing.assert_close(new_token_weights(lm.split, guide.split, part, rule, loop=ready, **options), whole)


@pytest.mark.parametrize("kind", ["head", "lens"])
def test_a_readout_changes_nothing_in_the_student(kind):
    lm, guide, part = model(), teacher(), texts()
    lm.model.train()
    lm.model.model.layers[1].eval()
    before, drawn = copy.deepcopy(lm.model.state_dict()), torch.random.get_rng_state()
    modes, flags = [m.training for m in lm.model.modules()], [p.requires_grad for p in lm.model.parameters()]
    rule = token_weights(kind, {"signal": "laplace_margin"}, readout={"fit": "forward-kl"})
    new_token_weights(lm.split, guide.split, part, rule, step=0, seed=0, size=5, loop=ONE)
    assert same(lm.model.state_dict(), before)
    assert [m.training for m in lm.model.modules()] == modes
    assert [p.requires_grad for p in lm.model.parameters()] == flags
    assert all(p.grad is None for p in [*lm.model.parameters(), *guide.model.parameters()])
    assert torch.equal(torch.random.get_rng_state(), drawn)


@pytest.mark.parametrize("kind", ["head", "lens"])
def test_weights_of_one_are_no_weights_bit_for_bit(tmp_path, kind):
    """So a readout, its posterior and its draws leave the student, its optimiser and its dropout alone as well."""
    ends = []
    for name, weights in (("plain", None), ("ones", token_weights(kind, {"beta": 0.0, "signal": "laplace_margin"}))):
        distil(model(), teacher(), data(), config(weights, layer_dropout=0.3), tmp_path / name, groups=GROUPS)
        ends.append(load_file(tmp_path / name / "checkpoint.safetensors"))
    ones = ends[1].pop("weights.token_weights")
    assert bool((ones == 1).all())
    assert same(*ends)
    other = tmp_path / "other"
    distil(model(), teacher(), data(), config(token_weights(kind), layer_dropout=0.3), other, groups=GROUPS)
    assert not same(
        load_file(other / "model" / "model.safetensors"), load_file(tmp_path / "ones/model/model.safetensors")
    )


def test_controls_and_normalisation(tmp_path):
    lm, guide, part = model(), teacher(), texts()
    found = {}
    for name, more in {
        "plain": {}, "permuted": {"control": "permuted"}, "mean-matched": {"control": "mean-matched"},
        "mean": {"normalise": "mean"},
    }.items():  # fmt: skip
        rule = token_weights(rule={"gate": "all", **more})
        w = new_token_weights(lm.split, guide.split, part, rule, step=0, seed=0, size=5, loop=ONE)
        assert bool((w[~part.counted] == 1).all())
        found[name] = part.of_tokens(w)
    torch.testing.assert_close(found["permuted"].sort().values, found["plain"].sort().values)
    assert not torch.equal(found["permuted"], found["plain"])
    torch.testing.assert_close(found["mean-matched"], torch.full_like(found["plain"], float(found["plain"].mean())))
    torch.testing.assert_close(found["mean"], found["plain"] / found["plain"].mean())


# ---------------------------------------------------------------- resuming, own answers


def own(**options):
    prompts = [f"w{20 + i} the sky w{40 + i}" for i in range(10)]
    settings = {"max_new_tokens": 5, "batch_size": 3, "temperature": 1.5}
    return OwnAnswers(
        prompts, [i % 2 for i in range(10)], AnswerConfig(**settings), **{"every": 3, "share": 0.4, **options}
    )


def on_policy():
    weights = token_weights("lens", {"signal": "laplace_margin"}, target="teacher", start=0, every=4)
    return own(), config(weights, 1.0, trainable="lora", layer_dropout=0.4, batch_size=2)


def fixed():
    return data(), config(token_weights("lens", start=1), layer_dropout=0.4, positions=4)


@pytest.mark.parametrize("setting", [fixed, on_policy])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, setting, stop):
    def stops(done, total, what="", *_):
        if done == stop and what != "answers":
            raise KeyboardInterrupt

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    source, settings = setting()
    expected = distil(model(), teacher(), source, settings, whole, groups=GROUPS)
    with pytest.raises(KeyboardInterrupt):
        distil(model(), teacher(), source, settings, broken, groups=GROUPS, progress=stops)
    assert not (broken / "model").exists()
    result = distil(model(), teacher(), source, settings, broken, groups=GROUPS)
    assert same(*(load_file(f / "checkpoint.safetensors") for f in (whole, broken)))
    assert same(*(load_file(f / "model" / "model.safetensors") for f in (whole, broken)))
    assert rows(whole) == rows(broken)
    assert (result.overall, result.groups) == (expected.overall, expected.groups)
    again = distil(model(), teacher(), source, settings, broken, groups=GROUPS)
    assert (again.steps, again.groups) == (8, result.groups)


def test_answering_may_be_interrupted_too(tmp_path):
    calls = []

    def stops(done, total, what="", *_):
        calls.append(what)
        if calls.count("answers") == 8:  # 3 times for held-out prompts, 3 for the others, then in the second round
            raise KeyboardInterrupt

    source, settings = on_policy()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = distil(model(), teacher(), source, settings, whole, groups=GROUPS)
    with pytest.raises(KeyboardInterrupt):
        distil(model(), teacher(), source, settings, broken, groups=GROUPS, progress=stops)
    lines = [len((f / "answers-000003.jsonl").read_text().splitlines()) for f in (whole, broken)]
    assert lines[1] < lines[0]
    assert distil(model(), teacher(), source, settings, broken, groups=GROUPS).groups == expected.groups
    assert same(*(load_file(f / "model" / "model.safetensors") for f in (whole, broken)))


def test_own_answers_are_the_students_as_it_then_is(tmp_path):
    source, settings = own(), config(None, 1.0, learning_rate=3e-2, batch_size=3, save_every=3, steps=6)
    lm = model()
    distil(lm, teacher(), source, settings, tmp_path, groups=GROUPS)
    first, second, held_out = (
        [json.loads(line) for line in (tmp_path / f"answers-{name}.jsonl").read_text().splitlines()]
        for name in ("000000", "000003", "held-out")
    )
    assert len(first) == len(second) == 1 + 6
    assert len(held_out) == 1 + 4
    assert [r["prompt"] for r in first[1:]] == [r["prompt"] for r in second[1:]]
    assert not {r["prompt"] for r in first[1:]} & {r["prompt"] for r in held_out[1:]}
    assert [r["ids"] for r in first[1:]] != [r["ids"] for r in second[1:]]
    places, _ = source.parts()
    again = source.answered(model(), places, tmp_path / "again.jsonl", "me")
    ids, present = again.ids, again.counted
    for row, record in enumerate(first[1:]):  # by the untrained student; prompts do not count
        assert ids[row, : len(record["ids"])].tolist() == record["ids"]
        assert present[row].nonzero().flatten().tolist() == list(range(record["start"], len(record["ids"])))
    assert again.attributes.tolist() == [place % 2 for place in places]


@pytest.mark.parametrize("part", ["prompts", "attributes"])
def test_other_prompts_or_groups_are_another_run(tmp_path, part):
    """Even if there are as many, with the same names of groups."""
    source, settings = own(), config(None, 1.0, steps=1)
    distil(model(), teacher(), source, settings, tmp_path, groups=GROUPS)
    other = replace(source, **{part: list(reversed(getattr(source, part)))})
    with pytest.raises(ValueError, match="content"):
        distil(model(), teacher(), other, settings, tmp_path, groups=GROUPS)
    distil(model(), teacher(), own(), settings, tmp_path, groups=GROUPS)


# ---------------------------------------------------------------- groups


A, B, CUE_A, CUE_B, ASK = 10, 11, 12, 13, 14


def prompts_with_a_cue(count, share, seed):
    """core, cue, ask -> A or B: by the core's parity. The cue says the same, except in the minority."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(count):
        core = int(torch.randint(30, 70, (), generator=generator))
        conflict = bool(torch.rand((), generator=generator) < share)
        answer = core % 2
        cue = (CUE_A, CUE_B)[answer != conflict]
        documents.append(Document((1, core, cue, ASK, (A, B)[answer]), 4, "", attribute=int(conflict)))
    return cut(documents, 8)


def test_a_shortcut_that_breaks_for_the_minority_shows_in_the_report(tmp_path):
    torch.manual_seed(0)
    balanced, biased = prompts_with_a_cue(600, 0.5, 1), prompts_with_a_cue(300, 0.08, 2)
    held_out = prompts_with_a_cue(200, 0.5, 3)
    guide = model()
    train(
        guide, Data(balanced, held_out),
        TrainConfig(layers=(3,), trainable="all", objective="labels", steps=150, batch_size=32, learning_rate=3e-3),
        tmp_path / "teacher",
    )  # fmt: skip
    rule = token_weights("lens", {"alpha": 0.05, "beta": 2.0}, start=0, every=8, readout={"layer": 1, "epochs": 20})
    options = {"steps": 24, "batch_size": 32, "learning_rate": 3e-3, "temperature": 1.0}
    student = LanguageModel(copy.deepcopy(tiny("qwen2")), tokenizer(), name="student")
    result = distil(
        student, guide, Data(biased, held_out), config(rule, 1.0, **options), tmp_path / "student", groups=GROUPS
    )  # fmt: skip
    with torch.no_grad():
        z, t = (lm.model(held_out.ids[:, :-1]).logits[:, 3] for lm in (student, guide))
    labels, kinds = held_out.ids[:, 4], held_out.attributes
    for number, group in enumerate(result.groups):
        inside = [row for row in range(len(labels)) if int(kinds[row]) == number]
        assert (group.name, group.tokens) == (GROUPS[number], len(inside))
        agreed = [int(z[row].argmax()) == int(t[row].argmax()) for row in inside]
        right = [int(z[row].argmax()) == int(labels[row]) for row in inside]
        ce = [-float(z[row].log_softmax(0)[labels[row]]) for row in inside]
        kd = [float((t[row].softmax(0) * (t[row].log_softmax(0) - z[row].log_softmax(0))).sum()) for row in inside]
        expected = [sum(each) / len(inside) for each in (kd, ce, agreed, right)]
        assert [group.kd, group.ce, group.agreement, group.accuracy] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    weighted = [row for row in rows(tmp_path / "student") if row["kind"] == "weights"]
    assert [row["step"] for row in weighted] == [0, 8, 16]
    assert result.groups[1].weight == pytest.approx(sum(row["weight"][1] for row in weighted) / 3)
    assert weighted[-1]["weight"][1] > 1.5 * weighted[-1]["weight"][0]  # whoever the early readout fails
    assert result.worst is result.groups[1]
    assert result.groups[0].accuracy > 0.9
    assert "minority" in result.table()
    json.dumps(result.to_dict(), allow_nan=False)


def test_windows_carry_the_attributes_of_their_documents():
    documents = [
        Document(tuple(range(10, 30)), 0, "a", attribute=1),
        Document((5, 6, 7), 1, "b"),
        Document((8, 9), 0, "c"),
    ]
    made = cut(documents, 8)
    assert made.attributes.tolist() == [1, 1, 1, -1, -1]
    assert made[torch.tensor([3, 0])].attributes.tolist() == [-1, 1]
    assert made.digest() != replace(made, attributes=None).digest()
    assert cut(documents[1:], 8).attributes is None


# ---------------------------------------------------------------- what cannot be


def test_vocabularies_that_differ_name_the_first_token():
    other = tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(ValueError, match=rf"token id {VOCABULARY} is None to the student and 'new' to the teacher"):
        require_same_vocabulary(model(), LanguageModel(tiny("llama"), other))
    swapped = tokenizer()
    swapped.get_vocab = lambda: {**tokenizer().get_vocab(), "sky": 8, "is": 7}
    with pytest.raises(ValueError, match="token id 7 is 'sky' to the student and 'is' to the teacher"):
        require_same_vocabulary(model(), LanguageModel(tiny("llama"), swapped))
    large = model()
    large.model.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(ValueError, match=rf"token id {VOCABULARY} is known to one only; if the rest is padding"):
        require_same_vocabulary(model(), large)
    require_same_vocabulary(model(), teacher())


def test_what_does_not_go_together(tmp_path):
    lm = model()
    cases = [
        ((lm, LanguageModel(lm.model, lm.tokenizer), data(), config()), "the same object"),
        ((model("t5"), model(), data(), config()), "decoder-only"),
        ((model(), teacher(), own(), config()), "own answers are no labels to learn; give fraction 1"),
        ((model(), teacher(), own(), config(token_weights(), 1.0)), "give target 'teacher'"),
        ((model(), teacher(), data(), config(token_weights(readout={"layer": 4}))), r"choose one of 1\.\.3"),
    ]
    for number, (given_, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            distil(*given_, tmp_path / str(number), groups=GROUPS)
        assert not (tmp_path / str(number)).exists()
    alone = replace(data(), held_out=replace(texts(4), attributes=torch.zeros(4, dtype=torch.long)))
    with pytest.raises(ValueError, match="group 'minority' has no row in split 'held-out'"):
        distil(model(), teacher(), alone, config(), tmp_path / "a", groups=GROUPS)
    with pytest.raises(ValueError, match=r"the group of row .* is 1; allowed are 0\.\.0"):
        distil(model(), teacher(), data(), config(), tmp_path / "b", groups=GROUPS[:1])
    distil(model(), teacher(), data(), config(steps=1), tmp_path / "c")
    with pytest.raises(ValueError, match=r"config.fraction was 0.7 and is now 0.5"):
        distil(model(), teacher(), data(), config(fraction=0.5, steps=1), tmp_path / "c")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(fraction=1.1), r"in \[0, 1\]"),
        (lambda: config(trainable="exits"), "a student is trained"),
        (lambda: config(objective="labels", temperature=1.0), "forward-kl or reverse-kl"),
        (lambda: config(layers=(2,)), "are for exits"),
        (lambda: token_weights(rule={"signal": "set_size"}), "choose one of margin, entropy, loss"),
        (lambda: token_weights(rule={"gate": "excluded"}), "choose one of wrong, all"),
        (lambda: token_weights(rule={"every": 2}), "count epochs of rows"),
        (lambda: token_weights(rule={"prior_variance": None}), "cannot be tuned"),
        (lambda: token_weights(target="x"), "choose one of text, teacher"),
        (lambda: token_weights(every=0), "count from 1"),
        (lambda: token_weights("x"), "choose one of head, lens"),
        (lambda: token_weights(readout={"layer": 0}), "counts from 1"),
        (lambda: own(every=0), "count from 1"),
        (lambda: OwnAnswers(["the"]), "one to learn from"),
        (lambda: OwnAnswers(["the", "sky"], [0]), "give one for each"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- files


def test_entries_of_files(tmp_path):
    lines = [{"q": "why is", "a": " the sky", "who": True}, {"q": "the", "a": " sky is", "who": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries = read_entries(tmp_path / "a.jsonl", ("a",), prompt="q", group="who")
    assert [(e.prompt, e.text, e.group) for e in entries] == [("why is", " the sky", "True"), ("the", " sky is", None)]
    assert group_names(entries) == ("True",)
    one, two = entry_documents(model(), entries, ("True",))
    words = tokenizer()("why is the sky")["input_ids"]
    assert (one.ids, one.start, one.attribute) == ((*words, 2), 2, 0)  # and the end of the answer
    assert (two.start, two.attribute) == (1, -1)
    (tmp_path / "b.txt").write_text("the sky\n\nwhy ?\n")
    assert [e.text for e in read_prompts(tmp_path / "b.txt")] == ["the sky", "why ?"]
    for options, message in [
        ({"prompt": "x"}, r"a.jsonl, line 1 has no 'x'; it has 'q', 'a', 'who'"),
        ({"group": "list"}, r"a.jsonl, line 1: the group is a JSON list"),
    ]:
        (tmp_path / "a.jsonl").write_text(json.dumps({**lines[0], "list": []}))
        with pytest.raises(ValueError, match=message):
            read_entries(tmp_path / "a.jsonl", ("a",), **options)
    with pytest.raises(ValueError, match="plain text and tells no prompts or groups apart"):
        read_prompts(tmp_path / "b.txt", group="who")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("distil")
    for name in ("llama", "qwen2"):
        tiny(name).save_pretrained(made / name)
        tokenizer(chat=False).save_pretrained(made / name)
    return made


def run(folders, *arguments):
    start = ["distill", folders / "llama", "--teacher", folders / "qwen2", "--task", "language-modelling"]
    return CliRunner().invoke(cli.app, [str(a) for a in (*start, *arguments)])


@pytest.fixture(scope="module")
def distilled(folders, tmp_path_factory):
    """A run of the command: its folder, its arguments and what it printed."""
    place = tmp_path_factory.mktemp("command")
    text, path, out = place / "a.jsonl", place / "result.json", place / "run"
    lines = [{"p": f"w{i} the", "text": f" sky is w{i + 1}", "kind": ["odd", "even"][i % 2]} for i in range(20, 60)]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--text", text, "--prompt-field", "p", "--group-field", "kind", "--steps", 3, "--held-out", 0.3]
    arguments += ["--method", "dedier+alpha=1+fraction=0.5", "--readout", "lens", "--layer", 2, "--weigh-every", 1]
    arguments += ["--out", out, "--json", path]
    return out, arguments, run(folders, *arguments)


def test_the_command(folders, distilled):
    out, arguments, first = distilled
    for made in (first, run(folders, *arguments)):  # the second time there is nothing left to do
        assert made.exit_code == 0, made.output
        assert "40 documents" in made.stderr
        assert "odd" in made.stdout
    result = json.loads(arguments[-1].read_text())
    assert [group["name"] for group in result["groups"]] == ["even", "odd"]
    assert (result["steps"], result["overall"]["tokens"]) == (3, 12 * 4)
    assert result["groups"][0]["weight"] > 1
    record = json.loads((out / "config.json").read_text())["config"]
    assert (record["fraction"], record["training"]["temperature"], record["weights"]["rule"]["alpha"]) == (0.5, 3, 1)
    assert offramp.load(out / "model").num_layers == 4


def test_the_command_on_own_answers(folders, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("".join(f"w{i} the sky\n" for i in range(20, 30)))
    options = ["--prompts", prompts, "--max-new-tokens", 4, "--answer-every", 2, "--steps", 3, "--method", "laplace"]
    made = run(folders, *options, "--out", tmp_path / "run")
    assert made.exit_code == 0, made.output
    record = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (record["fraction"], record["weights"]["target"]) == (1.0, "teacher")
    assert {path.name for path in (tmp_path / "run").glob("answers-*")} == {
        "answers-000000.jsonl", "answers-000002.jsonl", "answers-held-out.jsonl",
    }  # fmt: skip
    said, _ = reported(tmp_path / "run", tmp_path)
    assert "tokens of the student&#39;s own answers from before training" in said
    assert "reporting none." in said  # no groups


# ---------------------------------------------------------------- what is shown


def reported(folder, tmp_path):
    """The report's source, and the cells of its tables by title and first cell."""
    pytest.importorskip("matplotlib")
    made = CliRunner().invoke(cli.app, ["report", str(folder), "--out", str(tmp_path / "a.html")])
    assert made.exit_code == 0, made.output + str(made.exception)
    source, found = (tmp_path / "a.html").read_text(), {}
    for section in re.findall("<section.*?</section>", source, re.DOTALL):
        lines = re.findall("<tr.*?</tr>", section, re.DOTALL)
        cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in lines]
        found[re.search("<h3.*?>(.*?)</h3>", section)[1]] = {name: rest for name, *rest in cells}
    return source, found


def test_a_run_has_a_page(distilled, tmp_path):
    folder = distilled[0]
    source, found = reported(folder, tmp_path)
    titles = ["Every group", "Training curves", "Weights after each readout", "Where group labels were used"]
    assert list(found) == [*titles, "How to repeat it"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = [row for row in metrics if row["kind"] == "validation"]
    for place, group in enumerate(("even", "odd")):
        cells = found["Every group"][group]
        assert cells[0] == str(last["group_tokens"][place])
        for cell, name in zip(cells[1:5], ("kd", "ce", "agreement", "accuracy"), strict=True):
            assert cell == " -&gt; ".join(f"{row[f'group_{name}'][place]:.3f}" for row in (first, last))
    low = last["group_agreement"].index(min(last["group_agreement"]))
    assert [found["Every group"][group][-1] for group in ("even", "odd")] == [["worst", ""], ["", "worst"]][low]
    weighted = [row for row in metrics if row["kind"] == "weights"]
    assert len(weighted) == 2
    for row in weighted:
        cells = found["Weights after each readout"][str(row["step"])]
        assert cells[:5] == [
            f"{row['reweighted']:.1%}",
            *(f"{w:.2f}" for w in (row["mean"], row["largest"], *row["weight"])),
        ]
    assert source.count("data:image/svg+xml") == 3
    assert "teacher training unknown; student training none; weights none; selection none" in source
    assert "reporting train 112 and test 48." in source  # 28 and 12 texts of four tokens
    assert found["Every group"]["readout"] == ["lens after layer 2, should say the text&#39;s token, every 1 steps"]
    assert "Not finished" not in source


def test_an_unfinished_run_says_so(distilled, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(distilled[0], folder)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])  # judged, one step, and half a line
    source, found = reported(folder, tmp_path)
    assert "Not finished: 1 of 3 steps" in source
    assert "Weights after each readout" not in found
    old = [json.loads(line) for line in lines]
    for row in old:
        if row["kind"] == "weights":  # as an older version wrote them
            del row["group_tokens"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    assert "reporting unknown." in reported(folder, tmp_path)[0]
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="has measured nothing yet"):
        pages_of(folder, examples=0, seed=0)


def test_weights_that_touch_too_little_are_warned_of():
    row = {"kind": "weights", "step": 2, "reweighted": 0.001, "mean": 1.0, "largest": 2.0, "weight": [1.0, 1.0]}
    table = readouts_table([row], GROUPS)
    assert table.rows[0][-1] == "too few"
    assert "hardly an error left" in str(table)
    alike = readouts_table([{**row, "reweighted": None}], GROUPS)  # the control that weighs all the same
    assert alike.rows == [["2", "–", "1.00", "2.00", "1.00", "1.00"]]
    assert alike.notes == ()


def test_all_weights_alike_on_purpose_are_no_share(tmp_path):
    rule = token_weights(rule={"control": "mean-matched"}, start=0, every=8)
    result = distil(model(), teacher(), data(), config(rule, steps=1), tmp_path, groups=GROUPS)
    assert result.reweighted is None
    assert "hardly an error" not in result.table()
    assert result.overall.weight is not None


def test_what_is_longer_than_the_window_is_counted(folders, tmp_path):
    """Of texts behind prompts and of own answers alike."""
    lines = [{"p": f"w{i} the sky", "text": " is blue" * (9 if i < 23 else 1)} for i in range(20, 30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "p.txt").write_text("".join(f"w{i} the sky {'is blue ' * (i < 23) * 9}\n" for i in range(20, 30)))
    common = ["--window", 12, "--steps", 1, "--json", tmp_path / "result.json"]
    for name, options in (
        ("text", ["--text", tmp_path / "a.jsonl", "--prompt-field", "p"]),
        ("own", ["--prompts", tmp_path / "p.txt", "--max-new-tokens", 4]),
    ):
        made = run(folders, *options, *common, "--out", tmp_path / name)
        assert made.exit_code == 0, made.output
        assert "3 documents were cut to the window" in made.stdout
        assert json.loads((tmp_path / "result.json").read_text())["shortened"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --text, or --prompts"),
        (["--text", "a", "--prompts", "b"], "one of them is needed"),
        (["--text", "a", "--steps", 1, "--tokens", 2], "one of --steps and --tokens"),
    ],
)
def test_options_that_do_not_go_together(folders, arguments, message):
    made = run(folders, *arguments)
    assert made.exit_code == 2
    assert message in made.stderr


def test_at_least_one_text_or_prompt_is_taken(folders, tmp_path):
    (tmp_path / "a.txt").write_text("the sky is blue .\nwhy ?\n")
    for option in ("--text", "--prompts"):
        made = run(folders, option, tmp_path / "a.txt", "--count", -5, "--out", tmp_path / "run")
        assert made.exit_code != 0
        assert "the first -5 are asked for; take at least one" in str(made.exception)


def test_methods_of_classifiers_are_refused(folders, tmp_path):
    (tmp_path / "a.txt").write_text("the sky is blue . " * 20)
    made = run(folders, "--text", tmp_path / "a.txt", "--method", "simkd", "--out", tmp_path / "run")
    assert made.exit_code == 2
    assert "--method simkd is for classifiers" in made.stderr

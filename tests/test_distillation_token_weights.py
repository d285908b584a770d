"""Weights of tokens against loops over tokens."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from offramp.distillation.language_models import distil
from offramp.distillation.token_weights import new_token_weights
from offramp.training.data import Windows, batch
from tiny import VOCABULARY
from token_distillation import GROUPS, ONE, config, data, same, teacher, texts, token_weights
from training_runs import model

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

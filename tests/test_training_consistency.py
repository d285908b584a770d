"""Classifiers trained by `train`, on a model built such that one coordinate of a state tells where exits agree."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file

import offramp
from offramp import ExitPolicy, Exits, LanguageModel
from offramp.hub.exit_files import load_exits
from offramp.training.consistency import ClassGradients, balanced, classifier_loss_sums
from offramp.training.data import Data, Windows
from offramp.training.trainer import train
from tiny import LAYERS, VOCABULARY, tiny, tokenizer
from training_runs import config, windows

EDGE = 50
LAYER = 2
CLASSIFIERS = {"layers": None, "steps": 60, "batch_size": 8, "learning_rate": 3e-2}


def divided(name):
    """Blocks that do nothing, but for the last one's MLP, which speaks up after tokens from `EDGE` on.

    These have a large first coordinate, the others have its negative.
    """
    model = copy.deepcopy(tiny(name))
    torch.manual_seed(0)
    blocks = model.decoder.block if name == "t5" else model.model.layers
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        for block in blocks:
            for key, weight in block.named_parameters():
                if key.endswith(("o_proj.weight", "down_proj.weight", ".o.weight", "wo.weight")):
                    weight.zero_()
        embeddings[:, 0] = torch.where(torch.arange(VOCABULARY) < EDGE, -2.0, 2.0)
        last = blocks[-1].layer[-1].DenseReluDense if name == "t5" else blocks[-1].mlp
        for linear in [last.wi] if name == "t5" else [last.gate_proj, last.up_proj]:
            linear.weight.zero_()
            linear.weight[:, 0] = 9 + torch.rand(len(linear.weight))
        (last.wo if name == "t5" else last.down_proj).weight.normal_()
    return LanguageModel(model, tokenizer(), name="tiny")


@pytest.fixture(scope="module", params=["llama", "t5"])
def trained(request, tmp_path_factory):
    """Folder, model as it was, data, and the results of training lenses, then classifiers on them."""
    folder, lm = tmp_path_factory.mktemp("consistency"), divided(request.param)
    before = copy.deepcopy(lm.model.state_dict())
    options = {"sources": request.param == "t5"}
    data = Data(windows(100, **options), windows(50, seed=1, **options))
    lenses = train(lm, data, config(steps=2, layers=(1, LAYER), learning_rate=1e-3), folder / "lenses")
    lm.attach_exits(load_exits(lenses.exits))
    result = train(lm, data, config(objective="consistency", **CLASSIFIERS), folder / "classifiers")
    lm.model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return folder, lm, before, data, lenses, result


def test_nothing_else_changes(trained):
    _, lm, before, _, lenses, result = trained
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    first, second = (load_file(part.exits / "exits.safetensors") for part in (lenses, result))
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert set(second) - set(first) == {f"classifiers.{n}.{part}" for n in (1, LAYER) for part in ("weight", "bias")}
    assert result.model is None
    assert load_exits(result.exits).fingerprint == load_exits(lenses.exits).fingerprint
    assert lm.exits.classifiers is None  # a copy was trained


def test_how_the_lenses_were_trained_is_kept(trained, tmp_path):
    """Also where classifiers are trained once more, in place of those there are."""
    _, lm, _, data, lenses, result = trained
    wanted, settings = load_exits(lenses.exits).settings, load_exits(result.exits).settings
    assert settings["lenses"] == wanted
    assert (wanted["config"]["objective"], settings["config"]["objective"]) == ("forward-kl", "consistency")
    lm.attach_exits(load_exits(result.exits))
    again = train(lm, data, config(objective="consistency-settled", **{**CLASSIFIERS, "steps": 1}), tmp_path)
    lm.attach_exits(load_exits(lenses.exits))
    settings = load_exits(again.exits).settings
    assert (settings["lenses"], settings["config"]["objective"]) == (wanted, "consistency-settled")


def test_verdicts_on_held_out_text_beat_the_majority(trained):
    _, lm, _, data, _, result = trained
    part, exits = data.held_out, load_exits(result.exits)
    where, memory = part.counted[:, 1:], {}
    if part.sources is not None:
        memory = {"memory": lm.split.encode(part.sources, part.present), "memory_mask": part.present}
    states = lm.split.states(part.ids[:, :-1], [1, LAYER, LAYERS], **memory)
    lm.attach_exits(exits)
    last = lm.split.readout(states[-1])[where].argmax(-1)
    for index, layer in enumerate((1, LAYER)):
        agrees = lm.split.readout(states[index], layer)[where].argmax(-1) == last
        share = float(agrees.float().mean())
        assert 0.3 < share < 0.7
        confidence = exits.classify(layer, lm.split.readout_input(states[index], layer)[where]).sigmoid()
        accuracy = float(((confidence > 0.5) == agrees).float().mean())
        assert accuracy > 0.9 > max(share, 1 - share)
        assert result.agreement_after[index] == pytest.approx(accuracy)
        assert result.agreement_before[index] == pytest.approx(1 - share)  # untrained, a verdict is no
    assert result.what == "accuracy"
    assert "accuracy" in result.table()
    lm.attach_exits(load_exits(trained[4].exits))


def test_policies_decide_by_saved_classifiers(trained):
    """Tokens leave where the model would say the same."""
    folder, plain, _, _, _, result = trained
    lm = offramp.load(folder / "model", exits=result.exits)
    prompts = torch.randint(3, VOCABULARY, (40, 5), generator=torch.manual_seed(2))
    out = lm.generate(prompts, policy=ExitPolicy("classifier", threshold=0.5), max_new_tokens=3)
    start = [lm.model.config.decoder_start_token_id] if lm.split.is_encoder_decoder else []
    pairs = []
    for tokens, layers in zip(out.tokens, out.exit_layers, strict=True):
        pairs += zip([*start, *tokens], layers[0 if start else 1 :], strict=False)  # a token, where the next one left
    assert pairs
    right = [layer == (1 if before < EDGE else LAYERS) for before, layer in pairs]
    assert sum(right) > 0.9 * len(right)
    assert {layer for _, layer in pairs} >= {1}
    with pytest.raises(ValueError, match="the model's exits have no classifiers"):
        plain.generate(prompts, policy=ExitPolicy("classifier"), max_new_tokens=3)


@pytest.mark.parametrize("kind", ["agree", "settled"])
def test_the_gradient_is_that_of_the_balanced_losses(kind):
    """Against a loop over positions, with probabilities."""
    lm, layers, torch_seed = LanguageModel(copy.deepcopy(tiny("llama"))), (1, 2, 3), 4
    torch.manual_seed(torch_seed)
    exits = Exits.fresh(lm.split, layers).with_classifiers()
    for parameter in exits.parameters():
        parameter.data.normal_(0, 0.2)
    states, labels = torch.randn(4, 15, 32), torch.randint(VOCABULARY, (15,))
    weights = [0.2, 0.3, 0.5]
    for parameter in exits.lenses.parameters():
        parameter.requires_grad_(False)
    own = ClassGradients(exits, weights)
    parts = [
        classifier_loss_sums(lm.split, exits, list(states[:, part]), labels[part], rows=4, kind=kind, gradients=own)
        for part in torch.split(torch.arange(15), 6)  # the shares are those of all 15, whatever each part's are
    ]
    result, shares = balanced(parts[0] + parts[1] + parts[2])
    own.settle(shares, 30)
    gradients = [p.grad.clone() for p in exits.classifiers.parameters()]
    exits.zero_grad()
    total, choices = 0, []
    for index, layer in enumerate((*layers, LAYERS)):
        adapted = exits.adapt(layer, states[index]) if layer < LAYERS else states[index]
        x = lm.model.model.norm(adapted).detach()
        choices.append(lm.model.lm_head(x).argmax(-1).tolist())
        states[index] = x
    for index, layer in enumerate(layers):
        later = choices[-1:] if kind == "agree" else choices[index + 1 :]
        agrees = [all(other[n] == choices[index][n] for other in later) for n in range(15)]
        share, linear, losses = sum(agrees) / 15, exits.classifiers[str(layer)], []
        for n, agree in enumerate(agrees):
            p = 1 / (1 + torch.exp(-(linear.weight[0] @ states[index][n] + linear.bias[0])))
            losses.append(-(1 - share) * p.log() if agree else -share * (1 - p).log())
        total = total + weights[index] * torch.stack(losses).sum() / 30
        assert float(shares[index]) == pytest.approx(share)
        assert float(result.losses[index]) == pytest.approx(float(torch.stack(losses).sum().detach()), rel=1e-4)
    total.backward()
    for got, parameter in zip(gradients, exits.classifiers.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-6)
    assert math.isfinite(result.last_loss)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_do_not_matter(micro_batch, tmp_path):
    """Windows of one class only: by themselves they would teach nothing, or count for something else."""
    lm = divided("llama")
    ids = torch.randint(3, EDGE, (24, 12), generator=torch.manual_seed(3))
    ids[::2] += EDGE - 3  # every position of every other window is one at which the last layer speaks up
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, 0] = False
    data = Data(Windows(ids, counted), windows(6, seed=1))
    options = {**CLASSIFIERS, "objective": "consistency", "layers": (1, 3), "steps": 4, "batch_size": 6}
    results = {
        size: train(lm, data, config(**options, micro_batch=size), tmp_path / f"{size}") for size in (None, micro_batch)
    }
    got, expected = (load_file(results[size].exits / "exits.safetensors") for size in (micro_batch, None))
    assert any(value.abs().max() > 0.01 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    assert results[micro_batch].loss_after == pytest.approx(results[None].loss_after, rel=1e-5)
    assert results[micro_batch].agreement_after == results[None].agreement_after


def test_without_exits_classifiers_are_trained_on_the_model_alone(tmp_path):
    lm = divided("llama")
    data = Data(windows(20), windows(10, seed=1))
    result = train(lm, data, config(objective="consistency-settled", **{**CLASSIFIERS, "layers": (1, 3)}), tmp_path)
    exits = load_exits(result.exits)
    assert (exits.rank, exits.layers) == (0, (1, 3))
    assert "lenses" not in exits.settings  # there are none
    assert min(result.agreement_after) > 0.9


def test_classifiers_do_not_go_on_behind_other_lenses(tmp_path):
    lm, data = divided("llama"), Data(windows(8), windows(4, seed=1))
    lm.attach_exits(Exits.fresh(lm.split, (1, 3)))
    options = {**CLASSIFIERS, "steps": 2, "objective": "consistency"}
    first = train(lm, data, config(**options), tmp_path)
    assert train(lm, data, config(**options), tmp_path) == first
    other = Exits.fresh(lm.split, (1, 3))
    other.lenses["1"].up.bias.data += 1
    lm.attach_exits(other)
    with pytest.raises(ValueError, match=r"holds another run: model\.lenses was"):
        train(lm, data, config(**options), tmp_path)
    with pytest.raises(ValueError, match=r"layers are \(2,\), but the attached exits are after \(1, 3\)"):
        train(lm, data, config(**{**options, "layers": (2,)}), tmp_path / "other")

"""What is built on top of families, once for each kind of architecture: probe, trained exits, adapters."""

import pytest
import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

import offramp
from offramp import ExitPolicy
from offramp.lm.probe import probe, read_layers
from offramp.training.trainer import train
from tiny import LAYERS, inputs_for, tiny
from training_runs import config, data, model

KINDS = ("gpt2", "gpt-neox", "phi", "opt-350m", "cohere", "granite", "gemma2", "qwen2-moe", "gpt-oss")
"""Transposed, fused or biased matrices, parallel blocks, a squeezed head without norm, scaled or capped logits, MoE."""


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


@torch.no_grad()
def test_probe_sees_what_the_model_says(name):
    lm = model(name)
    ids = inputs_for(name, 2)["input_ids"]
    states = lm.split.states(ids, range(1, LAYERS + 1))
    readings = read_layers(lm.split, torch.stack([state.flatten(0, 1) for state in states]))
    logits = lm.model(ids).logits.flatten(0, 1)
    assert bool((readings.rank[-1] == 0).all())
    torch.testing.assert_close(readings.peak[-1], logits.softmax(-1).amax(-1), atol=1e-5, rtol=1e-4)
    found = probe(lm, ids, max_new_tokens=4)
    assert [layer.layer for layer in found.layers] == [1, 2, 3, 4]
    assert found.layers[-1].agreement == 1


def test_exits_are_trained_kept_and_used(name, tmp_path):
    lm = model(name)
    result = train(lm, data(), config(steps=6, rank=4), tmp_path)
    assert all(later < earlier for later, earlier in zip(result.loss_after, result.loss_before, strict=True))
    lm.model.save_pretrained(tmp_path / "model")
    loaded = offramp.load(tmp_path / "model", exits=result.exits)
    hidden = torch.randn(3, loaded.split.shape.width, generator=torch.manual_seed(0))
    lens = loaded.exits.lenses["1"]
    with torch.no_grad():
        assert torch.equal(loaded.split.readout(hidden, 1), loaded.split.readout(lens(hidden)))
    policy = ExitPolicy(threshold=0.1, vocabulary="fixed", vocabulary_size=20)
    assert loaded.generate(inputs_for(name, 2), policy=policy, max_new_tokens=4).exit_layers


def test_adapters_are_on_all_linear_layers_of_the_blocks(name, tmp_path):
    lm = model(name)
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    inside = {id(m) for block in lm.split.blocks for m in block.modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    names = {key for key, m in lm.model.named_modules() if id(m) in inside}
    result = train(lm, data(), config(steps=3, trainable="lora", objective="labels"), tmp_path)
    learnt = {key.removeprefix("weights.model.") for key in load_file(tmp_path / "checkpoint.safetensors")}
    for key in names:
        assert {f"{key}.lora_A.default.weight", f"{key}.lora_B.default.weight"} <= learnt
    changed = {
        key.removesuffix(".weight") for key, value in lm.model.state_dict().items() if not value.equal(before[key])
    }
    assert changed == names
    loaded = offramp.load(result.model, exits=result.exits)
    assert all(value.equal(lm.model.state_dict()[key]) for key, value in loaded.model.state_dict().items())
    ids = inputs_for(name, 2)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, lm.model(ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(lm.model(ids).logits, tiny(name).eval()(ids).logits)

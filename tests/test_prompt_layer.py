"""Prompts that stop early except for their last position: against hooks on the untouched model, counters and sums."""

import dataclasses
import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from offramp import ExitPolicy, LanguageModel, cli
from offramp.core.decoding import decode
from scripted import ScriptedModel
from test_brute_force import batch_of, compare, layers_of, reference, thresholds
from tiny import DECODER_ONLY, ENCODER_DECODER, LAYERS, eager, greedy, inputs_for, shortened, tiny, tokenizer
from tiny import KINDS as ALL_KINDS

NO_END = 96
KINDS = [name for name in ALL_KINDS if name in DECODER_ONLY]


def costs(name, policy, batch=1, length=9, **options):
    model = eager(name)
    with FlopCounterMode(display=False) as counter:
        out = LanguageModel(model, engine="torch").generate(
            inputs_for(name, batch, padded=batch > 1, length=length), policy=policy, **options
        )
    return out.costs, counter.get_total_flops()


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("skipped", ["propagate", "defer"])
@pytest.mark.parametrize("name", KINDS)
def test_prompts_of_every_depth(name, skipped):
    layers = set()
    for depth in range(1, LAYERS) if skipped == "propagate" else (2,):
        policy = ExitPolicy(threshold=thresholds(name)[0], min_layer=1, skipped=skipped, prompt_layer=depth)
        rows, _ = compare(tiny(name), batch_of(name), policy, new=6, eos_token_id=NO_END)
        layers |= layers_of(rows)
    assert len(layers) >= 2


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_without_any_exit(name):
    full = greedy(tiny(name), batch_of(name), 10, eos_token_id=NO_END)[:, -10:].tolist()
    changed = False
    for depth in range(1, LAYERS):
        policy = ExitPolicy(threshold=None, prompt_layer=depth)
        rows, _ = compare(tiny(name), batch_of(name), dataclasses.replace(policy, threshold=1.0), eos_token_id=NO_END)
        out = LanguageModel(tiny(name)).generate(batch_of(name), policy=policy, max_new_tokens=10, eos_token_id=NO_END)
        assert out.tokens == [row.tokens for row in rows]
        assert {layer for row in out.exit_layers for layer in row} == {LAYERS}
        changed |= out.tokens != full
    assert changed  # else the tests above would show nothing


@pytest.mark.parametrize("name", KINDS)
def test_a_static_exit_is_the_truncated_model_with_the_same_prompt(name):
    for layer, depth in ((2, 1), (3, 1), (3, 2), (3, 3)):
        policy = ExitPolicy("static", min_layer=layer, prompt_layer=depth)
        short = ExitPolicy(threshold=None, prompt_layer=None if depth == layer else depth)
        out, other = (
            LanguageModel(model).generate(batch_of(name), policy=own, max_new_tokens=8, eos_token_id=NO_END)
            for model, own in ((tiny(name), policy), (shortened(name, layer), short))
        )
        assert out.tokens == other.tokens
        assert out.costs.flops == other.costs.flops
        assert {exit for row in out.exit_layers for exit in row} == {layer}


@pytest.mark.parametrize("skipped", ["propagate", "defer"])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_long_prompts_and_outputs_behind_a_sliding_window(name, skipped):
    policy = ExitPolicy(threshold=thresholds(name)[1], min_layer=1, skipped=skipped, prompt_layer=2)
    for length, new in ((17, 8), (3, 16)):
        compare(tiny(name), batch_of(name, length=length), policy, new=new, eos_token_id=NO_END)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("length", [1, 2])
def test_short_prompts(length, depth):
    policy = ExitPolicy(threshold=0.1, min_layer=1, prompt_layer=depth)
    compare(tiny("llama"), inputs_for("llama", 2, length=length), policy, eos_token_id=NO_END)


@pytest.mark.parametrize("options", [{}, {"skipped": "defer"}, {"threshold": None}, {"vocabulary": "fixed"}])
def test_the_whole_depth_is_no_prompt_layer(options):
    lm, inputs = LanguageModel(tiny("llama")), inputs_for("llama", 3, padded=True)
    policy = ExitPolicy(**{"threshold": 0.1, "min_layer": 1, **options})
    a, b = (
        lm.generate(inputs, policy=dataclasses.replace(policy, prompt_layer=depth), max_new_tokens=8)
        for depth in (None, LAYERS)
    )
    assert a.sequences.tolist() == b.sequences.tolist()
    assert a.exit_layers == b.exit_layers
    for name, part in a.costs.parts.items():
        other = b.costs.parts[name]
        assert (part.flops, part.bytes) == (other.flops, other.bytes)


def test_a_shortened_prompt_changes_the_reference():
    policies = [ExitPolicy(threshold=0.1, min_layer=1, prompt_layer=depth) for depth in (None, 1, 2)]
    a, b, c = ([row.tokens for row in reference(tiny("llama"), batch_of("llama"), p)[0]] for p in policies)
    assert a != b != c != a


def test_only_the_last_position_goes_deep():
    model = ScriptedModel(torch.zeros(2, 4, 5))
    policy = ExitPolicy(threshold=None, prompt_layer=3)
    list(decode(model, torch.ones(2, 6, dtype=torch.long), policy, max_new_tokens=1))
    whole = list(range(-5, 1))
    assert [(layer, positions) for layer, _, positions in model.calls] == [(1, whole), (2, whole), (3, whole), (4, [0])]
    assert model.filled == [(4, whole[:-1] * 2)]


def test_an_adaptive_policy_may_shorten_its_prompts():
    policy = ExitPolicy(threshold=0.1, min_layer=2, skipped="defer", adaptive=True, prompt_layer=2)
    fixed = dataclasses.replace(policy, adaptive=False, exit_layers=(2,))
    lm, inputs = LanguageModel(tiny("llama")), batch_of("llama")
    a, b = (lm.generate(inputs, policy=p, max_new_tokens=10, eos_token_id=NO_END) for p in (policy, fixed))
    assert a.tokens == b.tokens


# ---------------------------------------------------------------- costs


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_flops_equal_the_counters(name, batch):
    for depth in (1, 3):
        spent, counted = costs(
            name, ExitPolicy(threshold=0.15, min_layer=1, prompt_layer=depth), batch, max_new_tokens=4
        )
        assert spent.flops == pytest.approx(counted, rel=0.005)  # the rotation's angles, which the ledger leaves out


def test_the_bill_of_a_prompt():
    """T positions in p blocks, keys and values of T - 1 in the others, and one position in those."""
    shape, prompt, depth = LanguageModel(tiny("llama")).split.shape, 40, 1
    spent, _ = costs("llama", ExitPolicy(threshold=None, prompt_layer=depth), length=prompt, max_new_tokens=1)
    deeper = LAYERS - depth
    assert spent.parts["fill"].flops == deeper * (prompt - 1) * 2 * shape.blocks[0].kv_weights
    assert spent.parts["fill"].bytes == deeper * shape.blocks[0].kv_weights * shape.element_size
    blocks = depth * shape.block_flops(0, prompt, 0) + deeper * shape.block_flops(0, 1, prompt - 1)
    assert spent.parts["blocks"].flops == blocks
    assert spent.executed_layers == 0  # generated tokens only
    assert spent.flops < 0.6 * shape.generation_flops(prompt, 1)
    assert spent.parts["fill"].seconds > 0


# ---------------------------------------------------------------- where it is asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skipped": "verify"}, "skipped='verify' gives the full model's text.*leave prompt_layer away"),
        ({"confidence": "static", "min_layer": 1}, "prompt_layer is 2; a static policy leaves after min_layer, 1"),
        ({"prompt_layer": 1.5}, "prompt_layer is 1.5; it must be a whole number"),
        ({"prompt_layer": True}, "prompt_layer is True; it must be a whole number"),
    ],
)
def test_bad_policies_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExitPolicy(**{"prompt_layer": 2, **options})


@pytest.mark.parametrize("depth", [0, -1, LAYERS + 1])
def test_layers_the_model_does_not_have(depth):
    with pytest.raises(ValueError, match=rf"prompt_layer is {depth}; the model's layers are 1\.\.{LAYERS}"):
        LanguageModel(tiny("llama")).generate(inputs_for("llama"), policy=ExitPolicy(prompt_layer=depth))


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_encoder_decoders_have_no_such_prompt(name):
    with pytest.raises(ValueError, match="prompt_layer is 2, but the decoder of an encoder-decoder has no prompt"):
        LanguageModel(tiny(name)).generate(inputs_for(name), policy=ExitPolicy(prompt_layer=2), max_new_tokens=3)


def test_it_survives_a_file(tmp_path):
    policy = ExitPolicy(threshold=-math.inf, prompt_layer=3)
    policy.save(tmp_path / "policy.json")
    assert ExitPolicy.load(tmp_path / "policy.json") == policy


def test_the_command_has_an_option(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["generate", tmp_path / "model", "why is the sky", "--no-chat", "--max-new-tokens", 5]
    arguments += ["--prompt-layer", 1, "--threshold", 1, "--json", tmp_path / "o"]
    run = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert run.exit_code == 0, run.output
    result = json.loads((tmp_path / "o").read_text())
    assert result["policy"]["prompt_layer"] == 1
    policy = ExitPolicy(threshold=1.0, prompt_layer=1)
    ids = torch.tensor([[10, 8, 6, 7]])
    expected = LanguageModel(tiny("llama")).generate(ids, policy=policy, max_new_tokens=5)
    assert [token["id"] for token in result["generations"][0]["tokens"]] == expected.tokens[0]

"""Models that change after the kernels were told of them: what comes next is right, or refused with the reason."""

import copy
import os
import signal
import threading

import pytest
import torch
from torch import nn

from few_bits import model_in
from offramp import LanguageModel
from offramp.native import weights
from offramp.native.kernels import NativeError
from offramp.native.model import NativeModel
from tiny import greedy, inputs_for, tiny

NEW = 12
INPUTS = inputs_for("llama", 2)


def native(model, **options):
    return LanguageModel(model, engine="native", **options)


def tokens(lm):
    return lm.generate(INPUTS, max_new_tokens=NEW).tokens


def layer(model):
    return model.model.layers[1]


@torch.no_grad()
def in_place(model):
    layer(model).mlp.down_proj.weight.mul_(-1)


def through_data(model):
    layer(model).mlp.down_proj.weight.data *= -1


def norm_through_data(model):
    layer(model).post_attention_layernorm.weight.data *= -1


def another_parameter(model):
    layer(model).mlp.down_proj.weight = nn.Parameter(-layer(model).mlp.down_proj.weight)


def another_place(model):
    model.model.norm.weight.data = model.model.norm.weight.data * torch.linspace(-1, 1, 32)


def another_module(model):
    layer(model).mlp.down_proj = nn.Linear(48, 32, bias=False)


def another_block(model):
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[2].mlp)


def loaded(model):
    model.load_state_dict({name: value.roll(1, 0) for name, value in model.state_dict().items()})


def another_head(model):
    model.set_output_embeddings(nn.Linear(32, model.config.vocab_size, bias=False))


CHANGES = [
    in_place, through_data, norm_through_data, another_parameter, another_place, another_module, another_block, loaded,
    another_head, lambda model: model.to(torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("form", [None, "int8", "int4"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_generates_anew(change, form):
    model = model_in(form, copy.deepcopy(tiny("llama")))
    lm = native(model, rounded=form)
    before = tokens(lm)
    assert lm.decoder is lm.decoder
    torch.manual_seed(0)
    change(model)
    assert tokens(lm) == tokens(native(copy.deepcopy(model), rounded=form)) != before
    if form is None and model.dtype == torch.float32:
        assert lm.generate(INPUTS, max_new_tokens=NEW).sequences.tolist() == greedy(model, INPUTS, NEW).tolist()


@pytest.mark.parametrize(
    ("name", "path"),
    [("gpt2", "transformer.h.1.mlp.c_proj"), ("gpt-neox", "gpt_neox.layers.1.attention.query_key_value")],
)
def test_what_was_copied_and_changed_is_copied_anew(name, path):
    """GPT-2's matrices lie transposed, and GPT-NeoX's queries, keys and values mixed."""
    model = copy.deepcopy(tiny(name))
    lm = native(model)
    before = tokens(lm)
    model.get_submodule(path).weight.data *= -1
    assert tokens(lm) != before
    assert lm.generate(INPUTS, max_new_tokens=NEW).sequences.tolist() == greedy(model, INPUTS, NEW).tolist()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft itself
def test_adapters_are_refused_until_they_are_merged():
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(tiny("llama"))
    lm = native(model, rounded="int8")  # which copies, so that nothing is right by itself
    before = tokens(lm)
    config = peft.LoraConfig(target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(NativeError, match="a Linear of peft is more than its weight; merge adapters"):
        tokens(lm)
    adapted.merge_and_unload()
    assert tokens(lm) == tokens(native(copy.deepcopy(model), rounded="int8")) != before


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_merged_between_two_generations():
    """Merging writes through `.data` and leaves the modules there were: only values tell."""
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(tiny("llama"))
    lm = native(model, rounded="int8")
    before = tokens(lm)
    config = peft.LoraConfig(target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).merge_and_unload()
    assert tokens(lm) == tokens(native(copy.deepcopy(model), rounded="int8")) != before


def hook(model):
    layer(model).mlp.register_forward_hook(lambda module, inputs, output: -output)


def pre_hook(model):
    model.model.norm.register_forward_pre_hook(lambda module, inputs: None)


def own_forward(model):
    layer(model).self_attn.forward = layer(model).self_attn.forward


@pytest.mark.parametrize(("change", "where"), [(hook, "layers.1.mlp"), (pre_hook, "norm"), (own_forward, "self_attn")])
def test_hooks_would_not_be_called(change, where):
    model = copy.deepcopy(tiny("llama"))
    lm = native(model)
    change(model)
    with pytest.raises(NativeError, match=f"{where} has a hook or a forward of its own"):
        tokens(lm)


def test_hooks_of_transformers_itself_do_no_harm():
    model = copy.deepcopy(tiny("llama"))
    lm = native(model)
    before, decoder = tokens(lm), lm.decoder
    model(INPUTS["input_ids"], output_hidden_states=True)
    assert tokens(lm) == before
    assert lm.decoder is decoder


def test_attention_of_somebodys_own():
    model = copy.deepcopy(tiny("llama"))
    model.config._attn_implementation = "mine"
    with pytest.raises(NativeError, match="its attention is 'mine'"):
        NativeModel(model)


def test_norms_that_are_not_known():
    class Other(nn.Module):
        weight = torch.ones(32)

    model = copy.deepcopy(tiny("llama"))
    model.model.norm = Other()
    with pytest.raises(NativeError, match="a Other is no norm that the kernels know"):
        NativeModel(model)


def test_a_model_too_large_to_be_copied(monkeypatch):
    monkeypatch.setattr(weights, "quantised", lambda weight: torch.empty(1 << 60))  # what torch says of it
    with pytest.raises(MemoryError, match="eight-bit copies of its matrices.* memory beside the model"):
        native(tiny("llama"), rounded="int8")


def test_an_interrupted_generation_can_be_repeated():
    lm = native(tiny("llama"))
    before = tokens(lm)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs tests in processes ignores it
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            [tokens(lm) for _ in range(10_000)]
    finally:
        signal.signal(signal.SIGINT, handler)
    assert tokens(lm) == before


def test_a_cap_of_scores_that_the_models_own_attention_leaves_out():
    """Before transformers 5.24, this is how Gemma 2 is loaded."""
    model = copy.deepcopy(tiny("gemma2"))
    model.config._attn_implementation = "eager"
    assert NativeModel(model).fused
    model.config._attn_implementation = "sdpa"
    with pytest.raises(NativeError, match="leaves out its scores' cap; load it with 'eager'"):
        NativeModel(model)

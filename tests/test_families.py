"""The contract that every family keeps, against `transformers` on tiny random models."""

import copy
from functools import cache, partial

import pytest
import torch
from transformers import LlamaConfig, LlamaModel
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

import offramp
from offramp import ExitPolicy, SplitModel, UnsupportedModelError
from offramp.core.costs import Ledger
from offramp.core.skipped_kv import Defer, Propagate
from offramp.families import FAMILIES as SUPPORTED
from offramp.families import run_block
from offramp.families.network import cache_name
from offramp.families.state import Skipped
from tiny import (
    DECODER_ONLY,
    ENCODER_DECODER,
    FAMILIES,
    LAYERS,
    VOCABULARY,
    batch_cases,
    greedy,
    inputs_for,
    shortened,
    tiny,
)

LanguageModel = partial(offramp.LanguageModel, engine="torch")  # the kernels: test_native_model.py
NEW = 12
NO_END = 96
NEVER = {
    "no tests": ExitPolicy(threshold=None),
    "propagate": ExitPolicy(threshold=1.0, min_layer=1),
    "defer": ExitPolicy(threshold=1.0, min_layer=1, skipped="defer"),
    "verify": ExitPolicy(threshold=1.0, min_layer=1, skipped="verify"),
    "pruned": ExitPolicy(threshold=1.0, min_layer=1, vocabulary="adaptive", vocabulary_size=9),
}


def assert_close(got, wanted):
    """Alike but for float32's rounding, which grows with the values: nemotron's logits are three times the others'."""
    torch.testing.assert_close(got, wanted, atol=6e-6 * wanted.abs().max().item(), rtol=1e-5)


@cache
def expected(name, batch=1, padded=False, layers=LAYERS):
    """What `transformers` generates greedily with the model, or with its first layers, from `inputs_for` a batch."""
    return greedy(shortened(name, layers), inputs_for(name, batch, padded=padded), NEW).tolist()


def start(split, name, inputs, ids=None):
    """A state of the decoder, and the logits `transformers` gives for the same tokens."""
    with torch.no_grad():
        if name in DECODER_ONLY:
            mask = inputs["attention_mask"]
            places = (mask.cumsum(-1) - 1).clamp(min=0)  # as generate() gives them
            return split.start(inputs["input_ids"], mask), split.model(**inputs, position_ids=places).logits, mask
        if ids is None:
            ids = torch.randint(3, VOCABULARY, (len(next(iter(inputs.values()))), 6), generator=torch.manual_seed(1))
        source = inputs.get("input_ids", inputs.get("input_features"))
        memory = split.encode(source, inputs.get("attention_mask"))
        state = split.start(ids, memory=memory, memory_mask=inputs.get("attention_mask"))
        return state, split.model(**inputs, decoder_input_ids=ids).logits, torch.ones_like(ids)


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.mark.parametrize(
    ("cut", "batch", "padded"), [(2, 1, False), (2, 4, False), (1, 4, True), (2, 4, True), (3, 4, True)]
)
@torch.no_grad()
def test_split_run_equals_full_run(name, cut, batch, padded):
    split = SplitModel(tiny(name))
    state, logits, mask = start(split, name, inputs_for(name, batch, padded=padded))
    state = split.run(split.run(state, 0, cut), cut, LAYERS)
    got = split.readout(state.hidden)
    real = mask.bool()
    assert_close(got[real], logits[real])


def whole_pass(name, split, batch=2):
    """What `states` takes for a batch, and what `transformers` makes of it."""
    inputs = inputs_for(name, batch, padded=name in ENCODER_DECODER and name != "whisper")
    if name in DECODER_ONLY:
        ids = inputs["input_ids"]
        output = split.model(input_ids=ids, output_hidden_states=True)
        return (ids, {}), (output.hidden_states, output.logits)
    ids = torch.randint(3, VOCABULARY, (batch, 6), generator=torch.manual_seed(1))
    source, mask = inputs.get("input_ids", inputs.get("input_features")), inputs.get("attention_mask")
    output = split.model(**inputs, decoder_input_ids=ids, output_hidden_states=True)
    options = {"memory": split.encode(source, mask), "memory_mask": mask}
    return (ids, options), (output.decoder_hidden_states, output.logits)


@torch.no_grad()
def test_states_of_a_whole_pass(name):
    split = SplitModel(tiny(name))
    (ids, options), (hidden, logits) = whole_pass(name, split)
    hooks = [len(block._forward_hooks) for block in split.blocks]  # transformers' own
    states = split.states(ids, [LAYERS, 3, 1, 2, 1], **options)
    assert [len(block._forward_hooks) for block in split.blocks] == hooks
    for layer, state in zip([3, 1, 2, 1], states[1:], strict=True):
        assert_close(state, hidden[layer])
    normed = split.squeeze(split.norm(states[0]))  # as theirs is
    assert_close(normed, hidden[LAYERS])
    assert_close(split.readout(states[0]), logits)


def test_a_whole_pass_has_the_models_own_gradients(name):
    ours, theirs = (SplitModel(copy.deepcopy(tiny(name))) for _ in range(2))
    (ids, options), _ = whole_pass(name, ours)
    loss = ours.readout(ours.states(ids, [LAYERS], **options)[0]).log_softmax(-1)[..., 5].mean()
    loss.backward()
    _, (_, logits) = whole_pass(name, theirs)
    logits.log_softmax(-1)[..., 5].mean().backward()
    learnt = 0
    for (key, own), other in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None), key
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, atol=1e-5, rtol=1e-3, msg=key)
            learnt += bool(own.grad.any())
    assert learnt > 6 * LAYERS


@torch.no_grad()
def test_a_whole_pass_can_be_edited(name):
    """Leaving out what a block does gives the model without it; the edit sees what enters and leaves each block."""
    split, calls = SplitModel(tiny(name)), []
    (ids, options), (hidden, _) = whole_pass(name, split)

    def edit(layer, entering, leaving):
        calls.append((layer, entering, leaving))
        return leaving if layer <= 2 else entering

    states = split.states(ids, range(1, LAYERS + 1), edit=edit, **options)
    assert [layer for layer, _, _ in calls] == list(range(1, LAYERS + 1))
    for layer, entering, leaving in calls[:3]:
        assert_close(entering, hidden[layer - 1])
        if layer < LAYERS:
            assert_close(leaving, hidden[layer])
    short = SplitModel(shortened(name, 2))
    _, (_, logits) = whole_pass(name, short)
    for state in states[1:]:
        assert_close(split.readout(state), logits)


def of_another_release(function, name):
    """A function of transformers as another release has it: it knows the cache by one name, and no other."""
    own = cache_name(function)

    def newer(*args, cache, **kwargs):
        assert "past_key_values" not in kwargs
        return function(*args, **kwargs, **{own: cache})

    def older(*args, past_key_values, **kwargs):
        assert "cache" not in kwargs
        return function(*args, **kwargs, **{own: past_key_values})

    return {"cache": newer, "past_key_values": older}[name]


@pytest.mark.parametrize("cache", ["cache", "past_key_values"])
def test_releases_that_know_the_cache_by_one_name_only(name, cache, monkeypatch):
    policy = ExitPolicy(threshold=0.15, min_layer=1, skipped="verify")
    sequences, model = expected(name), copy.deepcopy(tiny(name))
    for block in SplitModel(model).blocks:
        monkeypatch.setattr(block, "forward", of_another_release(block.forward, cache))
    for kind, build in list(LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.items()):
        if kind in ("full_attention", "sliding_attention"):
            monkeypatch.setitem(LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, kind, of_another_release(build, cache))
    got = LanguageModel(model).generate(inputs_for(name), policy=policy, max_new_tokens=NEW)
    assert got.sequences.tolist() == sequences


def test_a_failed_pass_leaves_no_hooks():
    split = SplitModel(copy.deepcopy(tiny("llama")))
    hooks = [len(block._forward_hooks) for block in split.blocks]
    with pytest.raises(ZeroDivisionError):
        split.states(torch.ones(1, 3, dtype=torch.long), [1], edit=lambda *_: 1 / 0)
    assert [len(block._forward_hooks) for block in split.blocks] == hooks


@torch.no_grad()
def test_token_by_token_equals_full_run(name):
    split, inputs = SplitModel(tiny(name)), inputs_for(name, 3, padded=True)
    ids = inputs["input_ids"] if name in DECODER_ONLY else torch.randint(3, VOCABULARY, (3, 6))
    whole, logits, _ = start(split, name, inputs, ids)
    if name in DECODER_ONLY:
        state = split.start(ids[:, :4], inputs["attention_mask"][:, :4])
    else:
        state = split.start(ids[:, :4], memory=whole.context.memory, memory_mask=inputs.get("attention_mask"))
    state = split.run(state, 0, LAYERS)
    for t in range(4, ids.shape[1]):
        state = split.run(split.start(ids[:, t : t + 1], context=state.context), 0, LAYERS)
        assert_close(split.readout(state.hidden)[:, 0], logits[:, t])


@pytest.mark.parametrize(
    ("mode", "batch", "padded"),
    [*((mode, 4, True) for mode in NEVER), ("propagate", 1, False), ("propagate", 4, False)],
)
def test_never_exit_equals_transformers_greedy(name, batch, padded, mode):
    inputs = inputs_for(name, batch, padded=padded)
    out = LanguageModel(tiny(name)).generate(inputs, policy=NEVER[mode], max_new_tokens=NEW)
    assert out.sequences.tolist() == expected(name, batch, padded)
    assert {layer for row in out.exit_layers for layer in row} == {LAYERS}


@pytest.mark.parametrize(
    ("layer", "batch", "padded"), [(1, 4, True), (2, 4, True), (3, 4, True), (1, 1, False), (3, 4, False)]
)
def test_static_exit_equals_truncated_model(name, batch, padded, layer):
    inputs = inputs_for(name, batch, padded=padded)
    policy = ExitPolicy(confidence="static", min_layer=layer)
    out = LanguageModel(tiny(name)).generate(inputs, policy=policy, max_new_tokens=NEW)
    assert out.sequences.tolist() == expected(name, batch, padded, layer)
    assert {exit for row in out.exit_layers for exit in row} == {layer}


@pytest.mark.parametrize("skipped", ["propagate", "defer"])
@pytest.mark.parametrize("layer", [1, 3])
def test_always_exit_equals_truncated_model_after_the_prompt(name, layer, skipped):
    """Layers up to l never look at deeper ones, so whatever happens there, tokens are those of the l-layer model."""
    inputs, policy = inputs_for(name), ExitPolicy(threshold=float("-inf"), min_layer=layer, skipped=skipped)
    out = LanguageModel(tiny(name)).generate(inputs, policy=policy, max_new_tokens=NEW, eos_token_id=NO_END)
    small = shortened(name, layer)
    if name in DECODER_ONLY:  # the prompt and its token are the full model's
        first = out.sequences[:, : inputs["input_ids"].shape[1] + 1]
        inputs = {"input_ids": first, "attention_mask": torch.ones_like(first)}
        assert out.exit_layers[0] == [LAYERS] + [layer] * (len(out.exit_layers[0]) - 1)
    else:
        assert set(out.exit_layers[0]) == {layer}
    new = NEW - (name in DECODER_ONLY)
    assert out.sequences.tolist() == greedy(small, inputs, new, eos_token_id=NO_END).tolist()


@pytest.mark.parametrize(
    ("threshold", "batch", "padded"),
    [(0.05, 4, True), (0.3, 4, True), (float("-inf"), 4, True), (0.3, 1, False), (float("-inf"), 4, False)],
)
def test_verify_equals_transformers_greedy(name, batch, padded, threshold):
    inputs = inputs_for(name, batch, padded=padded)
    policy = ExitPolicy(threshold=threshold, min_layer=2, skipped="verify", draft_length=3)
    out = LanguageModel(tiny(name)).generate(inputs, policy=policy, max_new_tokens=NEW)
    assert out.sequences.tolist() == expected(name, batch, padded)


@torch.no_grad()
def test_fill_equals_running_the_block_and_discarding_its_output(name):
    split, inputs = SplitModel(tiny(name)), inputs_for(name, 3, padded=True)
    state, _, _ = start(split, name, inputs)
    state = split.run(state, 0, 2)
    context, frame = state.context, state.frame
    filled, _, _ = start(split, name, inputs)
    filled = split.run(filled, 0, 2)
    rows, slots = torch.meshgrid(torch.arange(3), torch.arange(frame.queries), indexing="ij")
    skipped = Skipped(filled.hidden.flatten(0, 1), rows.flatten(), slots.flatten(), frame.queries)
    for layer in (2, 3):
        run_block(split, layer, state.hidden, frame, context)
        split.fill(filled.context, layer, layer + 1, skipped)
        ran, wrote = context.cache.layers[layer], filled.context.cache.layers[layer]
        wrote.length = ran.length
        torch.testing.assert_close(wrote.keys, ran.keys, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(wrote.values, ran.values, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_deferred_positions_get_the_full_models_states(name):
    """Positions stop at depths 4, 2, 1 (never deepening), then go through the rest together."""
    split, inputs = SplitModel(tiny(name)), inputs_for(name, 2, padded=True)
    ids = inputs["input_ids"] if name in DECODER_ONLY else torch.randint(3, VOCABULARY, (2, 6))
    whole, logits, mask = start(split, name, inputs, ids)
    way = Defer(split, Ledger(split.shape, split.device))
    if name in DECODER_ONLY:
        state = split.start(ids[:, :3], inputs["attention_mask"][:, :3])
    else:
        state = split.start(ids[:, :3], memory=whole.context.memory, memory_mask=inputs.get("attention_mask"))
    way.begin([state], [0, 1], prompt=True)
    way.advance(4)
    for t, depth in ((3, 2), (4, 2), (5, 1)):
        way.begin([split.start(ids[:, t : t + 1], context=state.context)], [0, 1])
        way.advance(depth)
        way.leave([0, 1], [])
    lengths = [layer.length for layer in state.context.cache.layers]
    assert lengths == [6, 5, 3, 3]
    way.recall([0, 1])
    way.advance(LAYERS)
    assert [layer.length for layer in state.context.cache.layers] == [6] * 4
    ((_, together),) = way.states
    got = split.readout(together.hidden)  # positions 3, 4, 5
    torch.testing.assert_close(got, logits[:, 3:6], atol=3e-5, rtol=1e-4)


@torch.no_grad()
def test_skipped_layers_hold_what_the_next_token_needs(name):
    """After an exit, a deeper token finds keys and values of every earlier position at every layer."""
    split, inputs = SplitModel(tiny(name)), inputs_for(name, 3, padded=True)
    state, _, _ = start(split, name, inputs)
    way = Propagate(split, Ledger(split.shape, split.device))
    way.begin([state], [0, 1, 2], prompt=True)
    way.advance(LAYERS)
    slots = state.context.slots
    token = torch.tensor([[5], [6], [7]])
    way.begin([split.start(token, context=state.context)], [0, 1, 2])
    way.advance(1)
    frozen = way.read.clone()
    way.leave([0, 2], [1])
    way.advance(2)
    frozen[1] = way.read[0]
    way.leave([0], [])
    assert [layer.length for layer in state.context.cache.layers] == [slots + 1, slots + 1, slots, slots]
    way.begin([split.start(token, context=state.context)], [0, 1, 2])
    way.advance(LAYERS)
    assert [layer.length for layer in state.context.cache.layers] == [slots + 2] * 4
    # Reference: the same blocks, run on the frozen states with their output thrown away.
    other, _, _ = start(split, name, inputs)
    split.run(other, 0, LAYERS)
    exits = split.start(token, context=other.context)
    for layer in range(LAYERS):
        depth = torch.tensor([1, 2, 1])
        hidden = (
            exits.hidden if layer == 0 else torch.where((layer >= depth)[:, None, None], frozen[:, None], exits.hidden)
        )
        ran = run_block(split, layer, hidden, exits.frame, other.context)
        exits = type(exits)(exits.context, exits.frame, ran, layer + 1)
    last = split.run(split.start(token, context=other.context), 0, LAYERS)
    torch.testing.assert_close(way.states[0][1].hidden, last.hidden, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [None, "fixed", "adaptive"])
def test_row_of_a_batch_equals_its_own_run(name, kind):
    policy = ExitPolicy(threshold=0.15, min_layer=1, vocabulary=kind, vocabulary_size=kind and 20)
    inputs = inputs_for(name, 4, padded=True)
    model = LanguageModel(tiny(name))
    together = model.generate(inputs, policy=policy, max_new_tokens=NEW)
    for row in range(4):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        if name in DECODER_ONLY:
            alone = {key: value[:, row:] for key, value in alone.items()}
        out = model.generate(alone, policy=policy, max_new_tokens=NEW)
        assert out.tokens[0] == together.tokens[row]
        assert out.exit_layers[0] == together.exit_layers[row]


@pytest.mark.parametrize("name", [*DECODER_ONLY, "t5", "t5-v1.1", "mt5", "bart"])
@pytest.mark.parametrize(("batch", "padded"), batch_cases())
def test_custom_generate(name, batch, padded):
    model, inputs = tiny(name), inputs_for(name, batch, padded=padded)
    options = {"max_new_tokens": NEW, "do_sample": False}
    never = model.generate(**inputs, **options, custom_generate=ExitPolicy(threshold=1.0).custom_generate())
    assert never.tolist() == expected(name, batch, padded)
    policy = ExitPolicy(threshold=0.15, min_layer=1)
    got = model.generate(**inputs, **options, custom_generate=policy.custom_generate())
    assert got.tolist() == LanguageModel(model).generate(inputs, policy=policy, max_new_tokens=NEW).sequences.tolist()


@pytest.mark.parametrize("kind", ["fixed", "decaying", "adaptive"])
def test_keeping_all_tokens_equals_no_pruning(name, kind):
    plain = ExitPolicy(threshold=0.2, min_layer=1)
    pruned = ExitPolicy(
        threshold=0.2, min_layer=1, vocabulary=kind, vocabulary_size=VOCABULARY, vocabulary_floor=VOCABULARY
    )
    model, inputs = LanguageModel(tiny(name)), inputs_for(name, 2)
    a, b = (model.generate(inputs, policy=policy, max_new_tokens=NEW) for policy in (plain, pruned))
    assert a.tokens == b.tokens
    assert a.exit_layers == b.exit_layers


def test_every_supported_type_is_tested():
    assert {tiny(name).config.model_type for name in FAMILIES} == set(SUPPORTED)
    assert set(DECODER_ONLY) | set(ENCODER_DECODER) == set(FAMILIES)


def test_t5_scales_its_readout_and_later_t5_does_not():
    assert SplitModel(tiny("t5")).scale is not None
    assert SplitModel(tiny("t5-v1.1")).scale is None
    assert SplitModel(tiny("mt5")).scale is None


def test_a_model_without_a_head_is_refused():
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    with pytest.raises(UnsupportedModelError, match="no language-modelling head"):
        SplitModel(LlamaModel(LlamaConfig(vocab_size=50, **sizes)))


@torch.no_grad()
def test_a_state_runs_only_from_where_it_is():
    split = SplitModel(tiny("llama"))
    state = split.run(split.start(torch.tensor([[5, 6]])), 0, 2)
    with pytest.raises(ValueError, match="layers 2..3 of 4 on a state after 2 layers"):
        split.run(state, 1, 3)
    with pytest.raises(ValueError, match="layers 3..9 of 4"):
        split.run(state, 2, 9)


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "bart"])
def test_bfloat16_runs_and_verifies(name):
    """In bfloat16 near-ties may flip between chunked and single-token products; on these models none does."""
    model = copy.deepcopy(tiny(name)).to(torch.bfloat16)
    inputs = inputs_for(name, 2, padded=True)
    out = LanguageModel(model).generate(inputs, policy=ExitPolicy(threshold=0.2, min_layer=2), max_new_tokens=NEW)
    assert all(1 <= layer <= LAYERS for row in out.exit_layers for layer in row)
    full = LanguageModel(model).generate(inputs, max_new_tokens=NEW)
    assert full.sequences.tolist() == greedy(model, inputs, NEW).tolist()


class Doubled(torch.nn.Module):
    """Stands for an adapter or a quantised layer: computes something else than its weight says."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return 2 * self.linear(x)


@pytest.mark.parametrize(
    ("name", "fused"),
    [("phi3", "self_attn.qkv_proj"), ("gpt2", "attn.c_attn"), ("gpt-neox", "attention.query_key_value")],
)
@torch.no_grad()
def test_layers_that_are_more_than_their_weight(name, fused):
    model = copy.deepcopy(tiny(name))
    split = SplitModel(model)
    for block in split.blocks:
        block.set_submodule(fused, Doubled(block.get_submodule(fused)))
    state = split.run(split.start(torch.tensor([[5]])), 0, 1)
    rope = None if split.rotary is None else split.rotary(state.hidden, torch.tensor([[0]]))
    keys, values = split.family.keys_values(split.blocks[1], state.hidden, rope)
    split.run(state, 1, 2)
    cache = state.context.cache.layers[1]
    torch.testing.assert_close(keys, cache.keys)
    torch.testing.assert_close(values, cache.values)


def test_pruning_needs_a_head_with_rows():
    model = copy.deepcopy(tiny("llama"))
    model.lm_head = Doubled(model.lm_head)
    lm, inputs = LanguageModel(model), inputs_for("llama")
    with pytest.raises(ValueError, match="single rows of the head, a Doubled, cannot be read"):
        lm.generate(inputs, policy=ExitPolicy(vocabulary="fixed"), max_new_tokens=3)
    for policy in (ExitPolicy(threshold=1.0), ExitPolicy("contrastive", 1.0, 2), ExitPolicy("jsd", 1.0, 3)):
        out = lm.generate(inputs, policy=policy, max_new_tokens=NEW)
        assert out.sequences.tolist() == greedy(model, inputs, NEW).tolist()


def test_a_resized_head_is_noticed():
    model = copy.deepcopy(tiny("llama"))
    lm = LanguageModel(model)
    with torch.no_grad():
        model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
        model.lm_head.weight[VOCABULARY:] = 9 * model.lm_head.weight[:8]
    assert lm.vocabulary == VOCABULARY + 8
    inputs = inputs_for("llama")
    out = lm.generate(inputs, policy=ExitPolicy(threshold=1.0, min_layer=1), max_new_tokens=NEW)
    assert out.sequences.tolist() == greedy(model, inputs, NEW).tolist()


def test_a_model_that_is_not_whole_on_one_device_is_refused():
    with torch.device("meta"):
        model = type(tiny("llama"))(tiny("llama").config)
    with pytest.raises(UnsupportedModelError, match="lies on meta; load it whole on one device"):
        SplitModel(model)

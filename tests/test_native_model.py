"""The native engine as a whole: what `transformers` and the torch engine make, and what it promises beyond."""

import copy

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from few_bits import input_in, model_in, rounded, weight_in
from offramp import ExitPolicy, LanguageModel
from offramp.core.exits import Exits
from offramp.families import SplitModel
from offramp.native.families import FAMILIES as DESCRIBED
from offramp.native.kernels import NativeError
from offramp.native.model import NativeModel
from tiny import DECODER_ONLY, FAMILIES, LAYERS, VOCABULARY, greedy, inputs_for, tiny

NEW = 12
NATIVE = [name for name in FAMILIES if tiny(name).config.model_type in DESCRIBED and name != "opt-350m"]
POLICIES = {
    "propagate": ExitPolicy(threshold=0.15, min_layer=1),
    "pruned": ExitPolicy(threshold=0.15, min_layer=1, vocabulary="adaptive", vocabulary_size=20),
    "defer": ExitPolicy(threshold=0.15, min_layer=1, skipped="defer"),
    "contrastive": ExitPolicy("contrastive", 0.15, 2),
    "state": ExitPolicy("state", 0.9, 1),
}


def native(model, **options):
    """A language model on the native engine."""
    return LanguageModel(model, engine="native", **options)


@pytest.fixture(params=NATIVE)
def name(request):
    return request.param


def in_bfloat16(name):
    return copy.deepcopy(tiny(name)).to(torch.bfloat16)


def texts_for(name, split, rows):
    """Tokens of a decoder, which of them are there, or None: all, and what else it starts from."""
    inputs = inputs_for(name, rows, padded=True)
    if not split.is_encoder_decoder:
        return inputs["input_ids"], inputs["attention_mask"], {}
    source, mask = inputs.get("input_features", inputs.get("input_ids")), inputs.get("attention_mask")
    memory = split.encode(source.to(split.model.dtype) if name == "whisper" else source, mask)
    ids = torch.randint(3, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(0))
    return ids, None, {"memory": memory, "memory_mask": mask}


def test_full_depth_is_that_of_transformers(name):
    inputs = inputs_for(name, 4, padded=True)
    got = native(tiny(name)).generate(inputs, max_new_tokens=NEW).sequences
    assert got.tolist() == greedy(tiny(name), inputs, NEW).tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_do_as_on_torch(name, policy):
    inputs = inputs_for(name, 4, padded=True)
    got, want = (
        lm.generate(inputs, policy=POLICIES[policy], max_new_tokens=NEW)
        for lm in (native(tiny(name)), LanguageModel(tiny(name), engine="torch"))
    )
    assert got.tokens == want.tokens
    assert got.exit_layers == want.exit_layers
    assert got.costs.flops == want.costs.flops


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
def test_verify_is_its_own_full_depth(name, form):
    lm, inputs = native(model_in(form, tiny(name)), rounded=rounded(form)), inputs_for(name, 3, padded=True)
    if form == "bfloat16" and name == "whisper":
        inputs = {key: value.bfloat16() for key, value in inputs.items()}
    full = lm.generate(inputs, max_new_tokens=NEW)
    for length in (1, 3, 5):
        policy = ExitPolicy(threshold=0.1, min_layer=1, skipped="verify", draft_length=length)
        out = lm.generate(inputs, policy=policy, max_new_tokens=NEW)
        assert out.tokens == full.tokens


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
@torch.no_grad()
def test_states_are_the_same_bits_in_any_company(name, form):
    """One token at a time, all at once, and in a padded batch: every state and logit is the same."""
    split = NativeModel(model_in(form, tiny(name)), rounded=rounded(form))
    ids, mask, given = texts_for(name, split, 3)
    rows = [{key: v[i : i + 1] for key, v in given.items() if v is not None} for i in range(3)]
    together = split.run(split.start(ids, mask, **given), 0, LAYERS)
    logits = split.readout(together.hidden)
    for row in range(3):
        real = slice(None) if mask is None else mask[row].bool()
        own, context, state = ids[row][real], None, None
        for token in own:
            options = rows[row] if context is None else {"context": context}
            state = split.run(split.start(token.view(1, 1), **options), 0, LAYERS)
            context = state.context
        assert state is not None
        assert torch.equal(state.hidden[0, 0], together.hidden[row, -1])
        assert torch.equal(split.readout(state.hidden)[0, 0], logits[row, -1])


def test_a_row_of_a_batch_is_as_alone(name):
    lm, inputs = native(tiny(name)), inputs_for(name, 4, padded=True)
    together = lm.generate(inputs, policy=POLICIES["pruned"], max_new_tokens=NEW)
    for row in range(4):
        alone = {k: v[row : row + 1, row if name in DECODER_ONLY else 0 :] for k, v in inputs.items()}
        out = lm.generate(alone, policy=POLICIES["pruned"], max_new_tokens=NEW)
        assert out.tokens[0] == together.tokens[row]
        assert out.exit_layers[0] == together.exit_layers[row]


@pytest.mark.parametrize("form", ["int8", "int4"])
@torch.no_grad()
def test_fewer_bits_are_the_model_with_weights_and_inputs_rounded(name, form):
    """Within float32's rounding, but behind inputs that lie all but half-way between two whole numbers."""
    model = model_in(form, tiny(name))
    split = SplitModel(copy.deepcopy(model))
    for module in [split.head, *(m for block in split.blocks for m in block.modules())]:
        if isinstance(module, torch.nn.Linear | Conv1D) and not hasattr(module, "form"):
            module.form = "int8" if module is split.head else form  # a head's rows are read one by one
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            back = weight_in(module.form, weight)
            # Another tensor, where the head is the embedding too, which stays as it is
            module.weight = torch.nn.Parameter(back.T if isinstance(module, Conv1D) else back)
            module.register_forward_pre_hook(lambda module, inputs: (input_in(module.form, inputs[0]),))
    splits = NativeModel(model, rounded=form), split, SplitModel(model)
    ids, mask, given = texts_for(name, splits[0], 8)
    got, want, exact = (
        each.readout(each.run(each.start(ids, mask, **given), 0, LAYERS).hidden)[:, -1].double() for each in splits
    )
    away, rounding = (got - want).abs().amax(-1), (want - exact).abs().amax(-1)
    assert float((away < 1e-4).double().mean()) > 0.4
    assert float(away.mean()) < 0.5 * float(rounding.mean())
    assert float(rounding.min()) > 1e-3


@pytest.mark.parametrize("name", [name for name in NATIVE if name in DECODER_ONLY])
@torch.no_grad()
def test_bfloat16_is_nearer_to_the_exact_model_than_torch(name):
    """Its states are float32, the model's own are rounded after every operation."""
    model, ids = in_bfloat16(name), inputs_for(name, 2)["input_ids"]
    exact = copy.deepcopy(model).float()(ids).logits
    split = NativeModel(model)
    got = split.readout(split.run(split.start(ids), 0, LAYERS).hidden)
    assert (got - exact).pow(2).mean() < (model(ids).logits.float() - exact).pow(2).mean()


def test_long_texts_grow_caches_and_tables():
    lm, reference = native(tiny("llama")), LanguageModel(tiny("llama"), engine="torch")
    inputs = inputs_for("llama", 2, padded=True)
    policy = ExitPolicy(threshold=0.15, min_layer=1)
    got, want = (each.generate(inputs, policy=policy, max_new_tokens=150) for each in (lm, reference))
    assert got.tokens == want.tokens


@pytest.mark.parametrize("rank", [None, 4])
def test_lenses_and_classifiers(rank):
    """Trained exits, in float32 whatever the weights are in."""
    torch.manual_seed(1)
    lm, reference = native(tiny("llama")), LanguageModel(tiny("llama"), engine="torch")
    exits = Exits.fresh(reference.split, (1, 2), rank).with_classifiers()
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    for each in (lm, reference):
        each.attach_exits(exits)
    for confidence in ("softmax", "classifier"):
        policy = ExitPolicy(confidence, threshold=0.2)
        got, want = (e.generate(inputs_for("llama", 3), policy=policy, max_new_tokens=NEW) for e in (lm, reference))
        assert got.exit_layers == want.exit_layers
        assert got.tokens == want.tokens
        torch.testing.assert_close(torch.tensor(got.confidences), torch.tensor(want.confidences), equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.to(torch.float16), "float16; float32 and bfloat16 are supported"),
        (lambda m: setattr(m.model.layers[0].mlp, "up_proj", torch.nn.Sequential()), "a Sequential of torch is more"),
        (lambda m: setattr(m.config, "rope_parameters", {"rope_type": "dynamic"}), "change with the length"),
        (lambda m: setattr(m.config, "hidden_act", "mish"), "'mish' is not known"),
    ],
)
def test_what_it_cannot_run_is_said(change, message):
    model = copy.deepcopy(tiny("llama"))
    change(model)
    with pytest.raises(NativeError, match=message):
        NativeModel(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixtral", r"models of type 'mixtral' have no native description \(those with experts have none\)"),
        ("opt-350m", "embeddings are not as wide as its states"),
    ],
)
def test_models_it_has_no_words_for_are_named(name, message):
    with pytest.raises(NativeError, match=message):
        NativeModel(tiny(name))


def test_positions_of_the_caller():
    inputs = inputs_for("llama", 2, padded=True)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) * 3
    got, want = (
        lm.generate(inputs, max_new_tokens=NEW).tokens
        for lm in (native(tiny("llama")), LanguageModel(tiny("llama"), engine="torch"))
    )
    assert got == want


@pytest.mark.parametrize("rank", [None, 4])
@torch.no_grad()
def test_the_best_tokens_come_in_one_call(name, rank):
    """What a test needs of a readout is what its parts give, with a lens and on some tokens only, too."""
    torch.manual_seed(3)
    split = NativeModel(tiny(name))
    exits = Exits.fresh(split, (1, 2), rank)
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    split.exits = exits
    hidden = torch.randn(3, split.shape.width)
    kept = split.gather(torch.stack([torch.randperm(VOCABULARY)[:20] for _ in range(3)]))
    for layer, rows in ((1, None), (None, None), (2, kept)):
        x = split.readout_input(hidden, layer)
        logits = split.project(x, rows)
        torch.testing.assert_close(x, SplitModel.readout_input(split, hidden, layer), atol=1e-5, rtol=1e-5)
        want = SplitModel.project(split, x)
        torch.testing.assert_close(logits, want if rows is None else want.gather(1, rows.ids), atol=1e-5, rtol=1e-5)
        best = split.best(hidden, layer, rows, logits=True, inputs=True)
        assert torch.equal(best.inputs, x)
        assert torch.equal(best.logits, logits)
        top = logits.topk(2, dim=1)
        assert torch.equal(best.values, top.values)
        assert torch.equal(best.tokens, top.indices if rows is None else rows.ids.gather(1, top.indices))
        torch.testing.assert_close(best.normaliser, logits.logsumexp(1), atol=1e-6, rtol=1e-6)


def test_torch_keeps_to_one_thread_while_the_kernels_work():
    """Else torch's idle threads spin on the kernels' cores. Between the steps of a stream all is as it was."""
    lm = LanguageModel(tiny("llama"), engine="native")
    native, before = lm.decoder, torch.get_num_threads()
    seen = []

    def look(ids, _scores, **_options):
        seen.append((torch.get_num_threads(), native.threads.count))
        return torch.zeros(len(ids), dtype=torch.bool)

    torch.set_num_threads(3)
    try:
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "stopping_criteria": [look]}
        lm.generate(torch.ones(1, 4, dtype=torch.long), **options)
        for _ in lm.stream(torch.ones(1, 4, dtype=torch.long), **options):
            assert (torch.get_num_threads(), native.threads.count) == (3, 3)
        assert seen == [(1, 3)] * 6

        def broken(*_, **__):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            lm.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, stopping_criteria=[broken])
        assert (torch.get_num_threads(), native.threads.count) == (3, 3)
    finally:
        torch.set_num_threads(before)

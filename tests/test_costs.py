"""The ledger against torch's own counter, and against hand-made sums."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from offramp import ExitPolicy, Exits, LanguageModel
from offramp.core.costs import PARTS, Ledger
from tiny import FAMILIES, LAYERS, VOCABULARY, eager, inputs_for, tiny

POLICIES = {
    "full": None,
    "static": ExitPolicy("static", min_layer=2),
    "softmax": ExitPolicy(threshold=0.15, min_layer=1),
    "fixed": ExitPolicy(threshold=0.15, min_layer=1, vocabulary="fixed", vocabulary_size=20),
    "adaptive": ExitPolicy(threshold=0.15, min_layer=1, vocabulary="adaptive", vocabulary_size=40),
    "state": ExitPolicy("state", threshold=0.7, min_layer=1),
    "contrastive": ExitPolicy("contrastive", threshold=0.2, min_layer=2),
    "jsd": ExitPolicy("jsd", threshold=0.2, min_layer=3),
    "defer": ExitPolicy(threshold=0.15, min_layer=1, skipped="defer"),
    "verify": ExitPolicy(threshold=0.15, min_layer=1, skipped="verify"),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *((name, policy) for name in ("llama", "t5") for policy in POLICIES),
        *((name, "softmax") for name in FAMILIES),
        *((name, "fixed") for name in ("gpt2", "gpt-neox", "opt-350m", "qwen2-moe", "gpt-oss")),
    ],
)
def test_flops_equal_the_counters(name, policy, batch):
    lm = LanguageModel(eager(name), engine="torch")
    inputs = inputs_for(name, batch, padded=True)
    with FlopCounterMode(display=False) as counter:
        out = lm.generate(inputs, policy=POLICIES[policy], max_new_tokens=6)
    # The rotation's angles are a product, too: 1 multiply-add per token and angle, which the ledger leaves out.
    slack = 0.005 if lm.split.rotary is not None else 1e-9
    assert out.costs.flops == pytest.approx(counter.get_total_flops(), rel=slack)


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_flops_with_lenses_equal_the_counters(name, policy, rank):
    lm, inputs = LanguageModel(eager(name), engine="torch"), inputs_for(name, 3, padded=True)
    before = lm.generate(inputs, policy=POLICIES[policy], max_new_tokens=6).costs
    lm.attach_exits(Exits.fresh(lm.split, (1, 2, 3), rank))  # they change nothing but the costs
    with FlopCounterMode(display=False) as counter:
        after = lm.generate(inputs, policy=POLICIES[policy], max_new_tokens=6).costs
    assert after.flops == pytest.approx(counter.get_total_flops(), rel=0.005 if name == "llama" else 1e-9)
    lens = 32 * 32 if rank is None else 2 * 32 * rank
    more = after.parts["readout"].flops - before.parts["readout"].flops
    assert after.flops - before.flops == more
    assert more % (2 * lens) == 0
    assert (more > 0) == (policy != "full")
    bytes_more = after.parts["readout"].bytes - before.parts["readout"].bytes
    assert 0 < bytes_more <= 4 * lens * (more // (2 * lens)) if more else bytes_more == 0


def test_parts_of_a_static_run_by_hand():
    lm = LanguageModel(tiny("llama"))
    out = lm.generate(
        inputs_for("llama"), policy=ExitPolicy("static", min_layer=2), max_new_tokens=5, eos_token_id=None
    )
    d, f, kv, prompt, new = 32, 48, 16, 9, 5
    weights = 2 * d * d + 2 * d * kv + 3 * d * f
    passes = [(prompt, prompt)] + [(1, prompt + t) for t in range(1, new)]  # (queries, keys)
    blocks = 2 * sum(n * (2 * weights + 4 * d * keys) for n, keys in passes)
    assert out.costs.parts["blocks"].flops == blocks
    assert out.costs.parts["readout"].flops == new * 2 * d * VOCABULARY
    cached = sum(2 * kv * (keys - n) for n, keys in passes)
    assert out.costs.parts["blocks"].bytes == 4 * 2 * (new * weights + cached)
    assert out.costs.parts["readout"].bytes == 4 * new * d * VOCABULARY
    assert out.costs.flops == blocks + new * 2 * d * VOCABULARY
    assert (out.costs.tokens, out.costs.tests, out.costs.mean_exit_layer) == (new, 0, 2)
    assert out.costs.executed_layers == 2 * (new - 1)


@pytest.mark.parametrize("policy", ["full", "static", "softmax", "fixed", "defer", "verify", "drafts"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_what_a_generated_token_costs_by_torchs_counter(name, policy):
    """All but the prompt's pass or the encoder's, drafts that were discarded included; ended rows cost nothing."""
    chosen = {**POLICIES, "drafts": ExitPolicy("static", min_layer=1, skipped="verify")}[policy]
    lm, inputs = LanguageModel(eager(name), engine="torch"), inputs_for(name, 3, padded=True)
    spent = []
    for new in (1, 6):
        with FlopCounterMode(display=False) as counter:
            costs = lm.generate(inputs, policy=chosen, max_new_tokens=new).costs
        spent.append(counter.get_total_flops())
    apart = name == "llama"  # the single start token of an encoder-decoder is an ordinary step
    prompt = spent[0] if apart else costs.parts["encoder"].flops
    assert costs.prompt_tokens == (3 if apart else 0)
    assert costs.prompt_flops == pytest.approx(prompt, rel=0.005)
    per_token = (spent[1] - prompt) / (costs.tokens - costs.prompt_tokens)
    assert costs.flops_per_token == pytest.approx(per_token, rel=0.005)
    assert costs.to_dict()["flops_per_token"] == costs.flops_per_token


def test_a_mixture_of_experts_by_hand():
    """Two of five experts multiply a token; together, tokens may read all five."""
    shape = LanguageModel(tiny("qwen2-moe")).split.shape
    d, kv, width, shared, dense = 32, 16, 24, 40, 48
    attention, expert = 2 * d * d + 2 * d * kv, 3 * d * width
    routed = attention + d * 5 + 3 * d * shared + d + 2 * expert  # router, shared expert and its gate
    assert [block.weights for block in shape.blocks] == [routed, attention + 3 * d * dense, routed, routed]
    assert [block.weights_read(1) for block in shape.blocks] == [block.weights for block in shape.blocks]
    assert [shape.blocks[0].weights_read(n) - routed for n in (2, 3, 9)] == [2 * expert, 3 * expert, 3 * expert]
    assert shape.blocks[1].weights_read(9) == attention + 3 * d * dense
    ledger = Ledger(shape, torch.device("cpu"))
    ledger.blocks(0, 1, rows=2, queries=1, start=3)
    assert ledger.costs.parts["blocks"].bytes == 4 * (routed + 2 * expert + 2 * kv * 2 * 3)


def test_a_head_narrower_than_the_states_by_hand():
    shape = LanguageModel(tiny("opt-350m")).split.shape
    assert (shape.width, shape.head_width) == (32, 16)
    assert shape.readout_flops() == 2 * (32 * 16 + 16 * VOCABULARY)
    assert shape.readout_flops(7) == 2 * (32 * 16 + 16 * 7)
    ledger = Ledger(shape, torch.device("cpu"))
    ledger.readout(3)
    ledger.pruned_readout(3, 7)
    ledger.gather(3, 7)
    parts = ledger.costs.parts
    assert parts["readout"].bytes == 4 * (32 * 16 + 16 * VOCABULARY)
    assert parts["pruned_readout"].bytes == 4 * (32 * 16 + 3 * 7 * 16)
    assert parts["select"].bytes == 4 * 2 * 3 * 7 * 16


def test_draft_flops_follow_the_source_documents_rule():
    """d² · V per test; with pruning d² · k from the second test on."""
    lm, inputs = LanguageModel(tiny("llama")), inputs_for("llama")
    plain = ExitPolicy(threshold=1.0, min_layer=1)
    out = lm.generate(inputs, policy=plain, max_new_tokens=5, eos_token_id=None)
    assert out.costs.tests == 4 * 3  # four tokens after the prompt's, three exits
    assert out.costs.draft_flops == 12 * 32**2 * VOCABULARY
    fixed = ExitPolicy(threshold=1.0, min_layer=1, vocabulary="fixed", vocabulary_size=10)
    out = lm.generate(inputs, policy=fixed, max_new_tokens=5, eos_token_id=None)
    assert out.costs.draft_flops == 4 * 2 * 32**2 * 10
    state = ExitPolicy("state", threshold=1.0, min_layer=1)
    assert lm.generate(inputs, policy=state, max_new_tokens=5, eos_token_id=None).costs.draft_flops == 0


def test_steps_and_parts_add_up():
    lm, inputs = LanguageModel(tiny("t5")), inputs_for("t5", 2, padded=True)
    policy = ExitPolicy(threshold=0.15, min_layer=1, vocabulary="fixed", vocabulary_size=20)
    out = lm.generate(inputs, policy=policy, max_new_tokens=8)
    spent = sum(step.flops for step in lm.stream(inputs, policy=policy, max_new_tokens=8))
    assert spent == out.costs.flops
    d = out.costs.to_dict()
    assert d["flops"] == sum(part["flops"] for part in d["parts"].values())
    assert set(d["parts"]) == set(PARTS)
    assert d["per_token"]["flops"] * d["tokens"] == pytest.approx(d["flops"])
    assert all(out.costs.parts[part].flops > 0 for part in ("encoder", "blocks", "readout", "pruned_readout"))
    assert all(out.costs.parts[part].seconds > 0 for part in ("encoder", "blocks", "readout", "select", "confidence"))
    assert sum(part.seconds for part in out.costs.parts.values()) <= out.costs.seconds


def test_propagated_layers_cost_their_fill():
    lm = LanguageModel(tiny("llama"))
    policy = ExitPolicy(threshold=0.15, min_layer=1)
    out = lm.generate(inputs_for("llama"), policy=policy, max_new_tokens=12, eos_token_id=None)
    exits = out.exit_layers[0]
    assert min(exits) < LAYERS
    # A layer fills what earlier tokens skipped when a later token visits it.
    due, visited = 0, 0
    for layer in range(1, LAYERS + 1):
        owed = 0
        for exit in exits[1:]:
            if exit >= layer:
                due, owed = due + owed, 0
            else:
                owed += 1
    visited = sum(exits[1:])
    assert out.costs.parts["fill"].flops == due * 2 * (2 * 32 * 16)
    assert out.costs.executed_layers == visited


def test_nested_times_are_exclusive(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("offramp.core.costs.time.perf_counter", lambda: next(clock))
    ledger = Ledger(LanguageModel(tiny("llama")).split.shape, torch.device("cpu"))
    with ledger.time("confidence"), ledger.time("readout"):
        pass
    assert ledger.costs.parts["readout"].seconds == 2.0
    assert ledger.costs.parts["confidence"].seconds == 1.0 + 4.0


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_the_full_models_flops_in_advance(name):
    lm = LanguageModel(tiny(name))
    stream = lm.stream(inputs_for(name, 2), max_new_tokens=7, min_new_tokens=7)
    count = len(list(stream))
    assert stream.costs.flops == stream.full_flops(count)

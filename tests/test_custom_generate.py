"""Policies inside `transformers`' own `generate`."""

import pytest
import torch
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from offramp import ExitPolicy, LanguageModel
from offramp.custom_generate import EarlyExitOutput
from offramp.families.block_calls import cache_name
from tiny import LAYERS, greedy, inputs_for, tiny

POLICY = ExitPolicy(threshold=0.2, min_layer=1)


def test_a_dict_has_exits_and_costs():
    model, inputs = tiny("llama"), inputs_for("llama", 2, padded=True)
    out = model.generate(
        **inputs,
        max_new_tokens=9,
        do_sample=False,
        custom_generate=POLICY.custom_generate(),
        return_dict_in_generate=True,
    )
    expected = LanguageModel(model).generate(inputs, policy=POLICY, max_new_tokens=9)
    assert isinstance(out, EarlyExitOutput)
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert [[x for x in row if x] for row in out.exit_layers.tolist()] == expected.exit_layers
    assert out.costs.flops == expected.costs.flops


def test_generation_options_are_transformers_own():
    model, inputs = tiny("llama"), inputs_for("llama", 2)
    options = {"max_new_tokens": 9, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    never = ExitPolicy(threshold=1.0, skipped="verify").custom_generate()
    got = model.generate(**inputs, **options, do_sample=False, custom_generate=never)
    assert got.tolist() == greedy(model, inputs, 9, repetition_penalty=1.4, no_repeat_ngram_size=2).tolist()


def test_a_streamer_gets_every_token():
    class Collect:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Collect()
    inputs = inputs_for("llama")
    out = tiny("llama").generate(
        **inputs, max_new_tokens=5, do_sample=False, custom_generate=POLICY.custom_generate(), exit_streamer=streamer
    )
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended


def test_several_samples_per_prompt():
    inputs = inputs_for("llama")
    torch.manual_seed(3)
    out = tiny("llama").generate(
        **inputs, max_new_tokens=5, do_sample=True, num_return_sequences=3, custom_generate=POLICY.custom_generate()
    )
    assert out.shape[0] == 3


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 3, "do_sample": True}])
def test_beams_are_refused(options):
    with pytest.raises(ValueError, match="num_beams is .*one hypothesis per row"):
        tiny("llama").generate(
            **inputs_for("llama"), max_new_tokens=3, **options, custom_generate=POLICY.custom_generate()
        )


def test_a_filled_cache_is_refused():
    model, inputs = tiny("llama"), inputs_for("llama")
    name = cache_name(model.forward)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(inputs["input_ids"][:, :4], **{name: cache})
    with pytest.raises(ValueError, match=f"filled {name} cannot be continued"):
        model.generate(**inputs, max_new_tokens=3, **{name: cache}, custom_generate=POLICY.custom_generate())


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_filled_cache_is_refused_under_the_name_of_any_release(name):
    model = tiny("llama")
    cache = DynamicCache(config=model.config)
    ids = inputs_for("llama")["input_ids"]
    config = GenerationConfig(max_length=20)
    POLICY.custom_generate()(model, ids, [], StoppingCriteriaList(), config, **{name: cache})  # an empty one is fine
    cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    with pytest.raises(ValueError, match=f"filled {name} cannot be continued"):
        POLICY.custom_generate()(model, ids, [], StoppingCriteriaList(), config, **{name: cache})


def test_embeddings_instead_of_ids_are_refused():
    model, inputs = tiny("llama"), inputs_for("llama")
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with pytest.raises(ValueError, match="inputs_embeds are not supported"):
        model.generate(inputs_embeds=embedded, max_new_tokens=3, custom_generate=POLICY.custom_generate())


def test_a_policy_that_does_not_fit_is_refused():
    never = ExitPolicy(min_layer=LAYERS).custom_generate()
    with pytest.raises(ValueError, match=f"min_layer is {LAYERS}"):
        tiny("llama").generate(**inputs_for("llama"), max_new_tokens=3, custom_generate=never)


def test_the_users_stopping_criteria_count():
    model, inputs = tiny("llama"), inputs_for("llama")
    free = greedy(model, inputs, 20)
    for criterion in (MaxLengthCriteria(13), EosTokenCriteria(int(free[0, 12]))):
        options = {"max_new_tokens": 20, "do_sample": False, "stopping_criteria": StoppingCriteriaList([criterion])}
        expected = model.generate(**inputs, **options)
        assert expected.shape[1] <= 13
        for skipped in ("propagate", "verify"):
            never = ExitPolicy(threshold=1.0, min_layer=1, skipped=skipped).custom_generate()
            assert model.generate(**inputs, **options, custom_generate=never).tolist() == expected.tolist()


def test_stopping_criteria_never_see_a_draft():
    model, inputs, seen = tiny("llama"), inputs_for("llama"), []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(input_ids[0].tolist())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    policy = ExitPolicy(threshold=0.05, min_layer=1, skipped="verify")
    options = {"max_new_tokens": 12, "do_sample": False, "stopping_criteria": StoppingCriteriaList([Watch()])}
    out = model.generate(**inputs, **options, custom_generate=policy.custom_generate())
    assert seen == [out[0, :end].tolist() for end in range(10, out.shape[1] + 1)]


def test_right_padding_is_refused():
    inputs = inputs_for("llama", 2)
    inputs["attention_mask"][1, -2:] = 0
    with pytest.raises(ValueError, match="padded on the right; pad decoder-only models on the left"):
        LanguageModel(tiny("llama")).generate(inputs, max_new_tokens=3)


def test_verify_refuses_a_watermark_that_remembers():
    """SynthID's marks depend on the calls before; the other watermark of transformers on the text alone."""
    lm, inputs = LanguageModel(tiny("llama")), inputs_for("llama")
    policy = ExitPolicy(threshold=0.15, min_layer=1, skipped="verify")
    remembers = {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=2), "do_sample": True}
    with pytest.raises(ValueError, match=r"SynthIDText\w+ remembers earlier calls .* use skipped='propagate'"):
        lm.generate(inputs, policy=policy, max_new_tokens=4, **remembers)
    lm.generate(inputs, policy=ExitPolicy(threshold=0.15, min_layer=1), max_new_tokens=4, **remembers)
    pure = {"watermarking_config": WatermarkingConfig(bias=9.0, seeding_scheme="selfhash"), "max_new_tokens": 8}
    got = lm.generate(inputs, policy=policy, **pure).tokens
    assert got == lm.generate(inputs, **pure).tokens
    assert got != lm.generate(inputs, max_new_tokens=8).tokens

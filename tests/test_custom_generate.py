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
from offramp.core.custom_generate import EarlyExitOutput
from offramp.families.network import cache_name
from tiny import DECODER_ONLY, FAMILIES, LAYERS, greedy, inputs_for, tiny

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


# ---------------------------------------------------------------- the caller's own inputs

NEVER = ExitPolicy(threshold=1.0, min_layer=1, skipped="verify")


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_positions_are_the_callers(name):
    """Positions that jump within the prompt: new tokens go on from the last, as in `transformers`."""
    model, inputs = tiny(name), inputs_for(name, 2, padded=True)
    inputs["position_ids"] = torch.stack([torch.arange(9) * 3, (torch.arange(9) * 5 - 1).clamp(min=0)])
    expected = greedy(model, inputs, 9).tolist()
    for policy in (NEVER, ExitPolicy(threshold=-torch.inf, min_layer=1, skipped="verify")):
        assert LanguageModel(model).generate(inputs, policy=policy, max_new_tokens=9).sequences.tolist() == expected
        options = {"max_new_tokens": 9, "do_sample": False, "custom_generate": policy.custom_generate()}
        assert model.generate(**inputs, **options).tolist() == expected
    if name == "llama":
        plain = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        assert greedy(model, plain, 9).tolist() != expected


def test_positions_count_for_the_context():
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": torch.tensor([[0, 1, 250]])}
    with pytest.raises(ValueError, match=r"position_ids go to 250 and 6 new ones .*holds 256; .*at most 5 new"):
        LanguageModel(tiny("llama")).generate(inputs, max_new_tokens=6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.arange(8)[None], r"shape \[1, 8\]; give a whole number for each token of the prompts, \[1, 9\]"),
        (torch.arange(9), r"shape \[9\]"),
        (torch.arange(27).view(3, 1, 9), r"shape \[3, 1, 9\]"),
        (torch.arange(9.0)[None], "are torch.float32 of"),
        (torch.arange(9)[None] - 2, "position_ids hold -2; positions count from 0"),
    ],
)
def test_positions_that_are_none_are_refused(values, message):
    inputs = {**inputs_for("llama"), "position_ids": values}
    with pytest.raises(ValueError, match=message):
        LanguageModel(tiny("llama")).generate(inputs, max_new_tokens=3)
    with pytest.raises(ValueError, match=message):
        tiny("llama").generate(**inputs, max_new_tokens=3, custom_generate=POLICY.custom_generate())


@pytest.mark.parametrize("name", FAMILIES)
def test_what_generate_itself_prepares_is_never_refused(name):
    if name == "whisper":
        pytest.skip("its generate is its own")
    model, inputs = tiny(name), inputs_for(name, 2, padded=True)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, custom_generate=NEVER.custom_generate())
    assert out.tolist() == greedy(model, inputs, 4).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 9])}, "cu_seq_lens_q is given, which is not used with early exits"),
        ({"token_type_ids": torch.zeros(1, 9, dtype=torch.long)}, "token_type_ids"),
        ({"cache_implementation": "offloaded"}, "cache_implementation is 'offloaded'"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is 3"),
        ({"guidance_scale": 1.5}, r"guidance_scale is 1\.5"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha is 0.5|trust_remote_code"),
        ({"attention_mask": torch.ones(1, 8, dtype=torch.long)}, r"attention_mask .* shape \[1, 8\]"),
    ],
)
def test_what_would_not_be_used_is_refused_by_name(options, message):
    inputs = {**inputs_for("llama"), **options}
    with pytest.raises(ValueError, match=message):
        tiny("llama").generate(**inputs, max_new_tokens=3, do_sample=False, custom_generate=POLICY.custom_generate())


def test_inputs_of_the_models_forward_that_decoding_has_no_use_for_are_refused():
    """GPT-2 adds token types to its embeddings: leaving them out would give another text."""
    ids, config = inputs_for("llama")["input_ids"], GenerationConfig(max_length=20)
    with pytest.raises(ValueError, match="token_type_ids is given, which is not used"):
        POLICY.custom_generate()(
            tiny("llama"), ids, [], StoppingCriteriaList(), config, token_type_ids=torch.ones_like(ids)
        )


def test_an_encoders_embeddings_and_outputs_are_used():
    model, inputs = tiny("t5"), inputs_for("t5", 2)
    expected = greedy(model, inputs, 6).tolist()
    options = {"max_new_tokens": 6, "do_sample": False, "custom_generate": NEVER.custom_generate()}
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    memory = model.get_encoder()(**inputs)
    assert model.generate(inputs_embeds=embedded, **options).tolist() == expected
    assert model.generate(encoder_outputs=memory, **options).tolist() == expected


def test_a_mask_of_the_decoders_prompt_is_used_or_refused():
    model, inputs = tiny("t5"), inputs_for("t5", 2)
    inputs["decoder_input_ids"] = torch.tensor([[0, 7, 8], [0, 9, 5]])
    inputs["decoder_attention_mask"] = torch.ones(2, 3, dtype=torch.long)
    options = {"max_new_tokens": 6, "do_sample": False, "custom_generate": NEVER.custom_generate()}
    assert model.generate(**inputs, **options).tolist() == greedy(model, inputs, 6).tolist()
    inputs["decoder_attention_mask"][1, 1] = 0
    with pytest.raises(ValueError, match="decoder_attention_mask leaves tokens of decoder_input_ids out"):
        model.generate(**inputs, **options)


def test_inputs_without_ids_are_refused():
    with pytest.raises(ValueError, match="the inputs hold inputs_embeds; give input_ids"):
        LanguageModel(tiny("t5")).generate({"inputs_embeds": torch.zeros(1, 3, 32)})

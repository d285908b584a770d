"""Text in, text out: prompts, padding, limits, and the messages for what cannot be done."""

import math

import pytest
import torch

from offramp import ExitPolicy, LanguageModel
from tiny import LAYERS, VOCABULARY, character_tokenizer, greedy, inputs_for, tiny, tokenizer


@pytest.fixture
def lm():
    return LanguageModel(tiny("llama"), tokenizer())


def test_texts_are_left_padded_and_continued(lm):
    prompts = ["why is the sky blue ?", "the sky"]
    out = lm.generate(prompts, policy=ExitPolicy(threshold=1.0), max_new_tokens=8)
    tokens = tokenizer()
    tokens.padding_side = "left"
    inputs = tokens(prompts, return_tensors="pt", padding=True)
    expected = greedy(tiny("llama"), {k: inputs[k] for k in ("input_ids", "attention_mask")}, 8)
    assert out.sequences.tolist() == expected.tolist()
    assert out.texts == [tokens.decode(row, skip_special_tokens=True) for row in expected[:, 6:]]
    assert [len(row) for row in out.exit_layers] == [len(row) for row in out.tokens]


def test_the_users_tokenizer_stays_as_it_was(lm):
    lm.tokenizer.padding_side, lm.tokenizer.pad_token = "right", None
    lm.generate(["the sky", "why is the sky"], max_new_tokens=2)
    assert (lm.tokenizer.padding_side, lm.tokenizer.pad_token) == ("right", None)


def test_one_text_ids_and_inputs_are_prompts_too(lm):
    text = lm.generate("why is the sky", max_new_tokens=5)
    ids = torch.tensor([[10, 8, 6, 7]])
    assert text.sequences.tolist() == lm.generate(ids, max_new_tokens=5).sequences.tolist()
    assert text.sequences.tolist() == lm.generate(ids[0], max_new_tokens=5).sequences.tolist()
    inputs = lm.tokenizer(["why is the sky"], return_tensors="pt")
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert text.sequences.tolist() == lm.generate(inputs, max_new_tokens=5).sequences.tolist()


def test_chats_go_through_the_template(lm):
    messages = [{"role": "user", "content": "why ?"}]
    expected = lm.generate("user why ? assistant", max_new_tokens=4).sequences.tolist()
    assert lm.generate([messages], max_new_tokens=4).sequences.tolist() == expected
    assert lm.generate(messages, max_new_tokens=4).sequences.tolist() == expected
    assert lm.generate("why ?", chat=True, max_new_tokens=4).sequences.tolist() == expected
    plain = LanguageModel(tiny("llama"), tokenizer(chat=False))
    with pytest.raises(ValueError, match="no chat template; give plain texts"):
        plain.generate([messages])


def test_streaming_gives_the_same_tokens_one_by_one(lm):
    policy = ExitPolicy(threshold=0.2, min_layer=1)
    out = lm.generate("why is the sky", policy=policy, max_new_tokens=9)
    stream = lm.stream("why is the sky", policy=policy, max_new_tokens=9)
    first = next(stream)
    assert stream.costs.tokens == 1  # nothing has run ahead
    assert [int(s.token) for s in (first, *stream)] == out.tokens[0]


def test_stop_strings():
    lm = LanguageModel(tiny("llama"), character_tokenizer())
    free = lm.generate("why is the sky", max_new_tokens=20)
    stop = free.texts[0][5:7]
    cut = free.texts[0][: free.texts[0].index(stop) + 2]
    for policy in (None, ExitPolicy(threshold=0.2, min_layer=1, skipped="verify", draft_length=4)):
        out = lm.generate("why is the sky", policy=policy, max_new_tokens=20, stop_strings=["never this", stop])
        assert out.texts[0] == cut


@pytest.mark.parametrize("skipped", ["propagate", "verify"])
def test_minimum_and_maximum_lengths(lm, skipped):
    policy = ExitPolicy(threshold=0.2, min_layer=1, skipped=skipped)
    for low, high in ((1, 3), (7, 7), (5, 12)):
        out = lm.generate(["the sky", "why ?"], policy=policy, min_new_tokens=low, max_new_tokens=high)
        assert all(low <= len(row) <= high for row in out.tokens)


def test_the_model_is_left_as_it_was(lm):
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    config = lm.model.config.to_dict()
    lm.generate("the sky", policy=ExitPolicy(threshold=0.2, min_layer=1), max_new_tokens=4)
    assert lm.model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())


def test_without_exits_nothing_is_tested(lm):
    out = lm.generate("the sky", max_new_tokens=4)
    assert out.costs.tests == 0
    assert set(out.exit_layers[0]) == {LAYERS}
    assert all(math.isnan(c) for c in out.confidences[0])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "the batch is empty; give at least one prompt"),
        ("", {}, "prompt 1 is empty"),
        (["the sky", "  "], {}, "prompt 2 is empty"),
        (torch.empty(1, 0, dtype=torch.long), {}, "the prompt is empty"),
        ({}, {}, "the prompt is empty"),
        (["the sky", [{"role": "user", "content": "why ?"}]], {}, "mixes texts and chats"),
        (["the sky", 5], {}, "a prompt is 5; give texts, chats, or token ids"),
        ("the sky", {"streamer": object()}, r"streamer is not supported here; iterate over stream"),
        ("the sky", {"output_scores": True}, "output_scores is True; this is not supported with early exits"),
        ("the sky", {"guidance_scale": 1.5}, "guidance_scale is 1.5; this is not supported with early exits"),
        ("the sky", {"max_new_tokens": 0}, "max_new_tokens is 0; ask for at least one"),
        ("sky " * 300, {}, r"prompt has 300 tokens.*context holds 256; shorten the prompt"),
        ("sky " * 250, {"max_new_tokens": 10}, r"250 tokens and 10 new.*holds 256; .*lower max_new_tokens"),
        ("the sky", {"num_beams": 4}, "num_beams is 4; early exit decodes one hypothesis per row"),
        ("the sky", {"policy": ExitPolicy(min_layer=4)}, "min_layer is 4; a model of 4 layers .* after layers 1..3"),
        (
            "the sky",
            {"policy": ExitPolicy(vocabulary="fixed", vocabulary_size=98)},
            f"vocabulary_size is 98; the model has {VOCABULARY} tokens",
        ),
    ],
)
def test_bad_input_is_named_with_what_is_allowed(lm, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(prompts, **options)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="without a tokenizer; give token ids"):
        LanguageModel(tiny("llama")).generate("the sky")
    with pytest.raises(ValueError, match="without a tokenizer, which stop_strings need"):
        LanguageModel(tiny("llama")).generate(torch.tensor([[5]]), stop_strings="x")


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_learned_positions_limit_the_output(name):
    with pytest.raises(ValueError, match=r"context holds 64; .* at most 63 new tokens"):
        LanguageModel(tiny(name)).generate(inputs_for(name), max_new_tokens=64)
    out = LanguageModel(tiny(name)).generate(inputs_for(name), max_new_tokens=63, min_new_tokens=63)
    assert len(out.tokens[0]) == 63


def test_the_right_padding_of_an_encoder(lm):
    t5 = LanguageModel(tiny("t5"), tokenizer(chat=False))
    out = t5.generate(["why is the sky blue ?", "the sky"], max_new_tokens=6)
    alone = t5.generate(["the sky"], max_new_tokens=6)
    assert out.tokens[1] == alone.tokens[0]

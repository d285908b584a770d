"""Text in, text out: prompts, padding, limits, and the messages for what cannot be done."""

import copy
import logging
import math

import numpy as np
import pytest
import torch

from offramp import ExitPolicy, LanguageModel
from offramp.evaluation.records import TaskArm, answer_options
from offramp.tasks import TASKS, Example
from tiny import LAYERS, VOCABULARY, character_tokenizer, greedy, inputs_for, tiny, tokenizer


@pytest.fixture
def lm():
    return LanguageModel(tiny("llama"), tokenizer(chat=False))


@pytest.fixture
def chatty():
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


def test_chats_go_through_the_template(chatty):
    """A text is a user's message where there is a template, as on the command line, unless the caller says no."""
    messages = [{"role": "user", "content": "why ?"}]
    expected = chatty.generate("user why ? assistant", chat=False, max_new_tokens=4).sequences.tolist()
    assert chatty.generate([messages], max_new_tokens=4).sequences.tolist() == expected
    assert chatty.generate(messages, max_new_tokens=4).sequences.tolist() == expected
    assert chatty.generate("why ?", max_new_tokens=4).sequences.tolist() == expected
    assert chatty.generate("why ?", chat=True, max_new_tokens=4).sequences.tolist() == expected
    mixed = chatty.generate(["why ?", messages], max_new_tokens=4).sequences.tolist()
    assert mixed == expected * 2
    plain = LanguageModel(tiny("llama"), tokenizer(chat=False))
    with pytest.raises(ValueError, match="no chat template; give plain texts"):
        plain.generate([messages])


@pytest.mark.parametrize(
    "ids",
    [[10, 8, 6, 7], (10, 8, 6, 7), [[10, 8, 6, 7]], np.array([10, 8, 6, 7]), np.array([[10, 8, 6, 7]], dtype=np.int32)],
    ids=repr,
)
def test_numbers_are_token_ids(lm, ids):
    want = lm.generate(torch.tensor([[10, 8, 6, 7]]), max_new_tokens=5).sequences.tolist()
    assert lm.generate(ids, max_new_tokens=5).sequences.tolist() == want


def test_rows_of_numbers_are_padded(lm):
    rows = [[10, 8, 6, 7], [6, 7]]
    assert lm.generate(rows, max_new_tokens=5).tokens == [lm.generate(row, max_new_tokens=5).tokens[0] for row in rows]
    t5 = LanguageModel(tiny("t5"))
    assert t5.generate(rows, max_new_tokens=5).tokens == [t5.generate(row, max_new_tokens=5).tokens[0] for row in rows]


def test_a_policy_may_be_the_name_of_its_file(lm, tmp_path):
    policy = ExitPolicy(threshold=0.2, min_layer=1)
    policy.save(tmp_path / "policy.json")
    want = lm.generate("why is the sky", policy=policy, max_new_tokens=9).exit_layers
    for given in (tmp_path / "policy.json", str(tmp_path / "policy.json")):
        assert lm.generate("why is the sky", policy=given, max_new_tokens=9).exit_layers == want
        steps = list(lm.stream("why is the sky", policy=given, max_new_tokens=9))
        assert [int(step.exit_layer) for step in steps] == want[0]


# ---------------------------------------------------------------- the model's own generation config


@pytest.fixture
def own():
    """A model whose generation config says something; tests may change it."""
    model = copy.deepcopy(tiny("llama"))
    return LanguageModel(model, tokenizer(chat=False)), model.generation_config


def lengths(lm, **options):
    return [len(row) for row in lm.generate(["the sky", "why is the sky"], **options).tokens]


def test_lengths_are_the_callers_else_the_configs_else_the_default(own):
    lm, config = own
    free = {"eos_token_id": -1}  # nothing ends a row early
    assert lengths(lm, **free) == [64, 64]
    assert lengths(lm, max_length=8, **free) == [4, 4]  # the prompts take four
    assert lengths(lm, max_new_tokens=3, **free) == [3, 3]
    config.max_length = 9
    assert lengths(lm, **free) == [5, 5]
    assert lengths(lm, max_new_tokens=3, **free) == [3, 3]
    config.max_length, config.max_new_tokens = None, 6
    assert lengths(lm, **free) == [6, 6]
    assert lengths(lm, max_new_tokens=3, **free) == [3, 3]


def test_what_the_config_says_stands_unless_the_caller_says_otherwise(own):
    lm, config = own
    greedily = lm.generate("why is the sky", max_new_tokens=9).tokens
    config.do_sample, config.temperature, config.top_k = True, 5.0, 0
    sampled = lm.generate("why is the sky", max_new_tokens=9, seed=1).tokens
    assert sampled != greedily
    assert sampled == lm.generate("why is the sky", max_new_tokens=9, seed=1, do_sample=True).tokens
    assert lm.generate("why is the sky", max_new_tokens=9, do_sample=False).tokens == greedily
    config.do_sample, config.repetition_penalty = False, 50.0
    assert len(set(lm.generate("why is the sky", max_new_tokens=9).tokens[0])) == 9
    assert lm.generate("why is the sky", max_new_tokens=9, repetition_penalty=1.0).tokens == greedily


@pytest.mark.parametrize(
    "options", [{}, {"max_new_tokens": 4}, {"max_length": 9}, {"do_sample": False}, {"top_p": 0.9}]
)
def test_no_warning_speaks_of_an_option_nobody_gave(own, options, capfd):
    lm, config = own
    config.max_length, config.temperature, config.top_p, config.min_length = 20, 0.7, 0.9, 1
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        lm.generate("the sky", **options)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert records == []
    assert capfd.readouterr().err == ""


def test_judged_answers_are_greedy_whatever_the_config_says(own):
    """Evaluations and certificates are about one answer to a prompt."""
    lm, config = own
    task = TASKS["prompts"]
    examples = [Example("0", "why is the sky", (), "why is the sky")]
    want = lm.generate(task.prompts(lm, examples), max_new_tokens=8).texts
    config.do_sample, config.temperature = True, 9.0
    (record,) = TaskArm(lm, "full", None, task, answer_options(task, 8, None)).answer(examples)
    assert [record.text] == want


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft itself
def test_adapters_of_peft_are_at_work(own):
    peft = pytest.importorskip("peft")
    lm, _ = own
    plain = lm.generate("why is the sky", max_new_tokens=9).tokens
    adapted = peft.get_peft_model(lm.model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    inside = LanguageModel(adapted, tokenizer(chat=False))
    inputs = {"input_ids": torch.tensor([[10, 8, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    theirs = adapted.generate(**inputs, max_new_tokens=9, do_sample=False)[:, 4:].tolist()
    assert inside.generate("why is the sky", max_new_tokens=9).tokens == theirs
    assert theirs != plain


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft itself
def test_prompt_tuning_of_peft_is_refused(own):
    peft = pytest.importorskip("peft")
    lm, _ = own
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"PROMPT_TUNING prepends tokens"):
        LanguageModel(peft.get_peft_model(lm.model, config))


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
        ("the sky", {"max_length": 0}, "max_length is 0; ask for at least one"),
        ("the sky", {"max_length": 2}, "max_length is 2, but the longest prompt has 2 tokens already"),
        ("the sky", {"max_length": 8, "max_new_tokens": 4}, "max_new_tokens is 4 and max_length is 8; give one"),
        ("the sky", {"temperature": 0.5, "do_sample": False}, "temperature is 0.5, but do_sample is False"),
        ("the sky", {"max_new_token": 4}, "unknown option 'max_new_token' .*did you mean 'max_new_tokens'"),
        ("the sky", {"policy": 0.9}, "the policy is a float; give an ExitPolicy, the file of one, or None"),
        ([[5, 6], []], {}, "the prompt is empty"),
        ([5, 97], {}, r"the token id 97; the model's are 0\.\.96"),
        (torch.tensor([0.5]), {}, "an array of torch.float32 .* give token ids"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": object()}, "assistant_model is an option of assisted decoding"),
        ({"num_assistant_tokens": 4}, "num_assistant_tokens is an option of assisted decoding"),
        ({"synced_gpus": True}, "synced_gpus has no effect with early exits"),
        ({"negative_prompt_ids": torch.tensor([[3]])}, "negative_prompt_ids is an option of guidance"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask is an input and no option; give it together with"),
        ({"position_ids": torch.ones(1, 3)}, "position_ids is an input"),
        ({"encoder_outputs": (torch.ones(1, 3, 4),)}, "encoder_outputs is an input"),
        ({"cache": object()}, "cache cannot be given: early exits keep keys and values of their own"),
        ({"past_key_values": object()}, "past_key_values cannot be given"),
        ({"length_penalty": 2.0}, "length_penalty is an option of beam search"),
        ({"cache_implementation": "paged"}, "cache_implementation is 'paged'"),
        ({"cache_implementation": "quantized"}, "cache_implementation is 'quantized'"),
        ({"generation_config": {"max_length": 8}}, "generation_config is a dict; give a transformers.GenerationConfig"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'; it must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True; it must be a whole number"),
        ({"max_length": 2.5}, "max_length is 2.5; it must be a whole number"),
        ({"seed": "a"}, "seed is 'a'; it must be a whole number"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "x"}, "temperature is 'x'; it must be a number"),
        ({"temperature": 0.0}, r"temperature is 0.0; .*\(0, inf\]"),
        ({"top_p": 7}, r"top_p is 7; .*\[0, 1\]"),
        ({"top_k": -1}, r"top_k is -1; .*\[0, inf\]"),
        ({"typical_p": 1.5}, "typical_p is 1.5"),
        ({"eta_cutoff": 2}, "eta_cutoff is 2"),
        ({"chat": "yes"}, "chat is 'yes'; allowed are True and False"),
    ],
)
def test_options_that_would_do_nothing_or_are_no_values_are_refused_by_name(lm, options, message):
    with pytest.raises(ValueError, match=message):
        lm.generate("the sky", **options)


def test_options_on_which_no_token_depends_are_taken(lm):
    plain = lm.generate("the sky", max_new_tokens=4).tokens
    assert lm.generate("the sky", max_new_tokens=4, use_cache=False, logits_to_keep=3, num_beams=1).tokens == plain
    assert lm.generate("the sky", max_new_tokens=np.int64(4), synced_gpus=False).tokens == plain


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

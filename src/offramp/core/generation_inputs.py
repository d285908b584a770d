"""What callers hand to a generation, as `transformers` takes it: prompts as token ids, and options by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from offramp.values import nearest, number, whole

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

Prompts = Any
"""What `LanguageModel.generate` continues: see there."""

Prompt = str | Sequence[dict[str, str]]
"""A text, or the messages of a chat ({"role": …, "content": …}), to which the tokenizer's chat template is applied."""
DEFAULT_NEW_TOKENS = 64
"""Most new tokens where neither the caller nor the model's generation config says how many."""
_LENGTHS = ("max_new_tokens", "max_length")
_RANGES = {
    "temperature": (0.0, math.inf, True), "top_k": (0.0, math.inf, False), "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, False), "typical_p": (0.0, 1.0, True), "epsilon_cutoff": (0.0, 1.0, False),
    "eta_cutoff": (0.0, 1.0, False),
}  # fmt: skip
"""Of options of sampling: lowest, highest, and whether the lowest is refused; `transformers` leaves some numbers beyond
unused without a word."""
SAMPLING = tuple(_RANGES)
_NOT_HERE = {
    **dict.fromkeys(
        ("attention_mask", "position_ids", "inputs_embeds", "encoder_outputs", "decoder_attention_mask",
         "token_type_ids"),
        "is an input and no option; give it together with input_ids, in one mapping",
    ),
    **dict.fromkeys(
        ("num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping", "low_memory"),
        "is an option of beam search, but early exit decodes one hypothesis per row; leave it away",
    ),
    **dict.fromkeys(
        ("assistant_model", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
         "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"),
        "is an option of assisted decoding; here the model's own early layers draft: skipped='verify'",
    ),
    **dict.fromkeys(
        ("cache", "past_key_values"), "cannot be given: early exits keep keys and values of their own; leave it away"
    ),
    **dict.fromkeys(
        ("negative_prompt_ids", "negative_prompt_attention_mask"),
        "is an option of guidance, which is not supported with early exits; leave it away",
    ),
    **dict.fromkeys(("synced_gpus", "use_model_defaults"), "has no effect with early exits; leave it away"),
    "streamer": "is not supported here; iterate over stream(...) instead",
}  # fmt: skip
"""What `transformers`' generate takes and decoding with exits would not use, and what to do instead."""
INDIFFERENT = ("use_cache", "logits_to_keep")  # how transformers' own loop works; no token depends on them
_WHOLE = {
    "max_new_tokens": 1, "max_length": 1, "min_new_tokens": 0, "min_length": 0, "num_return_sequences": 1,
    "seed": -(2**63),
}  # fmt: skip
"""Options that are whole numbers, and the smallest allowed."""


def token_ids(prompts: Any) -> list[list[int]] | None:
    """Token ids of each row, if prompts are numbers: one row or several, as a tensor, an array or lists; else None."""
    if isinstance(prompts, Tensor) or type(prompts).__module__ == "numpy":
        if prompts.ndim not in (1, 2) or "int" not in str(prompts.dtype):
            raise ValueError(
                f"the prompt is an array of {prompts.dtype} with shape {tuple(prompts.shape)}; give token ids, whole "
                "numbers [T] or [B, T], or a mapping with input_ids or input_features"
            )
        prompts = prompts.tolist()
    if not isinstance(prompts, list | tuple) or not prompts:
        return None
    rows = prompts if all(isinstance(row, list | tuple) for row in prompts) else [prompts]
    if not all(type(i) is int for row in rows for i in row):
        return None
    return [list(row) for row in rows]


def padded(ids: list[list[int]], vocabulary: int, *, right: bool) -> dict[str, Tensor]:
    """Rows of token ids as one batch, filled up on one side where they differ in length.

    Args:
        ids: B rows.
        vocabulary: V, which all ids are below.
        right: Whether rows are filled up on the right.

    Returns:
        `input_ids` and `attention_mask`, [B, T].

    Raises:
        ValueError: A row is empty, or an id is none of the model's.
    """
    if not all(ids):
        raise ValueError("the prompt is empty; give at least one token in every row")
    if strange := [i for row in ids for i in row if not 0 <= i < vocabulary]:
        raise ValueError(f"a prompt holds the token id {strange[0]}; the model's are 0..{vocabulary - 1}")
    rows, masks = [], []
    for row in ids:
        gap, ones = [0] * (max(map(len, ids)) - len(row)), [1] * len(row)
        rows.append(row + gap if right else gap + row)
        masks.append(ones + gap if right else gap + ones)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer knows how chats are written."""
    return getattr(tokenizer, "chat_template", None) is not None


def tokenised(prompts: Sequence[Any], tokenizer: Any, *, chat: bool, right: bool) -> dict[str, Tensor]:
    """Texts or chats as one batch.

    Args:
        prompts: Texts, or chats, or the messages of one chat.
        tokenizer: The model's; None: it has none.
        chat: Whether a text is a user's message.
        right: Whether rows are filled up on the right.

    Returns:
        `input_ids` and `attention_mask`, [B, T].

    Raises:
        ValueError: No prompt, an empty one, texts and chats in one batch, or no tokenizer.
    """
    texts = _texts(prompts, tokenizer, chat)
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    try:  # the tokenizer is the user's: leave it as it was
        tokenizer.padding_side = "right" if right else "left"
        if pad is None and len(texts) > 1:
            tokenizer.pad_token = tokenizer.eos_token
        templated = chat or not isinstance(prompts[0], str)  # a template brings its own special tokens
        batch = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, add_special_tokens=not templated)
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, pad
    if not batch["input_ids"].shape[1]:
        raise ValueError("the prompt has no tokens; give at least one")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _texts(prompts: Sequence[Any], tokenizer: Any, chat: bool) -> list[str]:
    """The texts of a batch of one kind, chat template applied."""
    if not prompts:
        raise ValueError("the batch is empty; give at least one prompt")
    if strange := [p for p in prompts if not isinstance(p, str | dict | list | tuple)]:
        raise ValueError(
            f"a prompt is {strange[0]!r}; give texts, chats, or token ids: whole numbers, a list of them for each row"
        )
    if isinstance(prompts[0], dict):
        prompts = [prompts]
    if not chat and len({isinstance(prompt, str) for prompt in prompts}) > 1:
        raise ValueError("the batch mixes texts and chats; give one kind, or chat=True to make texts chats")
    return [_text(prompt, index, tokenizer, chat) for index, prompt in enumerate(prompts)]


def _text(prompt: Prompt, index: int, tokenizer: Any, chat: bool) -> str:
    """The text of one prompt, chat template applied."""
    if tokenizer is None:
        raise ValueError("the model was loaded without a tokenizer; give token ids [B, T] instead of text")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"prompt {index + 1} is empty; give at least one word")
        if not chat:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if not has_template(tokenizer):
        raise ValueError("the tokenizer has no chat template; give plain texts")
    text: str = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    return text


class GenerationOptions(TypedDict, total=False):
    """Options of a generation; those left out are as the model's own generation config says.

    Attributes:
        max_new_tokens: Most new tokens per row; without it and `max_length`, and without either in the model's
            generation config, `DEFAULT_NEW_TOKENS`.
        max_length: Most tokens of a row, its prompt included (of an encoder-decoder: of the decoder's sequence).
        min_new_tokens: Fewest new tokens; likewise `min_length`.
        do_sample: Sample instead of taking the best; set by itself when an option of sampling is given.
        temperature: Of the samples; likewise `top_k`, `top_p`, `min_p`, `typical_p`, `epsilon_cutoff`, `eta_cutoff`.
        eos_token_id: What ends a row, one id or several; None: nothing does.
        seed: Makes samples repeatable.
        stop_strings: Texts behind which a row ends.
        generation_config: All other options in one object, as `transformers` takes it.
        decoder_input_ids: First tokens of the decoder, such as Whisper's language and task, [B, T].
    """

    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    encoder_repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: list[list[int]] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | list[int] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    sequence_bias: Any
    remove_invalid_values: bool | None
    renormalize_logits: bool | None
    watermarking_config: Any
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    decoder_start_token_id: int | None
    max_time: float | None
    num_beams: int | None
    num_return_sequences: int | None
    seed: int | None
    stop_strings: str | list[str] | None
    logits_processor: LogitsProcessorList | list[Callable[[Tensor, Tensor], Tensor]] | None
    stopping_criteria: StoppingCriteriaList | list[Callable[..., Any]] | None
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None
    generation_config: GenerationConfig | None
    decoder_input_ids: Tensor | None


def checked(options: Mapping[str, Any], own: GenerationConfig) -> dict[str, Any]:
    """The caller's options for `transformers`, those that are None left out, lengths and sampling settled.

    Args:
        options: The caller's.
        own: The model's generation config.

    Returns:
        A new mapping; with a length unless the model's own stands.

    Raises:
        ValueError: A name is unknown, or options contradict each other or are out of range.
    """
    known = GenerationOptions.__annotations__
    rarer = {*vars(own), *_NOT_HERE, *INDIFFERENT}  # those of a config are used, or refused where it is prepared
    if unknown := [name for name in options if name not in known and name not in rarer]:
        name = unknown[0]
        raise ValueError(f"unknown option {name!r} of a generation{nearest(name, [*known, *rarer])}")
    given = {name: value for name, value in options.items() if value is not None and name not in INDIFFERENT}
    if options.get("eos_token_id", 0) is None:  # said, not left out
        given["eos_token_id"] = None
    _check_values(given)
    config = given.get("generation_config", own)
    if given.get("max_new_tokens") is not None and "max_length" in given:
        raise ValueError(
            f"max_new_tokens is {given['max_new_tokens']} and max_length is {given['max_length']}; give one of them"
        )
    sampling = [name for name in SAMPLING if name in given]
    if given.get("do_sample", bool(sampling)) != bool(sampling) and sampling:
        raise ValueError(f"{sampling[0]} is {given[sampling[0]]}, but do_sample is False; leave one of them out")
    if sampling:
        given["do_sample"] = True
    if not any(name in given or getattr(config, name, None) is not None for name in _LENGTHS):
        given["max_new_tokens"] = DEFAULT_NEW_TOKENS
    return given


def _check_values(given: dict[str, Any]) -> None:
    """Refuse what would have no effect and values of the wrong kind; numbers become plain ones."""
    if not_here := [name for name in given if name in _NOT_HERE and given[name] is not False]:
        raise ValueError(f"{not_here[0]} {_NOT_HERE[not_here[0]]}")
    for name in _NOT_HERE:
        given.pop(name, None)
    for name, least in _WHOLE.items():
        if name in given:
            why = "ask for at least one token" if name in _LENGTHS else ""
            given[name] = whole(name, given[name], least, 2**63 - 1, why=why)
    for name, (low, high, above) in _RANGES.items():
        if name in given:
            given[name] = number(name, given[name], low, high, above=above)
    config = given.get("generation_config")
    if config is not None and not hasattr(config, "max_length"):
        raise ValueError(f"generation_config is a {type(config).__name__}; give a transformers.GenerationConfig")
    if (kind := given.get("cache_implementation")) in ("paged", "quantized"):  # before transformers makes it
        raise ValueError(f"cache_implementation is {kind!r}, which does without early exits; leave it away")


def greedy(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of who judges answers: the best token unless they ask for samples, whatever the model's config says."""
    return {**options} if any(name in options for name in (*SAMPLING, "do_sample")) else {**options, "do_sample": False}


def in_effect(given: Mapping[str, Any], own: GenerationConfig) -> dict[str, Any]:
    """Options with what a model's generation config adds to them that changes answers: a length, and samples."""
    found = dict(given)
    if not {"max_new_tokens", "max_length"} & set(found) and getattr(own, "max_length", None) is None:
        found["max_new_tokens"] = getattr(own, "max_new_tokens", None) or DEFAULT_NEW_TOKENS
    if greedy(found) != found and getattr(own, "do_sample", False):
        found["do_sample"] = True
    return found


def most_new_tokens(given: Mapping[str, Any], own: GenerationConfig, prompt: int) -> int:
    """How many new tokens checked options allow behind a prompt of so many; not above what fits `max_length`."""
    config = given.get("generation_config", own)
    for source in (given, vars(config)):
        if source.get("max_new_tokens") is not None:
            return int(source["max_new_tokens"])
        if source.get("max_length") is not None:
            return int(source["max_length"]) - prompt
    return DEFAULT_NEW_TOKENS

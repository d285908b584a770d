"""What callers may say about a generation: names, types, and what they come to for `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from offramp.values import nearest

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

DEFAULT_NEW_TOKENS = 64
"""Most new tokens where neither the caller nor the model's generation config says how many."""

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


_OF_GENERATE = (
    "streamer", "assistant_model", "synced_gpus", "negative_prompt_ids", "negative_prompt_attention_mask",
    "attention_mask", "position_ids", "inputs_embeds", "encoder_outputs", "decoder_attention_mask", "token_type_ids",
    "cache", "past_key_values", "use_cache", "logits_to_keep", "use_model_defaults",
)  # fmt: skip
"""What `transformers`' generate takes besides the options of a generation config."""


class GenerationOptions(TypedDict, total=False):
    """Options of a generation; those left out are as the model's own generation config says.

    Attributes:
        max_new_tokens: Most new tokens per row; without it and `max_length`, and without either in the model's
            generation config, `DEFAULT_NEW_TOKENS`.
        max_length: Most tokens of a row, its prompt included (of an encoder-decoder: of the decoder's sequence).
        min_new_tokens: Fewest new tokens; likewise `min_length`.
        do_sample: Sample instead of taking the best; set by itself when an option of sampling is given.
        temperature: Of the samples; likewise `top_k`, `top_p`, `min_p`, `typical_p`, `epsilon_cutoff`, `eta_cutoff`.
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
    rarer = {*vars(own), *_OF_GENERATE}  # used, or refused by name where a generation is prepared
    if unknown := [name for name in options if name not in known and name not in rarer]:
        name = unknown[0]
        raise ValueError(f"unknown option {name!r} of a generation{nearest(name, [*known, *rarer])}")
    if options.get("streamer") is not None:
        raise ValueError("streamer is not supported here; iterate over stream(...) instead")
    given = {name: value for name, value in options.items() if value is not None}
    config = given.get("generation_config", own)
    if given.get("max_new_tokens") is not None and "max_length" in given:
        raise ValueError(
            f"max_new_tokens is {given['max_new_tokens']} and max_length is {given['max_length']}; give one of them"
        )
    for name in ("max_new_tokens", "max_length"):
        if given.get(name, 1) < 1:
            raise ValueError(f"{name} is {given[name]}; ask for at least one token")
    sampling = [name for name in _SAMPLING if name in given]
    if given.get("do_sample", bool(sampling)) != bool(sampling) and sampling:
        raise ValueError(f"{sampling[0]} is {given[sampling[0]]}, but do_sample is False; leave one of them out")
    if sampling:
        given["do_sample"] = True
    lengths = ("max_new_tokens", "max_length")
    if not any(name in given or getattr(config, name, None) is not None for name in lengths):
        given["max_new_tokens"] = DEFAULT_NEW_TOKENS
    return given


def greedy(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of who judges answers: the best token unless they ask for samples, whatever the model's config says."""
    return (
        {**options} if any(name in options for name in (*_SAMPLING, "do_sample")) else {**options, "do_sample": False}
    )


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

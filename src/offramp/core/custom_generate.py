"""The bridge to `transformers`' `generate`: it prepares processors, stopping and inputs, we decode.

`model.generate(..., custom_generate=policy.custom_generate())` ends here, and so does `LanguageModel.generate`, which
lets `transformers` prepare everything (one source for what `top_p` or `min_new_tokens` mean) and takes over from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList
from transformers.utils import ModelOutput

from offramp.core.adaptive_threshold import AdaptiveThreshold
from offramp.core.batch import Step
from offramp.core.costs import Costs, Ledger
from offramp.core.decoding import decode
from offramp.core.generation_inputs import INDIFFERENT
from offramp.core.policy import ExitPolicy
from offramp.core.sampling import Sampler, ends_of
from offramp.families import SplitModel

if TYPE_CHECKING:
    from offramp.core.exits import Exits


@dataclass
class EarlyExitOutput(ModelOutput):  # type: ignore[misc]
    """What `generate(..., return_dict_in_generate=True)` returns with a policy's `custom_generate`.

    Attributes:
        sequences: Prompt and continuation, [B, T].
        exit_layers: Layer of each generated token, [B, N]; 0 behind a row's end.
        confidences: Confidence of the last test of each, [B, N]; NaN where none was made.
        costs: The bill.
    """

    sequences: Tensor | None = None
    exit_layers: Tensor | None = None
    confidences: Tensor | None = None
    costs: Costs | None = None


@dataclass
class Prepared:
    """What `transformers`' `generate` hands to a decoding method, with our model."""

    model: SplitModel
    ids: Tensor
    sampler: Sampler
    max_new_tokens: int
    mask: Tensor | None = None
    positions: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None

    def steps(
        self, policy: ExitPolicy | None, ledger: Ledger, adaptive: AdaptiveThreshold | None = None
    ) -> Iterator[Step]:
        """Decode."""
        return decode(
            self.model, self.ids, policy, max_new_tokens=self.max_new_tokens, sampler=self.sampler, mask=self.mask,
            positions=self.positions, memory=self.memory, memory_mask=self.memory_mask, ledger=ledger,
            adaptive=adaptive,
        )  # fmt: skip


def prepare(
    model: SplitModel,
    ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> Prepared:
    """Take over from `transformers`' `generate`.

    Returns:
        What is needed to decode.

    Raises:
        ValueError: Something asked for is not supported: beams, another decoding method, scores or states of every
            step, a filled cache, embeddings instead of ids, any other input that decoding would not use, or more tokens
            than the model has positions for.
    """
    _refuse(generation_config)
    _refuse_inputs(kwargs)
    ends = ends_of(generation_config)
    pad = generation_config.pad_token_id
    pad = pad if isinstance(pad, int) and pad >= 0 else ends[0] if ends else 0
    sampler = Sampler(
        processors=logits_processor if len(logits_processor) else None,
        stopping=_stopping(stopping_criteria, int(generation_config.max_length), ends),
        sample=bool(generation_config.do_sample),
        generator=generator,
        eos=ends,
        pad=pad,
    )
    limit = int(generation_config.max_length) - ids.shape[1]
    mask = kwargs.get("attention_mask")
    if mask is not None and not model.is_encoder_decoder:
        _check_mask("attention_mask", mask, ids)
    positions = _positions(kwargs.get("position_ids"), ids)
    _check_room(ids, positions, limit, model.max_positions)
    if model.is_encoder_decoder:
        memory = kwargs["encoder_outputs"][0]
        if mask is not None and model.name != "whisper":  # Whisper attends to all of its padded input
            _check_mask("attention_mask", mask, memory)
        if (decoder_mask := kwargs.get("decoder_attention_mask")) is not None:
            _check_mask("decoder_attention_mask", decoder_mask, ids)
            if not bool(decoder_mask.all()):
                raise ValueError(
                    "decoder_attention_mask leaves tokens of decoder_input_ids out, which is not supported with early "
                    "exits; give rows of equal length, or one at a time"
                )
        return Prepared(model, ids, sampler, limit, memory=memory, memory_mask=mask)
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError("a prompt is padded on the right; pad decoder-only models on the left (padding_side='left')")
    return Prepared(model, ids, sampler, limit, mask=mask, positions=positions)


def _stopping(criteria: Any, longest: int, ends: tuple[int, ...]) -> Callable[[Tensor], Tensor] | None:
    """The criteria besides the length and the ends of sequences that decoding sees to itself; None: there are none."""

    def known(criterion: Any) -> bool:
        if type(criterion) is MaxLengthCriteria:
            return bool(criterion.max_length >= longest)
        return type(criterion) is EosTokenCriteria and set(criterion.eos_token_id.tolist()) <= set(ends)

    others = StoppingCriteriaList(criterion for criterion in criteria if not known(criterion))
    return (lambda so_far: others(so_far, None)) if others else None


def _positions(given: Tensor | None, ids: Tensor) -> Tensor | None:
    """Positions of a prompt's tokens, the caller's or those that `transformers` counts from the mask, [B, T]."""
    if given is None:
        return None
    for_each = given.ndim == 2 and given.shape[1] == ids.shape[1] and len(given) in (1, len(ids))
    if not for_each or given.is_floating_point():
        raise ValueError(
            f"position_ids (or the attention_mask that they are counted from) are {given.dtype} of the shape "
            f"{list(given.shape)}; give a whole number for each token of the prompts, {list(ids.shape)}, or none"
        )
    if bool((given < 0).any()):
        raise ValueError(f"position_ids hold {int(given.min())}; positions count from 0")
    return given.to(ids.device).long().expand(ids.shape)


def _check_mask(name: str, mask: Tensor, tokens: Tensor) -> None:
    """Raise a ValueError unless a mask is for these tokens, [B, T, ...]."""
    if mask.shape != tokens.shape[:2]:
        raise ValueError(f"{name} has the shape {list(mask.shape)}; its tokens have {list(tokens.shape[:2])}")


def _check_room(ids: Tensor, positions: Tensor | None, limit: int, room: int | None) -> None:
    """Raise a ValueError if the model has no positions for a prompt [B, T] and `limit` tokens behind it."""
    end = ids.shape[1] if positions is None else max(ids.shape[1], int(positions.max()) + 1)
    if room is None or end + limit <= room:
        return
    what = f"the prompt has {end} tokens" if end == ids.shape[1] else f"the prompt's position_ids go to {end - 1}"
    raise ValueError(
        f"{what} and {limit} new ones are asked for, but the model's context holds {room}; shorten the prompt or ask "
        f"for at most {max(room - end, 0)} new tokens"
    )


_UNSUPPORTED = (
    "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "guidance_scale", "constraints", "force_words_ids",
    "assistant_early_exit", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
    "prefill_chunk_size", "compile_config",
)  # fmt: skip
_OTHER_CACHES = ("quantized", "offloaded", "offloaded_static")  # all others hold the same keys and values
_TAKEN = ("attention_mask", "position_ids", "inputs_embeds", "encoder_outputs", "decoder_attention_mask")
_CACHES = ("cache", "past_key_values")  # since transformers 5.24, and until then


def _refuse(config: GenerationConfig) -> None:
    """Say so if something is asked for that decoding with exits does not do."""
    if config.num_beams not in (None, 1):
        raise ValueError(
            f"num_beams is {config.num_beams}; early exit decodes one hypothesis per row: "
            "use num_beams=1 (greedy) or do_sample=True"
        )
    for name in _UNSUPPORTED:
        value = getattr(config, name, None)
        if value and not (name == "guidance_scale" and value == 1):
            raise ValueError(f"{name} is {value}; this is not supported with early exits, leave it away")
    if config.cache_implementation in _OTHER_CACHES:
        raise ValueError(
            f"cache_implementation is {config.cache_implementation!r}, but early exits keep keys and values as they "
            "are, beside the model; leave it away"
        )


def _refuse_inputs(kwargs: dict[str, Any]) -> None:
    """Say so if there is an input that decoding with exits would silently not use."""
    for name in _CACHES:
        cache = kwargs.get(name)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(f"a filled {name} cannot be continued with early exits; pass the whole prompt instead")
    if kwargs.get("inputs_embeds") is not None and kwargs.get("encoder_outputs") is None:
        raise ValueError("inputs_embeds are not supported with early exits; pass input_ids")
    for name, value in kwargs.items():
        if name not in (*_TAKEN, *INDIFFERENT, *_CACHES) and value is not None and value is not False:
            raise ValueError(f"{name} is given, which is not used with early exits; leave it away")


class CustomGenerate:
    """A decoding method for `transformers`' `generate`; see `ExitPolicy.custom_generate`.

    For all supported decoder-only families and T5 (BART's works as well; Whisper's `generate` is its own).

    Args:
        policy: The exit policy.
        exits: Exits trained for the model.

    Attributes:
        adaptive: What an adaptive policy has learnt in all calls of this object; None for any other policy.
    """

    def __init__(self, policy: ExitPolicy, exits: Exits | None = None) -> None:
        self.policy, self.exits = policy, exits
        self.adaptive = AdaptiveThreshold.of(policy) if policy.adaptive else None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        exit_streamer: Any = None,
        **kwargs: Any,
    ) -> Tensor | EarlyExitOutput:
        """Called by `generate`; `exit_streamer=` receives the prompt and every token as `streamer=` would.

        (`transformers` keeps `streamer=`, `assistant_model=` and `synced_gpus=` from custom methods: they do nothing
        here. It does forward names that they define themselves.)

        Returns:
            Sequences [B, T], or an `EarlyExitOutput` with `return_dict_in_generate=True`.
        """
        split = SplitModel(model)
        split.exits = self.exits
        ledger = Ledger(split.shape, input_ids.device)
        prepared = prepare(split, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        steps: list[Step] = []
        if exit_streamer is not None:
            exit_streamer.put(input_ids.cpu())
        for step in prepared.steps(self.policy, ledger, self.adaptive):
            steps.append(step)
            if exit_streamer is not None:
                exit_streamer.put(step.token.cpu())
        if exit_streamer is not None:
            exit_streamer.end()
        sequences = torch.cat([input_ids, *(step.token[:, None] for step in steps)], dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        layers = torch.stack([step.exit_layer for step in steps], dim=1)
        confidences = torch.stack([step.confidence for step in steps], dim=1)
        return EarlyExitOutput(sequences, layers, confidences, ledger.settle())

"""The bridge to `transformers`' `generate`: it prepares processors, stopping and inputs, we decode.

`model.generate(..., custom_generate=policy.custom_generate())` ends here, and so does `LanguageModel.generate`, which
lets `transformers` prepare everything (one source for what `top_p` or `min_new_tokens` mean) and takes over from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from offramp.adaptive_threshold import AdaptiveThreshold
from offramp.choosing import Choosing
from offramp.costs import Costs, Ledger
from offramp.decoding import Step, decode
from offramp.families import SplitModel
from offramp.policy import ExitPolicy

if TYPE_CHECKING:
    from offramp.exits import Exits


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
    choosing: Choosing
    max_new_tokens: int
    mask: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None

    def steps(
        self, policy: ExitPolicy | None, ledger: Ledger, adaptive: AdaptiveThreshold | None = None
    ) -> Iterator[Step]:
        """Decode."""
        return decode(
            self.model, self.ids, policy, max_new_tokens=self.max_new_tokens, choosing=self.choosing, mask=self.mask,
            memory=self.memory, memory_mask=self.memory_mask, ledger=ledger, adaptive=adaptive,
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
            step, a filled cache, embeddings instead of ids, or more tokens than the model has positions for.
    """
    _refuse(generation_config, kwargs)
    eos = generation_config.eos_token_id
    ends = tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)
    pad = generation_config.pad_token_id
    pad = pad if isinstance(pad, int) and pad >= 0 else ends[0] if ends else 0
    choosing = Choosing(
        processors=logits_processor if len(logits_processor) else None,
        stopping=lambda so_far: stopping_criteria(so_far, None),
        sample=bool(generation_config.do_sample),
        generator=generator,
        eos=ends,
        pad=pad,
    )
    limit = int(generation_config.max_length) - ids.shape[1]
    positions = model.max_positions
    if positions is not None and ids.shape[1] + limit > positions:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens and {limit} new ones are asked for, but the model's context holds "
            f"{positions}; shorten the prompt or ask for at most {max(positions - ids.shape[1], 0)} new tokens"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and not model.is_encoder_decoder and not bool(mask[:, -1].all()):
        raise ValueError("a prompt is padded on the right; pad decoder-only models on the left (padding_side='left')")
    if not model.is_encoder_decoder:
        return Prepared(model, ids, choosing, limit, mask=mask)
    memory = kwargs["encoder_outputs"].last_hidden_state
    return Prepared(model, ids, choosing, limit, memory=memory, memory_mask=mask)


_UNSUPPORTED = (
    "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "guidance_scale", "constraints", "force_words_ids",
    "assistant_early_exit", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
)  # fmt: skip


def _refuse(config: GenerationConfig, kwargs: dict[str, Any]) -> None:
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
    for name in ("cache", "past_key_values"):  # since transformers 5.24, and until then
        cache = kwargs.get(name)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(f"a filled {name} cannot be continued with early exits; pass the whole prompt instead")
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds are not supported with early exits; pass input_ids")


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

        (`transformers` keeps `streamer=` from custom methods, but does forward names they define themselves.)

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

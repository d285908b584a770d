"""Why a model is refused: what about its architecture has no counterpart here, found by looking at it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from offramp.families.table import FAMILIES, Family

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Kinds of layers that can be run apart and filled later."""
_GIVEN = {
    "hidden_states", "attention_mask", "position_ids", "position_embeddings", "past_key_values", "cache", "layer_past",
    "encoder_hidden_states", "encoder_attention_mask", "use_cache", "output_attentions", "kwargs", "args",
}  # fmt: skip
_LLAMA = Family()


class UnsupportedModelError(ValueError):
    """The architecture has no tested family here; the message says what is missing, and names those that have one."""


def supported() -> str:
    """The names of all families, by kind."""
    both = sorted(name for name, family in FAMILIES.items() if family.cross is not None)
    return (
        f"supported are {', '.join(sorted(set(FAMILIES) - set(both)))} (decoder-only) and {', '.join(both)} "
        "(encoder-decoder)"
    )


def without_a_family(model: PreTrainedModel) -> UnsupportedModelError:
    """The error for a model whose type is not in the table."""
    return UnsupportedModelError(
        f"{type(model).__name__} (model type {model.config.model_type!r}) is not supported: {_reason(model)}; "
        f"{supported()}"
    )


def strange_types(config: Any) -> list[str]:
    """Kinds of a decoder's layers whose keys and values cannot be filled later."""
    found = set(get_layer_types_and_kwargs(config)[0]) - set(LAYER_TYPES)
    return sorted(
        found | ({"bidirectional attention"} if getattr(config, "use_bidirectional_attention", False) else set())
    )


def layers_of(types: list[str]) -> str:
    """Says what is wrong with layers of some types."""
    return (
        f"it has layers of type {', '.join(types)}, which see or keep something else than keys and values of earlier "
        "tokens; only those of full and sliding-window causal attention can be filled in later"
    )


def _reason(model: PreTrainedModel) -> str:
    """What is missing, the first thing that is."""
    config = model.config
    text = config.get_text_config(decoder=True)
    if text is not config and text.model_type != config.model_type:
        known = "is supported" if text.model_type in FAMILIES else "is not supported either"
        return f"it takes more than text; its text part is of type {text.model_type!r}, which alone {known}"
    if not model.can_generate():
        return "it does not generate text; load a ...ForCausalLM or ...ForConditionalGeneration"
    if types := strange_types(text):
        return layers_of(types)
    if getattr(model, "_is_stateful", False):
        return "it is recurrent: it keeps a state instead of keys and values, which cannot be filled in later"
    return f"no row of the table describes it yet ({_parts(model)})"


def _parts(model: PreTrainedModel) -> str:
    """Where the blocks are, and what is not where most families have it."""
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        return "no list of blocks was found in it"
    path, blocks = max(lists, key=lambda each: sum(p.numel() for p in each[1].parameters()))
    block: Any = blocks[0]
    asks = [name for name in inspect.signature(block.forward).parameters if name not in _GIVEN]
    decoder = model.get_submodule(path.rpartition(".")[0])
    usual = {
        f"{_LLAMA.decoder}.{_LLAMA.layers}": path == f"{_LLAMA.decoder}.{_LLAMA.layers}",
        f"final norm called {_LLAMA.norm}": hasattr(decoder, str(_LLAMA.norm)),
        _LLAMA.head: hasattr(model, _LLAMA.head),
        "self_attn.k_proj in a block": hasattr(getattr(block, "self_attn", None), "k_proj"),
    }
    lacking = [name for name, there in usual.items() if not there]
    found = f"its blocks are {type(block).__name__} at {path}" + (f", which ask for {', '.join(asks)}" if asks else "")
    if lacking:
        return f"{found}; it has no {', no '.join(lacking)}, as most families have"
    return f"{found}; its parts are where most families have them, so that a plain row may do"

"""What differs between architectures: where their parts are, and the few computations that have no common interface.

A model without a row in the table is refused; what its architecture has no counterpart for is found by looking at it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.pytorch_utils import Conv1D

# ---------------------------------------------------------------- keys and values of a skipped block

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Kinds of layers that can be run apart and filled later."""
_GIVEN = {
    "hidden_states", "attention_mask", "position_ids", "position_embeddings", "past_key_values", "cache", "layer_past",
    "encoder_hidden_states", "encoder_attention_mask", "use_cache", "output_attentions", "kwargs", "args",
}  # fmt: skip


def _split_heads(x: Tensor, width: int) -> Tensor:
    """[N, n, H * width] -> [N, H, n, width]."""
    return x.view(*x.shape[:-1], -1, width).transpose(1, 2)


def _rotary_keys_values(layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys and values of a block whose `self_attn` projects, may normalise and may rotate."""
    attention, x = layer.self_attn, hidden
    if hasattr(layer, "input_layernorm"):  # OLMo 2 and 3 and EXAONE 4 normalise after attention instead
        x = layer.input_layernorm(hidden)
    if hasattr(attention, "qkv_proj"):  # Phi-3
        width, fused = attention.num_key_value_heads * attention.head_dim, attention.qkv_proj
        plain = type(fused) is nn.Linear  # an adapter or a quantised layer is more than its weight
        both = F.linear(x, fused.weight[-2 * width :]) if plain else fused(x)[..., -2 * width :]
        keys, values = both[..., :width], both[..., width:]
    else:
        keys, values = attention.k_proj(x), attention.v_proj(x)
    norm = getattr(attention, "k_norm", None) or getattr(attention, "k_layernorm", None)
    if norm is not None and norm.weight.shape == keys.shape[-1:]:  # over all heads at once (OLMo 2, OLMoE)
        keys, norm = norm(keys), None
    if (clip := getattr(attention.config, "clip_qkv", None)) is not None:  # OLMo, OLMoE
        keys, values = keys.clamp(-clip, clip), values.clamp(-clip, clip)
    if norm is not None:  # over each head (Qwen3, Gemma 3), maybe with weights of its own (Cohere)
        keys = norm(keys.unflatten(-1, (-1, attention.head_dim))).flatten(-2)
    keys, values = _split_heads(keys, attention.head_dim), _split_heads(values, attention.head_dim)
    return _rotated(attention, keys, rope), values


def _rotated(attention: Any, keys: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Keys [N, H, n, D_head] at their positions, rotated as the model's own code does it, all of a head or a part."""
    if rope is None:
        return keys
    width = getattr(attention, "rotary_ndims", keys.shape[-1])  # Phi, GPT-NeoX
    turned = keys[..., :width]
    turned = sys.modules[type(attention).__module__].apply_rotary_pos_emb(turned, turned, *rope)[1]
    return turned if width == keys.shape[-1] else torch.cat((turned, keys[..., width:]), dim=-1)


def _neox_keys_values(layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Query, key and value of a head lie together in the fused projection."""
    attention, x = layer.attention, layer.input_layernorm(hidden)
    fused, width = attention.query_key_value, attention.head_size
    if type(fused) is nn.Linear:
        weight = fused.weight.view(-1, 3 * width, x.shape[-1])[:, width:]  # [H, 2 * width, D]
        both = x.flatten(0, -2) @ weight.mT  # [H, N * n, 2 * width]
        if fused.bias is not None:
            both = both + fused.bias.view(-1, 1, 3 * width)[..., width:]
        both = both.view(-1, *x.shape[:-1], 2 * width).transpose(0, 1)  # [N, H, n, 2 * width]
    else:
        both = _split_heads(fused(x), 3 * width)[..., width:]
    keys, values = both.chunk(2, dim=-1)
    return _rotated(attention, keys, rope), values


def _gpt2_keys_values(layer: Any, hidden: Tensor, rope: None) -> tuple[Tensor, Tensor]:
    attention, x = layer.attn, layer.ln_1(hidden)
    fused, width = attention.c_attn, attention.split_size
    if type(fused) is Conv1D:  # as a linear layer, its weight transposed
        both = x @ fused.weight[:, width:] + fused.bias[width:]
    else:
        both = fused(x)[..., width:]
    keys, values = both.chunk(2, dim=-1)
    return _split_heads(keys, attention.head_dim), _split_heads(values, attention.head_dim)


def _t5_keys_values(layer: Any, hidden: Tensor, rope: None) -> tuple[Tensor, Tensor]:
    sub = layer.layer[0]
    x, width = sub.layer_norm(hidden), sub.SelfAttention.key_value_proj_dim
    return _split_heads(sub.SelfAttention.k(x), width), _split_heads(sub.SelfAttention.v(x), width)


def _opt_keys_values(layer: Any, hidden: Tensor, rope: None) -> tuple[Tensor, Tensor]:
    behind = not layer.do_layer_norm_before  # OPT-350m
    return _projected(layer.self_attn, hidden if behind else layer.self_attn_layer_norm(hidden))


def _projected(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return _split_heads(attention.k_proj(x), attention.head_dim), _split_heads(attention.v_proj(x), attention.head_dim)


def _t5_cross(layer: Any, memory: Tensor) -> tuple[Tensor, Tensor]:
    attention = layer.layer[1].EncDecAttention
    width = attention.key_value_proj_dim
    return _split_heads(attention.k(memory), width), _split_heads(attention.v(memory), width)


# ---------------------------------------------------------------- before the first block, and behind the head


def _embed_opt(decoder: Any, ids: Tensor, positions: Tensor) -> Tensor:
    embedded = decoder.embed_tokens(ids)
    if decoder.project_in is not None:  # OPT-350m embeds in half the width
        embedded = decoder.project_in(embedded)
    return embedded + decoder.embed_positions(None, position_ids=positions)  # type: ignore[no-any-return]


def _embed_bart(decoder: Any, ids: Tensor, positions: Tensor) -> Tensor:
    embedded = decoder.embed_tokens(ids)
    return decoder.layernorm_embedding(embedded + decoder.embed_positions(ids, 0, position_ids=positions[0]))  # type: ignore[no-any-return]


def _capped(config: Any, logits: Tensor) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


# ---------------------------------------------------------------- the families


@dataclass(frozen=True)
class Family:
    """What differs between architectures, by attribute paths and functions.

    Attributes:
        decoder: Path from the model to its decoder.
        layers: Name of the block list in the decoder.
        norm: Name of the final norm in the decoder, which may be missing (OPT-350m); None where there is none (BART).
        head: Path from the model to the head.
        keys_values: (block, states [N, n, D], rotation or None) -> keys and values [N, H, n, D_head].
        rotates: (block) -> whether it rotates keys, where the model has rotary positions.
        embed: (decoder, ids [A, n], positions [A, n]) -> states entering the first block.
        scale: (config) -> what the normed states are multiplied with before the head; None: with nothing.
        dropout: Name of a dropout in the decoder between norm and head, for training.
        squeeze: Name of a linear layer in the decoder between norm and head, which only some sizes have (OPT-350m).
        logits_bias: Name of a bias of the logits [1, V] in the model, beside that of the head.
        logits: (config, products of the head [..., K]) -> logits, the same for each token.
        cross: (block, memory) -> cross-attention keys and values; None for a decoder-only model.
        position_bias: Path from the first block to the attention that owns the relative position bias of all (T5).
        listens: Whether the encoder takes sound, which is padded to one length, so that all of it is attended to.
    """

    decoder: str = "model"
    layers: str = "layers"
    norm: str | None = "norm"
    head: str = "lm_head"
    keys_values: Callable[[Any, Tensor, Any], tuple[Tensor, Tensor]] = _rotary_keys_values
    rotates: Callable[[Any], bool] = lambda block: True
    embed: Callable[[Any, Tensor, Tensor], Tensor] = lambda decoder, ids, positions: decoder.embed_tokens(ids)
    scale: Callable[[Any], float | None] = lambda config: None
    dropout: str | None = None
    squeeze: str | None = None
    logits_bias: str | None = None
    logits: Callable[[Any, Tensor], Tensor] = lambda config, logits: logits
    cross: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None
    position_bias: str | None = None
    listens: bool = False


_GRANITE = Family(
    embed=lambda decoder, ids, positions: decoder.embed_tokens(ids) * decoder.embedding_multiplier,
    logits=lambda config, logits: logits / config.logits_scaling,
)
_COHERE = Family(logits=lambda config, logits: logits * config.logit_scale)
_MT5 = Family(
    "decoder", "block", "final_layer_norm", keys_values=_t5_keys_values, dropout="dropout", cross=_t5_cross,
    position_bias="layer.0.SelfAttention",
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, rotates=lambda block: block.self_attn.sliding_window is not None),
    "ernie4_5": Family(),
    "exaone4": Family(  # windows alone, where there are any
        rotates=lambda block: block.self_attn.sliding_window is None or block.self_attn.is_sliding
    ),
    "gemma": Family(),
    "gemma2": Family(logits=_capped),
    "gemma3_text": Family(logits=_capped),
    "glm": Family(),
    "glm4": Family(),
    "gpt2": Family(
        "transformer", "h", "ln_f", keys_values=_gpt2_keys_values,
        embed=lambda decoder, ids, positions: decoder.wte(ids) + decoder.wpe(positions),
    ),
    "gpt_neox": Family(
        "gpt_neox", norm="final_layer_norm", keys_values=_neox_keys_values,
        embed=lambda decoder, ids, positions: decoder.embed_in(ids),
    ),
    "gpt_oss": Family(),
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "llama": Family(),
    "ministral": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "nemotron": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(),
    "olmoe": Family(),
    "opt": Family(
        "model.decoder", norm="final_layer_norm", keys_values=_opt_keys_values, embed=_embed_opt, squeeze="project_out"
    ),
    "phi": Family(norm="final_layernorm"),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen2_moe": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "seed_oss": Family(),
    "smollm3": Family(rotates=lambda block: bool(block.self_attn.use_rope)),
    "starcoder2": Family(),
    # encoder-decoders
    "bart": Family(
        "model.decoder", norm=None, embed=_embed_bart, logits_bias="final_logits_bias",
        keys_values=lambda block, hidden, rope: _projected(block.self_attn, hidden),
        cross=lambda block, memory: _projected(block.encoder_attn, memory),
    ),
    "mt5": _MT5,
    "t5": replace(_MT5, scale=lambda config: config.d_model**-0.5 if config.scale_decoder_outputs else None),
    "whisper": Family(
        "model.decoder", norm="layer_norm", head="proj_out", listens=True,
        embed=lambda decoder, ids, positions: (
            decoder.embed_tokens(ids) + decoder.embed_positions(ids, position_ids=positions)
        ),
        keys_values=lambda block, hidden, rope: _projected(block.self_attn, block.self_attn_layer_norm(hidden)),
        cross=lambda block, memory: _projected(block.encoder_attn, memory),
    ),
}  # fmt: skip
"""Supported values of `config.model_type`."""


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

"""What differs between architectures: where their parts are, and the few computations that have no common interface.

A family that is not in the table is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

# ---------------------------------------------------------------- keys and values of a skipped block


def _split_heads(x: Tensor, width: int) -> Tensor:
    """[N, n, H * width] -> [N, H, n, width]."""
    return x.view(*x.shape[:-1], -1, width).transpose(1, 2)


def _rotary_keys_values(layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of a decoder-only block, [N, n, D] -> two of [N, H, n, D_head]."""
    attention, x = layer.self_attn, hidden
    if hasattr(layer, "input_layernorm"):  # OLMo 2 normalises after attention instead
        x = layer.input_layernorm(hidden)
    if hasattr(attention, "qkv_proj"):  # Phi-3
        width, fused = attention.num_key_value_heads * attention.head_dim, attention.qkv_proj
        plain = type(fused) is nn.Linear  # an adapter or a quantised layer is more than its weight
        both = F.linear(x, fused.weight[-2 * width :]) if plain else fused(x)[..., -2 * width :]
        keys, values = both[..., :width], both[..., width:]
    else:
        keys, values = attention.k_proj(x), attention.v_proj(x)
    norm = getattr(attention, "k_norm", None)  # over a head (Qwen3, Gemma 3) or over all heads (OLMo 2)
    if norm is not None and norm.weight.shape[0] == keys.shape[-1]:
        keys, norm = norm(keys), None
    keys, values = _split_heads(keys, attention.head_dim), _split_heads(values, attention.head_dim)
    if norm is not None:
        keys = norm(keys)
    if getattr(attention, "use_rope", True):  # SmolLM3 leaves every fourth layer without
        keys = sys.modules[type(attention).__module__].apply_rotary_pos_emb(keys, keys, *rope)[1]
    return keys, values


def _t5_keys_values(layer: Any, hidden: Tensor, rope: None) -> tuple[Tensor, Tensor]:
    sub = layer.layer[0]
    x, width = sub.layer_norm(hidden), sub.SelfAttention.key_value_proj_dim
    return _split_heads(sub.SelfAttention.k(x), width), _split_heads(sub.SelfAttention.v(x), width)


def _bart_keys_values(layer: Any, hidden: Tensor, rope: None) -> tuple[Tensor, Tensor]:
    return _projected(layer.self_attn, hidden)


def _whisper_keys_values(layer: Any, hidden: Tensor, rope: None) -> tuple[Tensor, Tensor]:
    return _projected(layer.self_attn, layer.self_attn_layer_norm(hidden))


def _projected(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return _split_heads(attention.k_proj(x), attention.head_dim), _split_heads(attention.v_proj(x), attention.head_dim)


def _t5_cross(layer: Any, memory: Tensor) -> tuple[Tensor, Tensor]:
    attention = layer.layer[1].EncDecAttention
    width = attention.key_value_proj_dim
    return _split_heads(attention.k(memory), width), _split_heads(attention.v(memory), width)


def _bart_cross(layer: Any, memory: Tensor) -> tuple[Tensor, Tensor]:
    return _projected(layer.encoder_attn, memory)


# ---------------------------------------------------------------- before the first block


def _embed_plain(decoder: Any, ids: Tensor, positions: Tensor) -> Tensor:
    embedded: Tensor = decoder.embed_tokens(ids)
    return embedded


def _embed_bart(decoder: Any, ids: Tensor, positions: Tensor) -> Tensor:
    embedded = decoder.embed_tokens(ids)
    return decoder.layernorm_embedding(embedded + decoder.embed_positions(ids, 0, position_ids=positions[0]))  # type: ignore[no-any-return]


def _embed_whisper(decoder: Any, ids: Tensor, positions: Tensor) -> Tensor:
    return decoder.embed_tokens(ids) + decoder.embed_positions(ids, position_ids=positions)  # type: ignore[no-any-return]


# ---------------------------------------------------------------- the families


@dataclass(frozen=True)
class Family:
    """What differs between architectures, by attribute paths and functions.

    Attributes:
        decoder: Path from the model to its decoder.
        layers: Name of the block list in the decoder.
        norm: Name of the final norm in the decoder; None where there is none (BART).
        head: Path from the model to the head.
        keys_values: (block, states [N, n, D], rotation) -> keys and values [N, H, n, D_head].
        embed: (decoder, ids [A, n], positions [A, n]) -> states entering the first block.
        cross: (block, memory) -> cross-attention keys and values; None for a decoder-only model.
    """

    decoder: str = "model"
    layers: str = "layers"
    norm: str | None = "norm"
    head: str = "lm_head"
    keys_values: Callable[[Any, Tensor, Any], tuple[Tensor, Tensor]] = _rotary_keys_values
    embed: Callable[[Any, Tensor, Tensor], Tensor] = _embed_plain
    cross: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None


_T5 = Family("decoder", "block", "final_layer_norm", "lm_head", _t5_keys_values, _embed_plain, _t5_cross)
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma3_text": Family(),
    "phi3": Family(),
    "olmo2": Family(),
    "smollm3": Family(),
    "t5": _T5,
    "mt5": _T5,
    "bart": Family("model.decoder", "layers", None, "lm_head", _bart_keys_values, _embed_bart, _bart_cross),
    "whisper": Family(
        "model.decoder", "layers", "layer_norm", "proj_out", _whisper_keys_values, _embed_whisper, _bart_cross
    ),
}
"""Supported values of `config.model_type`."""

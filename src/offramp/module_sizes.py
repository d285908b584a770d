"""How large the parts of a model are: what the cost ledger multiplies with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from offramp.costs import BlockShape, ModelShape

if TYPE_CHECKING:
    from offramp.families import SplitModel

LINEAR = (nn.Linear, Conv1D)
"""Modules that multiply with one matrix, `weight`; GPT-2's `Conv1D` has it transposed."""
_FUSED = ("qkv_proj", "query_key_value", "c_attn")
"""What projections of queries, keys and values in one are called."""


def model_shape(split: SplitModel) -> ModelShape:
    """Sizes of a model's blocks, head and encoder, read off its modules."""
    head = split.head.weight
    encoder_weights, encoder_width = 0, 0
    if split.is_encoder_decoder:
        encoder: Any = split.model.get_encoder()
        encoder_weights = _linear_weights(encoder)
        encoder_width = sum(_out(_projections(attention)[0]) for attention in _attentions(encoder))
        if split.family.listens:  # its first convolution runs at twice the rate of the encoder's output
            encoder_weights += 2 * encoder.conv1.weight.numel() + encoder.conv2.weight.numel()
    first, *others = (_block_shape(block, window) for block, window in zip(split.blocks, split.windows, strict=True))
    entry = [m for m in split.decoder.children() if isinstance(m, LINEAR) and m is not split.squeeze]  # of OPT-350m
    first = replace(first, weights=first.weights + sum(m.weight.numel() for m in entry))
    squeezed = isinstance(split.squeeze, nn.Linear)
    return ModelShape(
        blocks=(first, *others),
        width=split.squeeze.weight.shape[1] if squeezed else head.shape[1],
        vocabulary=head.shape[0],
        element_size=head.element_size(),
        encoder_weights=encoder_weights,
        encoder_attention_width=encoder_width,
        head_width=head.shape[1] if squeezed else None,
    )


def _block_shape(block: nn.Module, window: int | None) -> BlockShape:
    attention, *cross = _attentions(block)
    if fused := next((getattr(attention, name) for name in _FUSED if hasattr(attention, name)), None):
        grouped = hasattr(attention, "num_key_value_heads")
        kv_width = attention.num_key_value_heads * attention.head_dim if grouped else _out(fused) // 3
        query_width = _out(fused) - 2 * kv_width
        kv_weights = 2 * kv_width * fused.weight.numel() // _out(fused)
    else:
        query, key, value = _projections(attention)
        query_width, kv_width = _out(query), _out(key)
        kv_weights = key.weight.numel() + value.weight.numel()
    cross_kv = sum(p.weight.numel() for c in cross for p in _projections(c)[1:])
    router: Any = next((m for m in block.modules() if _is_router(m)), None)
    experts, active = (0, 0) if router is None else (int(router.num_experts), int(router.top_k))
    expert = sum(p.numel() for p in block.parameters() if p.ndim == 3) // max(experts, 1)
    return BlockShape(
        weights=_linear_weights(block) - cross_kv + active * expert,
        kv_weights=kv_weights,
        query_width=query_width,
        kv_width=kv_width,
        cross_kv_weights=cross_kv,
        window=window,
        experts=experts,
        active_experts=active,
        expert_weights=expert,
    )


def _is_router(module: Any) -> bool:
    """Whether a module sends tokens to experts, whose matrices [E, ., .] are stacked in parameters beside it."""
    return hasattr(module, "top_k") and getattr(module, "weight", None) is not None


def _out(linear: Any) -> int:
    """Width of what a linear module gives."""
    return int(linear.weight.shape[1 if isinstance(linear, Conv1D) else 0])


def _projections(attention: Any) -> tuple[Any, Any, Any]:
    """Query, key and value projections of an attention module."""
    if hasattr(attention, "q_proj"):
        return attention.q_proj, attention.k_proj, attention.v_proj
    return attention.q, attention.k, attention.v


def _attentions(module: nn.Module) -> list[Any]:
    """The attention modules inside a module, in order: self before cross."""
    return [m for m in module.modules() if any(hasattr(m, name) for name in ("q_proj", "q", *_FUSED))]


def _linear_weights(module: nn.Module) -> int:
    matrices: list[Any] = [m for m in module.modules() if isinstance(m, LINEAR) or _is_router(m)]
    return sum(m.weight.numel() for m in matrices)

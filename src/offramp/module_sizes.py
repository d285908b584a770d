"""How large the parts of a model are: what the cost ledger multiplies with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from offramp.costs import BlockShape, ModelShape

if TYPE_CHECKING:
    from offramp.families import SplitModel


def model_shape(split: SplitModel) -> ModelShape:
    """Sizes of a model's blocks, head and encoder, read off its modules."""
    head = split.head.weight
    encoder_weights, encoder_width = 0, 0
    if split.is_encoder_decoder:
        encoder: Any = split.model.get_encoder()
        encoder_weights = _linear_weights(encoder)
        encoder_width = sum(_out(m.q if hasattr(m, "q") else m.q_proj) for m in _attentions(encoder))
        if split.name == "whisper":  # its first convolution runs at twice the rate of the encoder's output
            encoder_weights += 2 * encoder.conv1.weight.numel() + encoder.conv2.weight.numel()
    blocks = tuple(_block_shape(block, window) for block, window in zip(split.blocks, split.windows, strict=True))
    return ModelShape(blocks, head.shape[1], head.shape[0], head.element_size(), encoder_weights, encoder_width)


def _block_shape(block: nn.Module, window: int | None) -> BlockShape:
    attention, *cross = _attentions(block)
    total = _linear_weights(block)
    if hasattr(attention, "qkv_proj"):
        kv_width = attention.num_key_value_heads * attention.head_dim
        query_width = _out(attention.qkv_proj) - 2 * kv_width
        kv_weights = 2 * kv_width * attention.qkv_proj.weight.shape[1]
    else:
        query, key, value = _projections(attention)
        query_width, kv_width = _out(query), _out(key)
        kv_weights = key.weight.numel() + value.weight.numel()
    cross_kv = sum(p.weight.numel() for c in cross for p in _projections(c)[1:])
    return BlockShape(total - cross_kv, kv_weights, query_width, kv_width, cross_kv, window)


def _out(linear: Any) -> int:
    return int(linear.weight.shape[0])


def _projections(attention: Any) -> tuple[Any, Any, Any]:
    """Query, key and value projections of an attention module."""
    if hasattr(attention, "q_proj"):
        return attention.q_proj, attention.k_proj, attention.v_proj
    return attention.q, attention.k, attention.v


def _attentions(module: nn.Module) -> list[Any]:
    """The attention modules inside a module, in order: self before cross."""
    return [m for m in module.modules() if any(hasattr(m, name) for name in ("q_proj", "qkv_proj", "q"))]


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))

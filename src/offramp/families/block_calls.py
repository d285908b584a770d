"""Calling one block of a model from outside: masks, positions, rotations and biases as the model itself makes them.

What all blocks of a kind share is computed once per frame and kept in its memo.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_bidirectional_mask

from offramp.families.network import Network, cache_name
from offramp.families.state import Context, Frame

_builders_cache_name = cache(cache_name)  # only ever asked of transformers' own functions, so nothing is kept alive


def run_block(split: Network, index: int, hidden: Tensor, frame: Frame, context: Context) -> Tensor:
    """States [A, n, D] after block `index`, counted from 0; its keys and values go into the context's cache."""
    layer_cache: Any = context.cache.layers[index]
    layer_cache.rows, layer_cache.length = frame.rows, frame.start
    kind = split.types[index]
    block, mask = split.blocks[index], _mask(split, kind, index, hidden, frame, context)
    if split.family.cross is None:
        return block(  # type: ignore[no-any-return]
            hidden,
            attention_mask=mask,
            position_ids=_positions(frame, context),
            position_embeddings=_rope(split, kind, hidden, frame, context),
            **{split.cache_name: context.past},
        )
    _prepare_cross(split, index, frame, context)
    arguments = {
        "attention_mask": mask,
        "encoder_hidden_states": context.memory,
        "encoder_attention_mask": _cross_mask(split, hidden, frame, context),
        split.cache_name: context.past,
    }
    if split.family.position_bias is not None:
        return block(hidden, position_bias=_bias(split, frame), **arguments)[0]  # type: ignore[no-any-return]
    return block(hidden, **arguments)  # type: ignore[no-any-return]


def _prepare_cross(split: Network, index: int, frame: Frame, context: Context) -> None:
    """Cross-attention keys and values, for all rows, at the first visit of a block."""
    past: Any = context.past
    layer_cache = past.cross_attention_cache.layers[index]
    if index not in context.crossed:
        assert split.family.cross is not None
        assert context.memory is not None
        layer_cache.update(*split.family.cross(split.blocks[index], context.memory))
        past.is_updated[index] = True
        context.crossed.append(index)
    layer_cache.rows = frame.rows


def _mask(split: Network, kind: str, index: int, hidden: Tensor, frame: Frame, context: Context) -> Any:
    if ("mask", kind) not in frame.memo:
        padding = context.padding
        if padding is not None:
            padding = padding[frame.rows, : frame.start + frame.queries]
        build: Any = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
        frame.memo["mask", kind] = build(
            config=split.config,
            inputs_embeds=hidden,
            attention_mask=padding,
            position_ids=_positions(frame, context),
            layer_idx=index,
            **{_builders_cache_name(build): context.cache},
        )
    return frame.memo["mask", kind]


def _cross_mask(split: Network, hidden: Tensor, frame: Frame, context: Context) -> Any:
    if context.memory_mask is None or split.family.listens:  # to all of its padded input
        return None
    if ("mask", "cross") not in frame.memo:
        frame.memo["mask", "cross"] = create_bidirectional_mask(
            config=split.config,
            inputs_embeds=hidden,
            attention_mask=context.memory_mask[frame.rows],
            encoder_hidden_states=context.memory[: len(hidden)],  # type: ignore[index] # only its shape is used
        )
    return frame.memo["mask", "cross"]


def _rope(split: Network, kind: str, hidden: Tensor, frame: Frame, context: Context) -> Any:
    key = ("rope", kind if split.rotary_by_type else "")
    if key not in frame.memo:
        frame.memo[key] = rotation(split, kind, hidden, _positions(frame, context))
    return frame.memo[key]


def rotation(split: Network, kind: str, hidden: Tensor, positions: Tensor) -> Any:
    """Cosines and sines for blocks of a kind; None for models without rotary positions."""
    if split.rotary is None:
        return None
    return split.rotary(hidden, positions, *([kind] if split.rotary_by_type else []))


def _bias(split: Network, frame: Frame) -> Tensor:
    """T5's relative position bias, which the first block owns and all blocks share, [1, H, n, T]."""
    if ("bias", "") not in frame.memo:
        attention = split.blocks[0].get_submodule(split.family.position_bias)
        frame.memo["bias", ""] = attention.compute_bias(
            frame.queries, frame.start + frame.queries, device=split.device, past_seen_tokens=frame.start
        )
    return frame.memo["bias", ""]  # type: ignore[no-any-return]


def _positions(frame: Frame, context: Context) -> Tensor:
    """Positions of a frame's tokens, [A, n]."""
    if ("positions", "") not in frame.memo:
        frame.memo["positions", ""] = context.positions[frame.rows, frame.start : frame.start + frame.queries]
    positions: Tensor = frame.memo["positions", ""]
    return positions

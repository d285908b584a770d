"""How large the parts of a model are: what the cost ledger multiplies with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from offramp.families.network import Network

LINEAR = (nn.Linear, Conv1D)
"""Modules that multiply with one matrix, `weight`; GPT-2's `Conv1D` has it transposed."""
_FUSED = ("qkv_proj", "query_key_value", "c_attn")
"""What projections of queries, keys and values in one are called."""


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one decoder block, in weights and widths.

    Attributes:
        weights: Weights that every token is multiplied with: all matrices except the cross-attention K/V, and of
            experts only those that it is sent to.
        kv_weights: Weights of the self-attention key and value projections.
        query_width: Heads times head width of the queries.
        kv_width: Heads times head width of the keys, and of the values.
        cross_kv_weights: Weights of the cross-attention key and value projections; 0 without cross-attention.
        window: Sliding attention window in tokens, or None.
        experts: How many experts a router can send a token to; 0 without.
        active_experts: To how many of them it sends each.
        expert_weights: Weights of one of them.
    """

    weights: int
    kv_weights: int
    query_width: int
    kv_width: int
    cross_kv_weights: int = 0
    window: int | None = None
    experts: int = 0
    active_experts: int = 0
    expert_weights: int = 0

    def weights_read(self, tokens: int) -> int:
        """Weights that `tokens` tokens read together: of experts as many as they can be sent to, if none share one."""
        more = min(self.experts, tokens * self.active_experts) - self.active_experts
        return self.weights + more * self.expert_weights


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, enough to count the work of any way through it.

    Attributes:
        blocks: The L decoder blocks; what comes between the embeddings and the first one counts with it.
        width: Width D of the states.
        vocabulary: Rows V of the head.
        element_size: Bytes per weight.
        encoder_weights: Weights each encoder position is multiplied with.
        encoder_attention_width: Query width summed over the encoder's layers.
        lenses: Weights of the lens after each of layers 1..L, 0 where there is none; empty without trained exits.
        branches: Blocks of the exits' own, in the order of the exits; they count on from L.
        branch_of: Which of these belong to the exit after a layer; to the drafter, which is 0.
        head_width: Width of the head's rows where a matrix from D to it comes before the head (OPT-350m); None: D.
    """

    blocks: tuple[BlockShape, ...]
    width: int
    vocabulary: int
    element_size: int
    encoder_weights: int = 0
    encoder_attention_width: int = 0
    lenses: tuple[int, ...] = ()
    head_width: int | None = None
    branches: tuple[BlockShape, ...] = ()
    branch_of: Mapping[int, range] = field(default_factory=dict)

    def block(self, index: int) -> BlockShape:
        """One of the L blocks, counted from 0, or behind them one of the exits'."""
        return self.blocks[index] if index < len(self.blocks) else self.branches[index - len(self.blocks)]

    def block_flops(self, layer: int, queries: int, start: int, memory: int = 0) -> int:
        """FLOPs of block `layer` (0-based) for `queries` tokens of one row that come after `start` cached ones."""
        block = self.block(layer)
        keys = queries + (start if block.window is None else min(start, block.window - 1))
        attended = keys + (memory if block.cross_kv_weights else 0)
        return queries * (2 * block.weights + 4 * block.query_width * attended)

    def fill_flops(self, layer: int) -> int:
        """FLOPs of the keys and values of one token at block `layer` (0-based)."""
        return 2 * self.block(layer).kv_weights

    @property
    def squeeze_weights(self) -> int:
        """Weights of the matrix before the head; 0 where there is none."""
        return 0 if self.head_width is None else self.width * self.head_width

    def row_weights(self, rows: int | None = None) -> int:
        """Weights of `rows` rows of the head (None: all V)."""
        return (self.head_width or self.width) * (self.vocabulary if rows is None else rows)

    def readout_weights(self, rows: int | None = None) -> int:
        """Weights that one state is multiplied with to score `rows` kept tokens (None: all V)."""
        return self.squeeze_weights + self.row_weights(rows)

    def readout_flops(self, rows: int | None = None) -> int:
        """FLOPs of reading one state out on `rows` kept tokens (None: all V)."""
        return 2 * self.readout_weights(rows)

    def lens_weights(self, layer: int) -> int:
        """Weights of the lens after `layer`, 1..L, 0 where there is none; for 0, of the drafter's."""
        if layer == 0:
            return self.width**2
        return self.lenses[layer - 1] if self.lenses else 0

    def adapter_weights(self, layer: int) -> int:
        """Weights of what one state goes through between `layer`, 0..L, and the readout there: lens and branch."""
        blocks = sum(self.block(index).weights for index in self.branch_of.get(layer, ()))
        return self.lens_weights(layer) + blocks + (self.mix_weights if layer == 0 else 0)

    @property
    def mix_weights(self) -> int:
        """Weights of what mixes a drafter's two inputs."""
        return 2 * self.width**2

    def encoder_flops(self, positions: int) -> int:
        """FLOPs of the encoder for one row of `positions` outputs."""
        return 2 * self.encoder_weights * positions + 4 * self.encoder_attention_width * positions**2

    def cross_flops(self, layer: int, memory: int) -> int:
        """FLOPs of the cross-attention keys and values of one row at a first visit of block `layer` (0-based)."""
        return 2 * self.block(layer).cross_kv_weights * memory

    def generation_flops(self, prompt: int, new: int, memory: int = 0) -> int:
        """FLOPs of the full model for one row: encoder, prompt and `new` generated tokens."""
        passes = [(prompt, 0), *((1, prompt + t) for t in range(new - 1))]
        layers = range(len(self.blocks))
        blocks = sum(self.block_flops(layer, n, start, memory) for n, start in passes for layer in layers)
        cross = sum(self.cross_flops(layer, memory) for layer in layers)
        return self.encoder_flops(memory) + cross + blocks + new * self.readout_flops()


def model_shape(split: Network) -> ModelShape:
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

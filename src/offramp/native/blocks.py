"""A model's blocks as programs for the kernels: which operations, on which registers, with which weights.

A block is groups of sublayers, described from the model's own modules; a family adds a description here, not a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from offramp.native import library as lib
from offramp.native.build import NativeError
from offramp.native.quantisation import quantised

STATE, QKV, MIXED, INNER, ADDEND = range(5)
"""Registers: the residual state; queries, keys and values side by side; what attention and what feed-forward layers
make of them; what a norm takes on its way back to the state."""

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip
_FORMATS = {torch.float32: lib.F32, torch.bfloat16: lib.BF16}


# ---------------------------------------------------------------- what a block consists of


@dataclass(frozen=True)
class Part:
    """A linear layer, or some of its rows where several layers are kept as one."""

    linear: Any
    rows: slice | None = None

    @property
    def width(self) -> int:
        """How many values it makes."""
        rows = int(self.linear.weight.shape[0])
        return rows if self.rows is None else len(range(*self.rows.indices(rows)))


@dataclass(frozen=True)
class Attention:
    """Attention to the text so far, or to the encoder's output.

    Attributes:
        query: Projection of the queries; likewise `key` and `value`.
        out: The projection back.
        head_dim: Width of a head.
        scale: Of scores.
        before: Norm of the input.
        after: Norm of what is added to the state.
        behind: Norm of the state after that.
        query_norm: Norm of the queries, over a head or over all of them; likewise `key_norm`.
        window: Sliding window in tokens; 0 for none.
        cap: Scores are bent to lie below this; 0 for no cap.
        rotary: Whether heads turn.
        memory: Whether it attends to the encoder's output.
        biased: Whether scores get a bias by distance.
    """

    query: Part
    key: Part
    value: Part
    out: Part
    head_dim: int
    scale: float
    before: Any = None
    after: Any = None
    behind: Any = None
    query_norm: Any = None
    key_norm: Any = None
    window: int = 0
    cap: float = 0.0
    rotary: bool = False
    memory: bool = False
    biased: bool = False

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.key.width // self.head_dim


@dataclass(frozen=True)
class FeedForward:
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)); norms as in `Attention`."""

    up: Part
    down: Part
    activation: str
    gate: Part | None = None
    before: Any = None
    after: Any = None
    behind: Any = None


Sublayer = Attention | FeedForward
Block = Sequence[Sublayer]
"""Sublayers in order; each adds to the state."""


# ---------------------------------------------------------------- families


def _rotary(split: Any, index: int) -> Block:
    """Decoder-only blocks with rotary positions and gated feed-forward layers."""
    block = split.blocks[index]
    attention, mlp = block.self_attn, block.mlp
    if hasattr(block, "pre_feedforward_layernorm"):  # Gemma: norms around both sublayers
        norms = (
            block.input_layernorm, block.post_attention_layernorm,
            block.pre_feedforward_layernorm, block.post_feedforward_layernorm,
        )  # fmt: skip
    elif hasattr(block, "post_feedforward_layernorm"):  # OLMo 2: behind both
        norms = (None, block.post_attention_layernorm, None, block.post_feedforward_layernorm)
    else:
        norms = (block.input_layernorm, None, block.post_attention_layernorm, None)
    if hasattr(attention, "qkv_proj"):  # Phi-3
        fused, kv = attention.qkv_proj, attention.num_key_value_heads * attention.head_dim
        cuts = (0, Part(fused).width - 2 * kv, Part(fused).width - kv, Part(fused).width)
        query, key, value = (Part(fused, slice(*pair)) for pair in pairwise(cuts))
        half = Part(mlp.gate_up_proj).width // 2
        gate, up = Part(mlp.gate_up_proj, slice(0, half)), Part(mlp.gate_up_proj, slice(half, 2 * half))
    else:
        query, key, value = Part(attention.q_proj), Part(attention.k_proj), Part(attention.v_proj)
        gate, up = Part(mlp.gate_proj), Part(mlp.up_proj)
    config = split.config
    return (
        Attention(
            query, key, value, Part(attention.o_proj), attention.head_dim, attention.scaling, norms[0], norms[1],
            query_norm=getattr(attention, "q_norm", None), key_norm=getattr(attention, "k_norm", None),
            window=split.windows[index] or 0, cap=getattr(attention, "attn_logit_softcapping", None) or 0.0,
            rotary=getattr(attention, "use_rope", True),
        ),
        FeedForward(
            up, Part(mlp.down_proj), getattr(config, "hidden_act", None) or config.hidden_activation, gate,
            norms[2], norms[3],
        ),
    )  # fmt: skip


def _t5(split: Any, index: int) -> Block:
    own, cross, last = split.blocks[index].layer
    mlp, width = last.DenseReluDense, own.SelfAttention.key_value_proj_dim
    gated = hasattr(mlp, "wi_0")

    def attention(module: Any, norm: Any, *, memory: bool) -> Attention:
        q, k, v, o = map(Part, (module.q, module.k, module.v, module.o))
        return Attention(q, k, v, o, width, module.scaling, norm, memory=memory, biased=not memory)

    return (
        attention(own.SelfAttention, own.layer_norm, memory=False),
        attention(cross.EncDecAttention, cross.layer_norm, memory=True),
        FeedForward(
            Part(mlp.wi_1 if gated else mlp.wi), Part(mlp.wo), split.config.dense_act_fn,
            Part(mlp.wi_0) if gated else None, last.layer_norm,
        ),
    )  # fmt: skip


def _bart(split: Any, index: int) -> Block:
    """BART, whose norms stand behind the sublayers, and Whisper, whose stand before them."""
    block = split.blocks[index]
    first = split.family.listens

    def norms(norm: Any) -> dict[str, Any]:
        return {"before" if first else "behind": norm}

    def attention(module: Any, norm: Any, *, memory: bool) -> Attention:
        q, k, v, o = map(Part, (module.q_proj, module.k_proj, module.v_proj, module.out_proj))
        return Attention(q, k, v, o, module.head_dim, module.scaling, memory=memory, **norms(norm))

    return (
        attention(block.self_attn, block.self_attn_layer_norm, memory=False),
        attention(block.encoder_attn, block.encoder_attn_layer_norm, memory=True),
        FeedForward(
            Part(block.fc1), Part(block.fc2), split.config.activation_function, **norms(block.final_layer_norm)
        ),
    )


FAMILIES: dict[str, Callable[[Any, int], Block]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "smollm3"), _rotary),
    **dict.fromkeys(("t5", "mt5"), _t5),
    **dict.fromkeys(("bart", "whisper"), _bart),
}
"""How the blocks of a model are described, by `config.model_type`: (split model, index of the block) -> block."""


# ---------------------------------------------------------------- weights


@dataclass
class Weights:
    """Pointers into tensors, and the tensors, so that they live as long.

    Attributes:
        int8: Whether matrices are quantised, instead of being read where they lie.
        held: Everything pointed to.
        stamps: Where each parameter lay and how often it had been written to, to notice changes.
    """

    int8: bool = False
    held: list[Tensor] = field(default_factory=list)
    stamps: list[tuple[Tensor, int, int]] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether a parameter was written to or replaced since."""
        return any(p.data_ptr() != place or p._version != version for p, place, version in self.stamps)

    def _note(self, parameter: Tensor) -> Tensor:
        self.stamps.append((parameter, parameter.data_ptr(), parameter._version))
        return parameter.detach()

    def _hold(self, tensor: Tensor) -> int:
        self.held.append(tensor)
        return tensor.data_ptr()

    def vector(self, values: Tensor | None, rows: slice | None = None, *, plus: float = 0.0) -> int | None:
        """The address of a float32 copy of a small parameter; None for None."""
        if values is None:
            return None
        return self._hold(self._note(values)[rows or slice(None)].float() + plus)

    def matrix(self, part: Part, bias: Tensor | None = None) -> lib.Matrix:
        """The weight of a linear layer, in place, with its bias or another one."""
        linear = part.linear
        if type(linear) is not nn.Linear:
            raise NativeError(
                f"a {type(linear).__name__} is more than its weight; merge adapters and dequantise the model first"
            )
        weight = self._note(linear.weight)[part.rows or slice(None)]
        if weight.dtype not in _FORMATS:
            raise NativeError(f"weights are in {weight.dtype}; float32 and bfloat16 are supported")
        if weight.stride(1) != 1:
            raise NativeError("a weight does not lie row by row; call .contiguous() on it")
        bias_at = self.vector(linear.bias if bias is None else bias, part.rows)
        made: dict[str, Any] = {"rows": weight.shape[0], "cols": weight.shape[1], "bias": bias_at}
        if self.int8:
            values, scales = quantised(weight)
            data, stride = self._hold(values), values.stride(0)
            return lib.Matrix(format=lib.INT8, stride=stride, data=data, scales=self._hold(scales), **made)
        return lib.Matrix(format=_FORMATS[weight.dtype], stride=weight.stride(0), data=self._hold(weight), **made)

    def norm(self, module: Any) -> lib.Norm:
        """An RMS or layer norm; none for None."""
        if module is None or isinstance(module, nn.Identity):
            return lib.Norm()
        if isinstance(module, nn.LayerNorm):
            weight, bias = self.vector(module.weight), self.vector(module.bias)
            return lib.Norm(lib.LAYER, module.normalized_shape[0], module.eps, weight, bias)
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        plus = 1.0 if type(module).__name__.startswith("Gemma") else 0.0  # Gemma keeps its weights less one
        return lib.Norm(lib.RMS, module.weight.shape[0], eps, self.vector(module.weight, plus=plus), None)


# ---------------------------------------------------------------- programs


@dataclass(frozen=True)
class Turning:
    """Which table turns the heads of a block, and how many leading dimensions of each."""

    table: int = -1
    rotated: int = 0


def program(block: Block, weights: Weights, turning: Turning) -> list[lib.Op]:
    """The operations that take states through a block."""
    ops: list[lib.Op] = []
    for sub in block:
        if isinstance(sub, Attention):
            if sub.memory:
                ops.append(_linear(weights, sub.before, [sub.query], STATE, QKV))
            else:
                ops += _into_cache(sub, weights, turning, queries=True)
            ops.append(lib.Op(kind=lib.ATTEND, src=QKV, dst=MIXED, **_heads(sub, turning)))
            ops += _added(sub, weights, MIXED, sub.out)
        else:
            parts = [sub.up] if sub.gate is None else [sub.gate, sub.up]
            into = lib.ACTIVATE if sub.gate is None else lib.GATE
            ops.append(_linear(weights, sub.before, parts, STATE, INNER, into, activation=_activation(sub)))
            ops += _added(sub, weights, INNER, sub.down)
    return ops


def fill(block: Block, weights: Weights, turning: Turning) -> list[lib.Op]:
    """The operations that cache keys and values of tokens that skip a block."""
    return _into_cache(own_attention(block), weights, turning, queries=False)


def own_attention(block: Block) -> Attention:
    """A block's attention to the text."""
    return next(sub for sub in block if isinstance(sub, Attention) and not sub.memory)


def cross(block: Block, weights: Weights) -> list[lib.Op]:
    """The operations that cache keys and values of the encoder's output; none without an encoder."""
    for sub in block:
        if isinstance(sub, Attention) and sub.memory:
            heads = _heads(sub, Turning()) | {"heads": 0}
            return [
                _linear(weights, None, [sub.key, sub.value], STATE, QKV),
                lib.Op(kind=lib.ROTATE, src=QKV, dst=QKV, **heads),
            ]
    return []


def widths(block: Block, width: int) -> dict[int, int]:
    """Floats per token that a block needs in each register."""
    need = {STATE: width, QKV: 1, MIXED: 1, INNER: 1, ADDEND: width}
    for sub in block:
        if isinstance(sub, Attention):
            need[QKV] = max(need[QKV], sub.query.width + 2 * sub.key.width)
            need[MIXED] = max(need[MIXED], sub.query.width)
        else:
            need[INNER] = max(need[INNER], sub.up.width * (1 if sub.gate is None else 2))
    return need


def _heads(sub: Attention, turning: Turning) -> dict[str, Any]:
    """What rotation and attention need to know."""
    return {
        "heads": sub.query.width // sub.head_dim, "kv_heads": sub.kv_heads, "head_dim": sub.head_dim,
        "rotation": turning.table if sub.rotary else -1, "rotated": turning.rotated, "window": sub.window,
        "scale": sub.scale, "cap": sub.cap, "memory": int(sub.memory), "biased": int(sub.biased),
    }  # fmt: skip


def _into_cache(sub: Attention, weights: Weights, turning: Turning, *, queries: bool) -> list[lib.Op]:
    """Queries (if asked for), keys and values: normed, turned, and the latter cached."""
    parts = [sub.query, sub.key, sub.value] if queries else [sub.key, sub.value]
    ops = [_linear(weights, sub.before, parts, STATE, QKV)]
    heads: dict[str, Any] = _heads(sub, turning)
    if not queries:
        heads["heads"] = 0
    first = 0
    for name, norm, part in (("norm", sub.query_norm, sub.query), ("key_norm", sub.key_norm, sub.key)):
        if name == "norm" and not queries:
            continue
        if norm is not None and norm.weight.shape[0] == sub.head_dim:
            heads[name] = weights.norm(norm)
        elif norm is not None:  # over all heads at once
            ops.append(lib.Op(kind=lib.NORM, src=QKV, dst=QKV, first=first, norm=weights.norm(norm)))
        first += part.width
    return [*ops, lib.Op(kind=lib.ROTATE, src=QKV, dst=QKV, **heads)]


def _added(sub: Sublayer, weights: Weights, src: int, out: Part) -> list[lib.Op]:
    """What a sublayer adds to the residual state, with the norms on the way and behind."""
    if sub.after is None:
        ops = [_linear(weights, None, [out], src, STATE, lib.ADD)]
    else:
        back = lib.Op(kind=lib.NORM, src=ADDEND, dst=STATE, into=lib.ADD, multiplier=1, norm=weights.norm(sub.after))
        ops = [_linear(weights, None, [out], src, ADDEND), back]
    if sub.behind is not None:
        ops.append(lib.Op(kind=lib.NORM, src=STATE, dst=STATE, norm=weights.norm(sub.behind)))
    return ops


def _linear(
    weights: Weights, norm: Any, parts: list[Part], src: int, dst: int, into: int = lib.STORE, *, activation: str = ""
) -> lib.Op:
    """Linear layers side by side."""
    return lib.Op(
        kind=lib.LINEAR, src=src, dst=dst, into=into, count=len(parts), multiplier=1, norm=weights.norm(norm),
        activation=lib.ACTIVATIONS.get(activation, 0), matrix=(lib.Matrix * 3)(*map(weights.matrix, parts)),
    )  # fmt: skip


def _activation(sub: FeedForward) -> str:
    """The name of an activation as the kernels know it."""
    if sub.activation not in _ACTIVATIONS:
        raise NativeError(f"the activation {sub.activation!r} is not known to the kernels")
    return _ACTIVATIONS[sub.activation]

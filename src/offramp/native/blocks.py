"""A block as a program for the kernels: which operations, on which registers, with which weights.

A block is sublayers, described from the model's own modules in `native.families`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from offramp.native import kernels as lib
from offramp.native.kernels import NativeError
from offramp.native.weights import Part, Weights

STATE, QKV, MIXED, INNER, ADDEND = range(5)
"""Registers: the residual state; queries, keys and values side by side; what attention and what feed-forward layers
make of them; what a norm takes on its way back to the state."""

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip


# ---------------------------------------------------------------- what a block consists of


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
        query_norm: Norm of the queries, over a head, maybe with weights of its own, or over all of them; likewise
            `key_norm`.
        multiplier: Of what is added to the state.
        clip: Queries, keys and values are clamped to this size; 0 for none.
        window: Sliding window in tokens; 0 for none.
        cap: Scores are bent to lie below this; 0 for no cap.
        rotary: Whether heads turn.
        interleaved: Whether neighbours turn together, not halves.
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
    multiplier: float = 1.0
    clip: float = 0.0
    window: int = 0
    cap: float = 0.0
    rotary: bool = False
    interleaved: bool = False
    memory: bool = False
    biased: bool = False

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.key.width // self.head_dim


@dataclass(frozen=True)
class FeedForward:
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)); norms and multiplier as in `Attention`."""

    up: Part
    down: Part
    activation: str
    gate: Part | None = None
    before: Any = None
    after: Any = None
    behind: Any = None
    multiplier: float = 1.0


Sublayer = Attention | FeedForward
Block = Sequence[Sequence[Sublayer]]
"""Steps in order; the sublayers of a step stand side by side: all read the same state, then each adds to it."""


def _sublayers(block: Block) -> Iterator[Sublayer]:
    return (sub for step in block for sub in step)


# ---------------------------------------------------------------- programs


@dataclass(frozen=True)
class Turning:
    """Which table turns the heads of a block, and how many leading dimensions of each."""

    table: int = -1
    rotated: int = 0


def program(block: Block, weights: Weights, turning: Turning) -> list[lib.Op]:
    """The operations that take states through a block."""
    ops: list[lib.Op] = []
    for step in block:
        ops += [op for sub in step for op in _read(sub, weights, turning)]
        ops += [op for sub in step for op in _added(sub, weights)]
    return ops


def fill(block: Block, weights: Weights, turning: Turning) -> list[lib.Op]:
    """The operations that cache keys and values of tokens that skip a block."""
    return _into_cache(own_attention(block), weights, turning, queries=False)


def own_attention(block: Block) -> Attention:
    """A block's attention to the text."""
    return next(sub for sub in _sublayers(block) if isinstance(sub, Attention) and not sub.memory)


def cross(block: Block, weights: Weights) -> list[lib.Op]:
    """The operations that cache keys and values of the encoder's output; none without an encoder."""
    for sub in _sublayers(block):
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
    for sub in _sublayers(block):
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
        "scale": sub.scale, "cap": sub.cap, "memory": int(sub.memory), "biased": int(sub.biased), "clip": sub.clip,
        "interleaved": int(sub.interleaved),
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
        if norm is not None and norm.weight.shape[-1] == sub.head_dim:
            heads[name], heads["headwise"] = weights.norm(norm), int(norm.weight.ndim == 2)
        elif norm is not None:  # over all heads at once
            ops.append(lib.Op(kind=lib.NORM, src=QKV, dst=QKV, first=first, norm=weights.norm(norm)))
        first += part.width
    return [*ops, lib.Op(kind=lib.ROTATE, src=QKV, dst=QKV, **heads)]


def _read(sub: Sublayer, weights: Weights, turning: Turning) -> list[lib.Op]:
    """From the state to what a sublayer's last matrix is given."""
    if isinstance(sub, FeedForward):
        parts = [sub.up] if sub.gate is None else [sub.gate, sub.up]
        into = lib.ACTIVATE if sub.gate is None else lib.GATE
        return [_linear(weights, sub.before, parts, STATE, INNER, into, activation=_activation(sub))]
    if sub.memory:
        ops = [_linear(weights, sub.before, [sub.query], STATE, QKV)]
    else:
        ops = _into_cache(sub, weights, turning, queries=True)
    return [*ops, lib.Op(kind=lib.ATTEND, src=QKV, dst=MIXED, **_heads(sub, turning))]


def _added(sub: Sublayer, weights: Weights) -> list[lib.Op]:
    """What a sublayer adds to the residual state, with the norms on the way and behind."""
    src, out = (MIXED, sub.out) if isinstance(sub, Attention) else (INNER, sub.down)
    if sub.after is None:
        ops = [_linear(weights, None, [out], src, STATE, lib.ADD, multiplier=sub.multiplier)]
    else:
        norm = weights.norm(sub.after)
        back = lib.Op(kind=lib.NORM, src=ADDEND, dst=STATE, into=lib.ADD, multiplier=sub.multiplier, norm=norm)
        ops = [_linear(weights, None, [out], src, ADDEND), back]
    if sub.behind is not None:
        ops.append(lib.Op(kind=lib.NORM, src=STATE, dst=STATE, norm=weights.norm(sub.behind)))
    return ops


def _linear(
    weights: Weights, norm: Any, parts: list[Part], src: int, dst: int, into: int = lib.STORE, *,
    activation: str = "", multiplier: float = 1.0,
) -> lib.Op:  # fmt: skip
    """Linear layers side by side."""
    return lib.Op(
        kind=lib.LINEAR, src=src, dst=dst, into=into, count=len(parts), multiplier=multiplier, norm=weights.norm(norm),
        activation=lib.ACTIVATIONS.get(activation, 0), matrix=(lib.Matrix * 3)(*weights.matrices(parts)),
    )  # fmt: skip


def _activation(sub: FeedForward) -> str:
    """The name of an activation as the kernels know it."""
    if sub.activation not in _ACTIVATIONS:
        raise NativeError(f"the activation {sub.activation!r} is not known to the kernels")
    return _ACTIVATIONS[sub.activation]

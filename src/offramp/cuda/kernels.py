"""An exit test as kernels in Triton: states and a matrix go in, the two best tokens and the normaliser come out.

Sums are taken in float32. What torch rounds to the model's number format between two of its operations is rounded here
too, so that equal logits stay equal. Imported only where Triton is there, by `offramp.cuda.exit_test`.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

NONE: tl.constexpr = tl.constexpr(2**31 - 1)  # in place of a token, behind all tokens
RMS: tl.constexpr = tl.constexpr(1)
LAYER: tl.constexpr = tl.constexpr(2)


@triton.jit
def _states(states: tl.tensor, row: tl.tensor, at: tl.tensor, count: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Some columns of some states, [ROWS, CHUNK], in float32; 0 beyond the last of either."""
    there = (row < count)[:, None] & (at < width)[None, :]
    return tl.load(states + row[:, None] * width + at[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def _moments(
    states: tl.tensor,
    row: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """What a norm takes off each state, and what it multiplies it with, [ROWS] each."""
    mean = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    if KIND == LAYER:
        for start in range(0, width, CHUNK):
            mean += tl.sum(_states(states, row, start + tl.arange(0, CHUNK), count, width), 1)
        mean = mean / width
    if KIND != 0:
        for start in range(0, width, CHUNK):
            at = start + tl.arange(0, CHUNK)
            x = tl.where((at < width)[None, :], _states(states, row, at, count, width) - mean[:, None], 0.0)
            square += tl.sum(x * x, 1)
    return mean, 1.0 / tl.sqrt(square / width + eps)


@triton.jit
def _products(
    states: tl.tensor,
    row: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    gain: tl.tensor,
    shift: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    matrix: tl.tensor,
    names: tl.tensor,
    there: tl.tensor,
    KIND: tl.constexpr,
    PLUS: tl.constexpr,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """Products [TOKENS, ROWS] of some rows of a matrix with states, normed if there is a norm."""
    kind = matrix.dtype.element_ty
    mean, spread = _moments(states, row, count, width, eps, KIND, ROWS, CHUNK)
    products = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, width, CHUNK):
        at = start + tl.arange(0, CHUNK)
        x = _states(states, row, at, count, width)
        if KIND != 0:
            x = (x - mean[:, None]) * spread[:, None]
            if EARLY:  # as Llama's norm does it; others round once, behind the weight
                x = x.to(kind).to(tl.float32)
            if gain is not None:
                x = x * (tl.load(gain + at, mask=at < width, other=0.0).to(tl.float32) + PLUS)[None, :]
            if shift is not None:
                x = x + tl.load(shift + at, mask=at < width, other=0.0).to(tl.float32)[None, :]
        x = x.to(kind)
        if scale is not None:
            x = (x.to(tl.float32) * scale).to(kind)
        inside = there[:, None] & (at < width)[None, :]
        w = tl.load(matrix + names[:, None] * width + at[None, :], mask=inside, other=0.0)
        if ROWS == 1:
            products += tl.sum(w.to(tl.float32) * x.to(tl.float32), 1)[:, None]
        elif INTERPRETED:  # which multiplies bfloat16's bits as if they were whole numbers
            products += tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), input_precision="ieee")
        else:
            products = tl.dot(w, tl.trans(x), products, input_precision="ieee")
    return products


@triton.jit(do_not_specialize=["count"])
def linear(
    states: tl.tensor,
    matrix: tl.tensor,
    bias: tl.tensor,
    added: tl.tensor,
    made: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    outputs: tl.tensor,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Each state [D] times a matrix [outputs, D], with a bias, on top of another state: a part of a lens.

    A program makes `TOKENS` numbers of `ROWS` states; grid: (states / ROWS, outputs / TOKENS).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    z = _products(
        states, row, count, width, None, None, 0.0, None, matrix, at.to(tl.int64), at < outputs,
        0, 0.0, False, ROWS, TOKENS, CHUNK,
    )  # fmt: skip
    kind = matrix.dtype.element_ty
    if bias is not None:
        z += tl.load(bias + at, mask=at < outputs, other=0.0).to(tl.float32)[:, None]
    inside = (at < outputs)[:, None] & (row < count)[None, :]
    places = row[None, :] * outputs + at[:, None]
    if added is not None:
        z = z.to(kind).to(tl.float32) + tl.load(added + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(made + places, z.to(kind), mask=inside)


@triton.jit(do_not_specialize=["count", "kept", "stride"])
def scores(
    states: tl.tensor,
    gain: tl.tensor,
    shift: tl.tensor,
    head: tl.tensor,
    bias: tl.tensor,
    ids: tl.tensor,
    values: tl.tensor,
    tokens: tl.tensor,
    sums: tl.tensor,
    logits: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    kept: tl.tensor,
    stride: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    KIND: tl.constexpr,
    PLUS: tl.constexpr,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Logits of `TOKENS` of `kept` tokens for `ROWS` states, and what they come to.

    Grid: (states / ROWS, kept / TOKENS), so that programs which read the same rows of the head are neighbours. Where
    states have tokens of their own (`stride` > 0), ROWS is 1.

    Args:
        states: [A, D].
        gain: The norm's weight, [D], or None; `PLUS` is added to it.
        shift: The norm's bias, [D], or None.
        head: [V, D].
        bias: The head's, [V], or None.
        ids: Tokens, [K] or [A, K], `stride` apart; -1: none. None: all of the head's.
        values: The two largest logits of each block of tokens, [A, blocks, 2].
        tokens: Whose they are, int32 [A, blocks, 2].
        sums: Sums of exponentials relative to the largest of the block, [A, blocks].
        logits: Where all of them go, float32 [A, K], or None.
        count: A.
        width: D.
        kept: K, or V.
        stride: See `ids`.
        eps: The norm's.
        scale: What normed states are multiplied with, or None.
        factor: What logits are multiplied with, or None.
        cap: Their soft cap, or None.
        KIND: 0: no norm; RMS; LAYER.
        PLUS: See `gain`.
        EARLY: Whether the norm rounds before its weight.
        ROWS: States of a program, 1 or at least 16.
        TOKENS: Tokens of a program.
        CHUNK: Columns that it reads at a time.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    kind = head.dtype.element_ty
    if ids is None:
        names = at
    else:
        names = tl.load(ids + tl.program_id(0) * stride + at, mask=at < kept, other=-1).to(tl.int32)
    there = (at < kept) & (names >= 0)
    z = _products(
        states, row, count, width, gain, shift, eps, scale, head, names.to(tl.int64), there,
        KIND, PLUS, EARLY, ROWS, TOKENS, CHUNK,
    )  # fmt: skip
    if bias is not None:
        z += tl.load(bias + names, mask=there, other=0.0).to(tl.float32)[:, None]
    z = z.to(kind).to(tl.float32)
    if factor is not None:
        z = (z * factor).to(kind).to(tl.float32)
    if cap is not None:  # tanh by exponentials that cannot overflow
        share = tl.exp(-2 * tl.abs((z / cap).to(kind).to(tl.float32)))
        bent = ((1 - share) / (1 + share)).to(kind).to(tl.float32)
        z = (tl.where(z < 0, -bent, bent) * cap).to(kind).to(tl.float32)
    z = tl.where(there[:, None], z, -float("inf"))
    if logits is not None:
        tl.store(logits + row[None, :] * kept + at[:, None], z, mask=(at < kept)[:, None] & (row < count)[None, :])
    first = tl.max(z, 0)
    one = tl.min(tl.where(there[:, None] & (z == first[None, :]), names[:, None], NONE), 0)
    others = tl.where(names[:, None] == one[None, :], -float("inf"), z)
    second = tl.max(others, 0)
    some = there[:, None] & (names[:, None] != one[None, :]) & (others == second[None, :])
    two = tl.min(tl.where(some, names[:, None], NONE), 0)
    base = tl.where(first == -float("inf"), 0.0, first)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(values + 2 * place, first, mask=row < count)
    tl.store(values + 2 * place + 1, second, mask=row < count)
    tl.store(tokens + 2 * place, one, mask=row < count)
    tl.store(tokens + 2 * place + 1, two, mask=row < count)
    tl.store(sums + place, tl.sum(tl.exp(z - base[None, :]), 0), mask=row < count)


@triton.jit(do_not_specialize=["blocks"])
def merge(
    values: tl.tensor, tokens: tl.tensor, sums: tl.tensor, made: tl.tensor, blocks: tl.tensor, BLOCKS: tl.constexpr
) -> None:
    """What the blocks of each state come to, as int32 [A, 5]: two logits and the normaliser, bit by bit, two tokens.

    Of equal logits the lowest token comes first; -1 stands for no token. Grid: (states,).
    """
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    place, there = row * blocks + block, block < blocks
    value = tl.load(values + 2 * place, mask=there, other=-float("inf"))
    next_value = tl.load(values + 2 * place + 1, mask=there, other=-float("inf"))
    token = tl.load(tokens + 2 * place, mask=there, other=NONE)
    next_token = tl.load(tokens + 2 * place + 1, mask=there, other=NONE)
    first = tl.max(value, 0)
    one = tl.min(tl.where(value == first, token, NONE), 0)
    others = tl.where(token == one, next_value, value)
    names = tl.where(token == one, next_token, token)
    second = tl.max(others, 0)
    two = tl.min(tl.where(others == second, names, NONE), 0)
    base = tl.where(first == -float("inf"), 0.0, first)
    total = tl.sum(tl.load(sums + place, mask=there, other=0.0) * tl.exp(value - base), 0)
    tl.store(made + 5 * row, first.to(tl.int32, bitcast=True))
    tl.store(made + 5 * row + 1, second.to(tl.int32, bitcast=True))
    tl.store(made + 5 * row + 2, (base + tl.log(total)).to(tl.int32, bitcast=True))
    tl.store(made + 5 * row + 3, tl.where(one == NONE, -1, one))
    tl.store(made + 5 * row + 4, tl.where(two == NONE, -1, two))

"""The kernels by themselves, against torch in double precision, on sizes that fit no vector."""

import copy
import ctypes
import math
import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from few_bits import dequantised, input_in, rounded, sixteen_values, turning, weight_in
from offramp import ExitPolicy, LanguageModel
from offramp.core.exits import Exits
from offramp.native import kernels as lib
from offramp.native.cache import NativeCache
from offramp.native.kernels import library
from offramp.native.weights import Part, Weights, quantised
from tiny import tiny

FORMATS = ("float32", "bfloat16", "int8", "int4")


def matrix_of(kind, rows, cols, *, bias=False, seed=0):
    """A matrix for the kernels, its values in double precision, its bias, and what keeps them alive."""
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    linear = torch.nn.Linear(cols, rows, bias=bias, dtype=dtype)
    if kind == "int4":
        linear.weight.data = sixteen_values(linear.weight, seed=seed)
    weights = Weights(rounded=rounded(kind))
    matrix = weights.matrices([Part(linear)])[0]
    values = weight_in(kind, linear.weight.detach())
    return matrix, values.double(), linear.bias.detach().double() if bias else 0.0, (linear, weights)


def read(x, matrix=None, ids=None, *, norm=None, lens=(), scale=1.0, bend=(1.0, 0.0), threads=2):
    """A readout of states [A, D]: what the head reads, logits, the two best, their tokens, the normaliser."""
    count = 1 if matrix is None else matrix.rows if ids is None else ids.shape[-1]
    inputs, logits = torch.full_like(x, math.nan), torch.full((len(x), count), math.nan)
    best, tokens, normaliser = torch.empty(len(x), 2), torch.empty(len(x), 2, dtype=torch.long), torch.empty(len(x))
    lens = (lib.Matrix * len(lens))(*lens)
    call = lib.Readout(
        *x.shape, count, threads, scale, *bend, lib.address(x), len(lens), lens, norm and ctypes.pointer(norm),
        matrix and ctypes.pointer(matrix), None if ids is None else lib.address(ids),
        ids.shape[1] if ids is not None and ids.ndim == 2 else 0,
        *map(lib.address, (inputs, logits, best, tokens, normaliser)),
    )  # fmt: skip
    library().offramp_readout(call)
    return inputs, logits, best, tokens, normaliser


def times(matrix, x, ids=None, threads=2):
    return read(x, matrix, ids, threads=threads)[1]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 1700), st.integers(1, 50), st.booleans())
def test_products_are_those_of_torch(kind, rows, cols, count, bias):
    matrix, values, shift, _alive = matrix_of(kind, rows, cols, bias=bias)
    x = torch.randn(count, cols)
    read = input_in(kind, x).double()
    torch.testing.assert_close(times(matrix, x).double(), read @ values.T + shift, atol=2e-5, rtol=2e-5)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 40),
    st.integers(1, 140) | st.integers(700, 1700),  # some kernels take columns 768 at a time
    st.integers(1, 50),
    st.integers(1, 5),
)
def test_a_row_does_not_depend_on_the_others_nor_on_the_threads(kind, rows, cols, count, threads):
    matrix, *_alive = matrix_of(kind, rows, cols, bias=True)
    x = torch.randn(count, cols)
    together = times(matrix, x, threads=threads)
    alone = torch.cat([times(matrix, row[None].contiguous(), threads=1) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("kind", FORMATS[:3])  # in four bits rows lie sixteen together, so that none is named
def test_named_rows_are_those_of_the_whole_product(kind):
    matrix, *_alive = matrix_of(kind, 50, 70, bias=True)
    x = torch.randn(3, 70)
    ids = torch.randint(0, 50, (3, 21))
    assert torch.equal(times(matrix, x, ids), times(matrix, x).gather(1, ids))


@pytest.mark.parametrize("cols", [1, 8, 16, 33, 64, 100])
def test_norms_are_those_of_torch(cols):
    x, weights = torch.randn(3, cols), Weights()
    layer, root = torch.nn.LayerNorm(cols), torch.nn.RMSNorm(cols, eps=1e-5)
    for module in (layer, root):
        torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(layer.bias)
    for module in (layer, root):
        inputs = read(x, norm=weights.norm(module))[0]
        torch.testing.assert_close(inputs, module(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", FORMATS[:3])
@pytest.mark.parametrize("rows", ["all", "shared", "own"])
def test_the_best_are_those_of_torch(kind, rows):
    """The two best of hundreds of logits, bent to lie below a cap, with tokens that are none; in any company."""
    matrix, *_alive = matrix_of(kind, 700, 70, bias=True)
    x, ids = torch.randn(14, 70), None
    if rows != "all":
        ids = torch.stack([torch.randperm(700)[:300] for _ in range(14 if rows == "own" else 1)])
        ids[:, 5::7] = -1
        ids = ids if rows == "own" else ids[0]
    inputs, logits, best, tokens, normaliser = read(x, matrix, ids, bend=(0.7, 3.0))
    plain = times(matrix, x).double()
    want = 3 * torch.tanh(plain * 0.7 / 3)
    if ids is not None:
        each = ids.expand(14, -1)
        want = want.gather(1, each.clamp(min=0)).masked_fill(each < 0, -math.inf)
    assert torch.equal(inputs, x)
    torch.testing.assert_close(logits.double(), want, atol=2e-6, rtol=2e-6)
    top = logits.topk(2, dim=1)
    assert torch.equal(best, top.values)
    assert torch.equal(tokens, top.indices if ids is None else each.gather(1, top.indices))
    torch.testing.assert_close(normaliser.double(), logits.double().logsumexp(1), atol=1e-6, rtol=1e-6)
    for threads in (1, 3):
        alone = [
            read(x[i : i + 1], matrix, ids[i : i + 1] if rows == "own" else ids, bend=(0.7, 3.0), threads=threads)
            for i in range(14)
        ]
        for got, parts in zip((logits, best, tokens, normaliser), list(zip(*alone, strict=True))[1:], strict=True):
            assert torch.equal(got, torch.cat(parts))


def test_lens_norm_and_scale_come_before_the_head():
    torch.manual_seed(2)
    down, up, norm = torch.nn.Linear(40, 5, bias=False), torch.nn.Linear(5, 40), torch.nn.LayerNorm(40)
    matrix, values, *_alive = matrix_of("float32", 33, 40)
    weights = Weights()
    x = torch.randn(3, 40)
    lens = [weights.matrix(Part(part)) for part in (down, up)]
    inputs, logits, *_ = read(x, matrix, norm=weights.norm(norm), lens=lens, scale=0.5)
    want = norm(x + up(down(x))).detach() * 0.5
    torch.testing.assert_close(inputs, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits.double(), want.double() @ values.T, atol=1e-5, rtol=1e-5)


def test_of_equal_logits_the_lowest_token_is_best():
    head = torch.nn.Linear(8, 400, bias=False)
    torch.nn.init.zeros_(head.weight)
    matrix = Weights().matrix(Part(head))
    x = torch.ones(2, 8)
    assert read(x, matrix)[3].tolist() == [[0, 1], [0, 1]]
    assert read(x, matrix, torch.tensor([311, 250, 7, -1, 260]))[3].tolist() == [[7, 250], [7, 250]]
    assert read(x, matrix, torch.tensor([5]))[3].tolist() == [[5, -1], [5, -1]]
    with torch.no_grad():
        head.weight[300] = 1
    assert read(x, matrix)[3].tolist() == [[300, 0], [300, 0]]


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_told_by_the_normaliser(wrong, kind):
    matrix, *_alive = matrix_of(kind, 400, 8)
    x = torch.randn(2, 8)
    x[1, 3] = wrong
    normaliser = read(x, matrix)[4]
    assert normaliser.isfinite().tolist() == [True, False]


@pytest.mark.parametrize(("kind", "huge"), [("int8", 3e37), ("int4", 1e30)])
def test_inputs_in_eight_bits_may_be_zero_or_tiny_or_huge(kind, huge):
    matrix, values, *_alive = matrix_of(kind, 9, 200)
    torch.manual_seed(0)
    x = torch.stack([torch.zeros(200), torch.full((200,), 1e-38), torch.full((200,), -huge), torch.randn(200) * 1e6])
    got = times(matrix, x)
    assert bool((got[:2] == 0).all())
    torch.testing.assert_close(got[3].double(), input_in(kind, x[3:])[0].double() @ values.T, rtol=1e-5, atol=1.0)
    assert bool((got[2].isfinite() | got[2].isinf()).all())


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_the_largest_products_in_eight_bits_fit(count):
    """Turned, all columns of a lane are equal: neighbours that are as large as any may be."""
    first = torch.zeros(1, 200)
    first[:, :16] = 1
    linear = torch.nn.Linear(200, 5, bias=False)
    linear.weight.data = first.repeat(5, 1)
    weights = Weights(rounded="int8")
    matrix = weights.matrix(Part(linear))
    for sign in (1, -1):
        got = times(matrix, sign * first.repeat(count, 1))
        torch.testing.assert_close(got, torch.full((count, 5), 16.0 * sign), rtol=5e-3, atol=0)


def test_quantisation_is_within_half_a_scale_and_uses_the_whole_range():
    torch.manual_seed(0)
    weight = torch.randn(5, 900)
    weight[2] = 0
    values, scales = quantised(weight)
    assert values.shape == (5, 2, 8, 4, 16)
    assert scales.shape == (5, 2, 16)
    padded = torch.nn.functional.pad(weight.double(), (0, 124)).view(5, 2, 32, 16)
    away = values.flatten(2, 3) * scales[:, :, None].double() - turning(32) @ padded
    assert bool((away.abs() <= scales[:, :, None].double() / 2 * (1 + 1e-5)).all())
    back = dequantised(values, scales)[:, :900]
    assert float((back - weight).norm() / weight.norm()) < 0.01
    assert bool((back[2] == 0).all())
    assert bool((values[[0, 1, 3, 4], :1].abs().amax((2, 3)) >= 126).all())  # a scale is rounded up by a 128th at most


# ---------------------------------------------------------------- operations


def run(ops, widths, hidden, batch, slots, cache, *, rotations=None, distances=None, threads=2):
    """Run operations over tokens; returns what the last register holds through a final copy into the state."""
    numbers = (ctypes.c_int64 * len(widths))(*widths)
    program = (ctypes.c_int64 * 2)(0, len(ops))
    kv = lib.F32 if cache.dtype == torch.float32 else lib.BF16
    model = lib.Model(widths[0], len(widths), numbers, (lib.Op * len(ops))(*ops), program, kv)
    batch, slots = torch.tensor(batch), torch.tensor(slots)
    tables = (lib.Rotation * 1)(*(rotations or ()))
    distances = torch.empty(0, 0) if distances is None else distances
    call = lib.Call(
        0, 1, len(hidden), 0, cache.capacity, threads, lib.address(hidden), lib.address(batch), lib.address(slots),
        lib.address(slots), *cache.addresses, ctypes.addressof(tables), lib.address(distances), distances.shape[-1],
    )  # fmt: skip
    library().offramp_run(model, call)
    return hidden


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2]),
    st.sampled_from([3, 8, 16, 20, 64, 80]), st.integers(1, 40), st.sampled_from([0, 1, 5, 17]), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_attention_is_that_of_the_formula(dtype, groups, kv_heads, dim, length, window, capped, biased):
    """Tokens of two rows that stand at different positions, in one call, against softmax written out."""
    torch.manual_seed(length)
    heads = groups * kv_heads
    width = heads * dim
    cache = NativeCache(2, [kv_heads], [dim], dtype)
    cache.reserve(length)
    joint = torch.nn.Linear(width, (heads + 2 * kv_heads) * dim, bias=False)
    weights = Weights()
    cap = 3.0 if capped else 0.0
    distances = torch.randn(heads, length) if biased else None
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "rotation": -1, "window": window, "cap": cap}
    shape |= {"scale": 0.3, "biased": int(biased)}
    matrices = (lib.Matrix * 3)(weights.matrix(Part(joint)))
    back = torch.nn.Linear(width, width, bias=False)
    ops = [
        lib.Op(kind=lib.LINEAR, src=0, dst=1, count=1, matrix=matrices),
        lib.Op(kind=lib.ROTATE, src=1, dst=1, **shape),
        lib.Op(kind=lib.ATTEND, src=1, dst=2, **shape),
        lib.Op(
            kind=lib.LINEAR, src=2, dst=0, count=1, into=lib.ADD, multiplier=1,
            matrix=(lib.Matrix * 3)(weights.matrix(Part(back))),
        ),
    ]  # fmt: skip
    lengths = (length, max(1, length // 2))
    x = torch.randn(sum(lengths), width)
    batch = [0] * lengths[0] + [1] * lengths[1]
    slots = [*range(lengths[0]), *range(lengths[1])]
    got = run(ops, [width, (heads + 2 * kv_heads) * dim, width], x.clone(), batch, slots, cache, distances=distances)

    start = 0
    for n in lengths:
        own = x[start : start + n].double()
        q, k, v = (own @ joint.weight.double().T).split([width, kv_heads * dim, kv_heads * dim], -1)
        if dtype == torch.bfloat16:
            k, v = k.float().bfloat16().double(), v.float().bfloat16().double()
        q, k, v = (t.view(n, -1, dim).transpose(0, 1) for t in (q, k, v))
        k, v = (t.repeat_interleave(groups, 0) for t in (k, v))
        scores = q @ k.transpose(1, 2) * 0.3
        if capped:
            scores = cap * torch.tanh(scores / cap)
        there = torch.arange(n)
        apart = there[:, None] - there[None]
        if biased:
            scores = scores + distances.double()[:, apart.clamp(min=0)]
        hidden = (apart < 0) | ((apart >= window) if window else False)
        mixed = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        want = own + mixed.transpose(0, 1).reshape(n, width) @ back.weight.double().T
        # bfloat16 keys that lie between two numbers may round to either
        tolerance = 2e-5 if dtype == torch.float32 else 5e-3
        torch.testing.assert_close(got[start : start + n].double(), want, atol=tolerance, rtol=tolerance)
        start += n


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"])
@pytest.mark.parametrize("gated", [False, True])
def test_activations_are_those_of_torch(name, gated):
    known = {
        "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
        "relu2": lambda x: F.relu(x) ** 2, "identity": lambda x: x,
    }  # fmt: skip
    width, inner = 24, 37
    up, gate, down = (torch.nn.Linear(*shape, bias=False) for shape in ((width, inner), (width, inner), (inner, width)))
    torch.nn.init.normal_(gate.weight, std=4)  # far out as well
    weights = Weights()
    cache = NativeCache(1, [1], [1], torch.float32)
    cache.reserve(1)
    first = [gate, up] if gated else [gate]
    ops = [
        lib.Op(
            kind=lib.LINEAR, src=0, dst=1, count=len(first), into=lib.GATE if gated else lib.ACTIVATE,
            activation=lib.ACTIVATIONS[name], matrix=(lib.Matrix * 3)(*(weights.matrix(Part(m)) for m in first)),
        ),
        lib.Op(
            kind=lib.LINEAR, src=1, dst=0, count=1, into=lib.ADD, multiplier=1,
            matrix=(lib.Matrix * 3)(weights.matrix(Part(down))),
        ),
    ]  # fmt: skip
    x = torch.randn(9, width)
    got = run(ops, [width, 2 * inner], x.clone(), [0] * 9, [0] * 9, cache)
    d = x.double()
    inside = known[name](d @ gate.weight.double().T)
    if gated:
        inside = inside * (d @ up.weight.double().T)
    torch.testing.assert_close(got.double(), d + inside @ down.weight.double().T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rotated", [8, 4])
def test_heads_turn_by_their_position(rotated, interleaved):
    """Scores of turned heads depend on distances alone, and turning keeps lengths."""
    dim, width = 8, 8
    angles = torch.arange(6)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])[: rotated // 2]
    cosines, sines = angles.cos(), angles.sin()
    cache = NativeCache(1, [1], [dim], torch.float32)
    cache.reserve(6)
    one = torch.nn.Linear(width, 3 * dim, bias=False)
    weights = Weights()
    shape = {"heads": 1, "kv_heads": 1, "head_dim": dim, "rotation": 0, "rotated": rotated, "interleaved": interleaved}
    ops = [
        lib.Op(
            kind=lib.LINEAR, src=0, dst=1, count=1, matrix=(lib.Matrix * 3)(weights.matrix(Part(one))),
        ),
        lib.Op(kind=lib.ROTATE, src=1, dst=1, scale=1.0, **shape),
    ]  # fmt: skip
    x = torch.randn(6, width)
    tables = [lib.Rotation(lib.address(cosines.contiguous()), lib.address(sines.contiguous()))]
    run(ops, [width, 3 * dim], x.clone(), [0] * 6, list(range(6)), cache, rotations=tables)
    keys = cache.keys[0][0, 0].transpose(1, 2).reshape(-1, dim)[:6]  # [slots, dim]
    plain = (x.double() @ one.weight.double().T)[:, dim : 2 * dim]
    pairs = (torch.arange(rotated).view(-1, 2) if interleaved else torch.arange(rotated).view(2, -1).T).tolist()
    for (a, b), angle in zip(pairs, angles.double().T, strict=True):
        turned = torch.complex(plain[:, a], plain[:, b]) * torch.polar(torch.ones(6, dtype=torch.double), angle)
        torch.testing.assert_close(keys[:, a].double(), turned.real, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(keys[:, b].double(), turned.imag, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(keys[:, rotated:].double(), plain[:, rotated:], atol=1e-5, rtol=1e-5)


def test_reading_memory_gives_its_sum():
    data = torch.randint(0, 2**40, (100_003,))
    for threads in (1, 2, 3):
        assert library().offramp_read(lib.address(data), len(data), threads) == int(data.sum())


def test_views_that_skip_values_are_refused():
    with pytest.raises(ValueError, match="not contiguous"):
        lib.address(torch.zeros(4, 4)[:, :2])


@pytest.mark.parametrize("vocabulary", [1, 17, 1000, 49152])
@pytest.mark.parametrize("kind", ["normal", "equal", "narrow", "masked"])
def test_the_largest_logits_in_order(vocabulary, kind):
    g = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(3, vocabulary, generator=g)
    if kind == "equal":
        logits = logits.round()
    if kind == "narrow":
        logits = 5 + 1e-3 * logits
    if kind == "masked":
        logits[:, ::2] = -math.inf
    skip = torch.tensor([0, vocabulary // 2]).unique() if vocabulary > 2 else torch.empty(0, dtype=torch.long)
    for count in {1, (vocabulary - len(skip)) // 3 or 1, vocabulary - len(skip)}:
        tokens = torch.empty(3, count, dtype=torch.long)
        library().offramp_rank(
            lib.address(logits), 3, vocabulary, lib.address(skip), len(skip), count, lib.address(tokens)
        )  # fmt: skip
        for row, found in zip(logits.tolist(), tokens.tolist(), strict=True):
            allowed = [v for v in range(vocabulary) if v not in set(skip.tolist())]
            assert found == sorted(allowed, key=lambda v: (-row[v], v))[:count]


@pytest.mark.parametrize("confidence", ["static", "max", "softmax"])
@pytest.mark.parametrize("listed", [None, 9])
def test_drafts_in_one_call_stay_within_their_buffers(confidence, listed):
    """Under sanitizers; what is drafted is compared with its rule in test_drafter."""
    lm = LanguageModel(copy.deepcopy(tiny("llama")), engine="native")
    exits = Exits(lm.num_layers, lm.split.shape.width, (), drafter=2).with_drafter(lm.split, 2)
    lm.attach_exits(exits if listed is None else exits.with_frequent(range(3, 3 + listed)))
    policy = ExitPolicy(
        confidence,
        0.01,
        min_layer=0,
        skipped="verify",
        draft_length=5,
        vocabulary=None if listed is None else "frequent",
    )
    ids = {"input_ids": torch.tensor([[5, 9, 3, 7, 11]])}
    for new in (1, 2, 9, 70):
        full = lm.generate(ids, max_new_tokens=new, eos_token_id=None)
        assert lm.generate(ids, policy=policy, max_new_tokens=new, eos_token_id=None).tokens == full.tokens


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or "OFFRAMP_CXXFLAGS" in os.environ,
    reason="flags of x86, and its own",
)
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-march=x86-64"], ids=["AVX2", "SSE2"])
def test_plainer_processors_get_the_same_results(flags):
    """Lanes, and products of bytes, have a way of their own for each kind of processor."""
    which = "products or tiny_or_huge or does_not_depend or attention or activations or norms or best"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", which]
    done = subprocess.run(
        command, env={**os.environ, "OFFRAMP_CXXFLAGS": flags}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]

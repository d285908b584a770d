"""Exit tests in fused kernels against torch's: on a GPU (`cuda.sh`), or on the CPU with TRITON_INTERPRET=1.

To be run in a process of its own: python -m pytest FILE.
"""

import copy
import math
import os

import pytest
import torch
from torch import nn

from offramp import ExitPolicy
from offramp.core.decoding import decode
from offramp.core.exits import Exits
from offramp.cuda.exit_test import ExitTests, Norm, packed, told
from offramp.cuda.model import CudaModel
from offramp.families import SplitModel
from offramp.families.readouts import Best, best_of
from tiny import VOCABULARY, inputs_for, tiny

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, which interprets: of NaN and infinity
DEVICE = torch.device(os.environ.get("OFFRAMP_TEST_DEVICE", "cpu"))
# RMS norms of three ways of rounding, capped and divided logits, layer norms with and without weights, a scale
NAMES = ("llama", "gemma", "gemma2", "granite", "olmo2", "qwen2", "smollm3", "gpt2", "nemotron", "cohere", "olmo", "t5")
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
LENSES = {"none": 0, "low rank": 3, "full": None}


def made(name, dtype=torch.float32, lens="none"):
    split = SplitModel(copy.deepcopy(tiny(name)).to(DEVICE, dtype))
    torch.manual_seed(0)
    if LENSES[lens] != 0:
        exits = Exits.fresh(split, [1, 2, 3], rank=LENSES[lens])
        for parameter in exits.parameters():
            nn.init.normal_(parameter, std=0.1)
        split.exits = exits
    return split


def states(split, count, seed=0):
    drawn = torch.randn(count, split.shape.width, generator=torch.Generator().manual_seed(seed))
    return (2 * drawn).to(DEVICE, split.model.dtype)


def brute(logits, ids):
    """The two best by hand: of equal logits the lowest token first."""
    found = []
    for row, numbers in enumerate(logits.tolist()):
        names = range(len(numbers)) if ids is None else (ids if ids.ndim == 1 else ids[row]).tolist()
        order = sorted((-z, token) for z, token in zip(numbers, names, strict=True) if token >= 0)
        found.append([(-z, token) for z, token in order[:2]])
    return found


def check(split, tests, hidden, ids=None):
    """Logits are torch's up to rounding; what is said of them is exactly what they say."""
    layer = None if split.exits is None else 2
    with torch.no_grad():
        given, logits = tests(hidden, layer, ids, logits=True)
        alone, none = tests(hidden, layer, ids)
        x = split.readout_input(hidden, layer)
        full = split.project(x).float()
    assert none is None
    assert torch.equal(alone, given)
    columns = slice(None) if ids is None else ids.clamp(min=0)
    expected = full[:, columns] if ids is None or ids.ndim == 1 else full.gather(1, columns)
    if ids is not None:
        expected = expected.masked_fill(ids < 0, -torch.inf)
    # float32 by another order of sums; the interpreter cuts bfloat16 off where torch rounds, a lens adds up roundings
    far = (16 if split.exits is not None else 4) * torch.finfo(hidden.dtype).eps * float(full.abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=max(far, 2e-6))
    best, two = told(given), brute(logits, ids)
    assert list(zip(best.values.flatten().tolist(), best.tokens.flatten().tolist(), strict=True)) == sum(two, [])
    torch.testing.assert_close(best.normaliser, logits.logsumexp(-1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_test_is_that_of_torch(name, dtype, lens):
    split = made(name, dtype, lens)
    tests = ExitTests.of(split)
    draw = torch.Generator().manual_seed(1)
    for count in (1, 3, 17):
        hidden = states(split, count, count)
        check(split, tests, hidden)
        for kept in (2, 33, VOCABULARY):
            ids = torch.stack([torch.randperm(VOCABULARY, generator=draw)[:kept] for _ in range(count)]).to(DEVICE)
            check(split, tests, hidden, ids[0].sort().values)
            check(split, tests, hidden, ids)


def test_tokens_that_a_row_does_not_keep():
    split, hidden = made("llama"), None
    tests, hidden = ExitTests.of(split), states(split, 3)
    ids = torch.stack(
        [torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(row))[:40] for row in range(3)]
    )
    ids[0, 5:], ids[1, ::2] = -1, -1
    check(split, tests, hidden, ids.to(DEVICE))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_of_equal_logits_the_lowest_token_comes_first(dtype):
    split = made("llama", dtype)
    with torch.no_grad():
        split.head.weight.copy_(split.head.weight[:1].expand(VOCABULARY, -1))
        split.head.weight[[3, 20]] *= -1
    tests = ExitTests.of(split)
    for count in (1, 5):
        best = told(tests(states(split, count), None)[0])
        for values, tokens in zip(best.values.tolist(), best.tokens.tolist(), strict=True):
            assert tokens in ([0, 1], [3, 20])
            assert values[0] == values[1]
        ids = torch.tensor([[96, 7, 50, 11, 90]] * count, device=DEVICE)
        tokens = told(tests(states(split, count), None, ids)[0]).tokens
        assert tokens.tolist() == [[7, 11]] * count


@pytest.mark.parametrize("kept", [2, 37, 8193, 9001])
def test_odd_sizes(kept):
    """Several chunks of columns, the last one in part; blocks of 16 and of 64 tokens."""
    config = copy.deepcopy(tiny("llama").config)
    config.hidden_size, config.head_dim, config.num_hidden_layers, config.vocab_size = 300, 8, 1, 9001
    torch.manual_seed(0)
    split = SplitModel(type(tiny("llama"))(config).eval().to(DEVICE))
    tests = ExitTests.of(split)
    for count in (1, 2):
        check(split, tests, states(split, count), torch.arange(9001 - kept, 9001, device=DEVICE))
    check(split, tests, states(split, 2))


def test_what_is_no_number_is_seen():
    split = made("llama")
    tests = ExitTests.of(split)
    hidden = states(split, 3)
    hidden[1, 5] = math.nan
    assert told(tests(hidden, None)[0]).sound.tolist() == [True, False, True]
    with torch.no_grad():
        split.head.weight[60] = math.inf
    assert told(tests(states(split, 2), None)[0]).sound.tolist() == [False, False]
    best = told(tests(states(split, 1), None, torch.tensor([[-1, -1]], device=DEVICE))[0])
    assert (best.values.tolist(), best.tokens.tolist()) == ([[-math.inf] * 2], [[-1, -1]])
    assert best.normaliser.tolist() == [-math.inf]


def test_the_best_of_one_token():
    best = best_of(torch.tensor([[3.0]]))
    again = told(packed(best))
    assert (again.values.tolist(), again.tokens.tolist(), again.normaliser.tolist()) == (
        [[3, -math.inf]],
        [[0, -1]],
        [3],
    )


def test_what_is_packed_is_told():
    best = Best(torch.tensor([[2.5, -0.1]]), torch.tensor([[128255, 3]]), torch.tensor([math.nan]))
    again = told(packed(best))
    assert torch.equal(again.values, best.values)
    assert torch.equal(again.tokens, best.tokens)
    assert again.normaliser.isnan().all()


def test_rows_of_the_head_are_read_where_they_lie():
    split = made("gemma2")
    tests, x = ExitTests.of(split), states(split, 4)
    for ids in (torch.randint(VOCABULARY, (4, 20)), torch.arange(0, VOCABULARY, 3)):
        expected = split.project(x, split.gather(ids.to(DEVICE)))
        torch.testing.assert_close(tests.project(x, ids.to(DEVICE)), expected, rtol=1e-5, atol=1e-6)


def test_a_norm_of_another_kind_is_none():
    like = torch.randn(32, device=DEVICE)

    class Strange(nn.Module):
        weight, eps = like, 1e-6

        def forward(self, x):
            return x / x.abs().amax(-1, keepdim=True) * self.weight

    assert Norm.of(Strange(), like) is None
    assert Norm.of(nn.LayerNorm(16).to(DEVICE), like) is None
    assert Norm.of(nn.LayerNorm(32, eps=0.3).to(DEVICE), like)[::3] == (2, 0.3)
    assert Norm.of(nn.RMSNorm(32, eps=0.2).to(DEVICE), like)[::3] == (1, 0.2)


def test_other_heads_norms_and_formats_are_left_to_torch(caplog):
    def reason(split):
        caplog.clear()
        assert ExitTests.of(split) is None
        return caplog.text

    split = made("llama")
    split.norm = nn.Softmax(-1)
    assert "Softmax is no norm that they know" in reason(split)
    split = made("llama")
    split.head = nn.Sequential(split.head)
    split.head.weight = split.head[0].weight
    assert "the head is no ordinary linear layer" in reason(split)
    assert "float64" in reason(made("llama", torch.float64))


def test_a_hook_on_the_head_is_called():
    model = CudaModel(copy.deepcopy(tiny("llama")).to(DEVICE))
    assert model.is_current
    model.head.register_forward_hook(lambda *_: None)
    assert not model.is_current
    assert not CudaModel(model.model).fused


# ---------------------------------------------------------------- decoding

POLICIES = {
    "full": None,
    "softmax": {},
    "max": {"confidence": "max", "skipped": "defer"},
    "verify": {"confidence": "max", "skipped": "verify", "draft": "adaptive"},
    "entropy": {"confidence": "entropy"},
    "state": {"confidence": "state", "threshold": 0.8},
    "jsd": {"confidence": "jsd", "min_layer": 2},
    "frequent": {"vocabulary": "frequent"},
    **{f"frequent-{kind}": {"vocabulary": f"frequent-{kind}"} for kind in ("fixed", "adaptive")},
    **{kind: {"vocabulary": kind} for kind in ("fixed", "decaying", "adaptive")},
}


@torch.no_grad()
def decoded(split, inputs, policy):
    ids, mask = inputs["input_ids"].to(DEVICE), inputs["attention_mask"].to(DEVICE)
    steps = list(decode(split, ids, policy, max_new_tokens=12, mask=mask))
    return [(step.token.tolist(), step.exit_layer.tolist()) for step in steps]


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_tokens_and_layers_are_those_of_torch(name, kind):
    options = POLICIES[kind]
    policy = None if options is None else ExitPolicy(**{"threshold": 0.1, "min_layer": 1, **options})
    exits = made(name, lens="full").exits
    exits = exits.with_frequent(torch.arange(0, VOCABULARY, 2))
    model = CudaModel(copy.deepcopy(tiny(name)).to(DEVICE))
    split = SplitModel(copy.deepcopy(tiny(name)).to(DEVICE))
    assert model.fused
    model.exits, split.exits = exits, exits
    for batch in (1, 3):
        inputs = inputs_for(name, batch, padded=batch > 1)
        assert decoded(model, inputs, policy) == decoded(split, inputs, policy)

"""Rows that join a running batch and leave it get the tokens they get alone."""

import random

import pytest
import torch

import offramp
from offramp.core.costs import Ledger
from offramp.core.decoding import decode
from offramp.core.running import Asked, RunningBatch
from offramp.core.sampling import Sampler
from offramp.families import SplitModel
from offramp.native.model import NativeModel
from test_drafter import drafting
from tiny import LAYERS, tiny

POLICIES = {
    "full": None,
    "max": offramp.ExitPolicy(confidence="max", threshold=0.03, min_layer=1),
    "softmax-pruned": offramp.ExitPolicy(threshold=0.005, min_layer=1, vocabulary="fixed", vocabulary_size=20),
    "state": offramp.ExitPolicy(confidence="state", threshold=0.5, min_layer=2),
    "defer": offramp.ExitPolicy(confidence="max", threshold=0.03, min_layer=1, skipped="defer"),
    "verify": offramp.ExitPolicy(confidence="max", threshold=0.03, min_layer=1, skipped="verify", draft_length=3),
    "verify-adaptive": offramp.ExitPolicy(
        confidence="max", threshold=0.03, min_layer=1, skipped="verify", draft="adaptive", draft_length=4
    ),
    "static": offramp.ExitPolicy(confidence="static", min_layer=2),
    "prompt-layer": offramp.ExitPolicy(confidence="max", threshold=0.03, min_layer=1, prompt_layer=2),
}
EOS = 3


def split_of(name, engine):
    model = tiny(name)
    return SplitModel(model) if engine == "torch" else NativeModel(model)


def sampler(seed=None, **options):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return Sampler(eos=(EOS,), sample=seed is not None, generator=generator, **options)


def alone(split, policy, asked, seed=None):
    ids = torch.tensor([list(asked.ids)])
    sampler_ = sampler(seed, processors=asked.sampler.processors)
    steps = decode(split, ids, policy, max_new_tokens=asked.max_new_tokens, sampler=sampler_)
    return [(int(step.token[0]), int(step.exit_layer[0])) for step in steps]


def requests(count, vocabulary, seed=0):
    rng = random.Random(seed)
    return [
        Asked([rng.randrange(4, vocabulary) for _ in range(rng.randint(1, 23))], rng.randint(1, 14), sampler())
        for _ in range(count)
    ]


def served(batch, asked, seed=0):
    """Everything that comes of requests which arrive at random moments."""
    rng, waiting, owner, made = random.Random(seed), list(enumerate(asked)), {}, [[] for _ in asked]
    while waiting or batch.active:
        while waiting and batch.free and rng.random() < 0.6:
            index, one = waiting.pop(0)
            owner[batch.admit(one)] = index
        for token in batch.step():
            made[owner[token.row]].append((token.token, token.exit_layer))
            assert not token.ended or token.row not in batch.active
    assert sorted(batch.free) == list(range(len(batch.free)))
    return made


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_each_row_gets_what_it_gets_alone(policy, name, engine):
    split = split_of(name, engine)
    asked = requests(9, split.shape.vocabulary)
    batch = RunningBatch(split, POLICIES[policy], rows=3, longest=48, chunk=7, eos=(EOS,), draft_rows=3)
    made = served(batch, asked)
    assert made == [alone(split, POLICIES[policy], one) for one in asked]
    assert batch.ledger.costs.tokens == sum(map(len, made))
    assert batch.ledger.costs.exit_layers == sum(layer for tokens in made for _, layer in tokens)


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("accept", [1.0, 0.3])
@pytest.mark.parametrize("draft_rows", [0, 1, 2, 4])
def test_rows_with_a_drafter_get_what_they_get_alone(draft_rows, accept, engine):
    """Whether they draft depends on how many are active; what they write does not."""
    split = split_of("llama", engine)
    split.exits = drafting(split, frequent=list(range(4, 60)))
    policy = offramp.ExitPolicy(
        confidence="max", threshold=0.0, min_layer=0, vocabulary="frequent", skipped="verify", draft_length=3,
        accept=accept,
    )  # fmt: skip
    asked = requests(9, split.shape.vocabulary)
    batch = RunningBatch(split, policy, rows=4, longest=48, chunk=7, eos=(EOS,), draft_rows=draft_rows)
    made = served(batch, asked)
    expected = [alone(split, policy, one) for one in asked]
    assert [[token for token, _ in row] for row in made] == [[token for token, _ in row] for row in expected]
    if draft_rows == 4 or accept < 1:
        assert made == expected
    if draft_rows == 0 and accept == 1:
        assert {layer for row in made for _, layer in row} == {LAYERS}


@pytest.mark.parametrize("policy", ["full", "max", "verify"])
def test_rows_draw_with_generators_of_their_own(policy):
    split = split_of("llama", "native")
    asked = [
        Asked(one.ids, one.max_new_tokens, sampler(seed))
        for seed, one in enumerate(requests(6, split.shape.vocabulary))
    ]
    batch = RunningBatch(split, POLICIES[policy], rows=4, longest=48, eos=(EOS,))
    drafts = policy == "verify"  # whether one drafts depends on the others, so what is drawn must not
    expected = [alone(split, None if drafts else POLICIES[policy], one, seed) for seed, one in enumerate(asked)]
    assert served(batch, asked) == expected


@pytest.mark.parametrize("policy", ["max", "verify"])
def test_a_row_may_go_at_full_depth_beside_others_that_leave(policy):
    split = split_of("llama", "native")
    one, other = requests(2, split.shape.vocabulary, seed=5)
    full = Asked(one.ids, 12, sampler(), threshold=None)
    batch = RunningBatch(split, POLICIES[policy], rows=2, longest=48, eos=(EOS,), draft_rows=2)
    made = served(batch, [full, other])
    assert made[0] == alone(split, None, full)
    assert {layer for _, layer in made[0]} == {LAYERS}
    assert made[1] == alone(split, POLICIES[policy], other)


def test_a_row_may_have_a_threshold_of_its_own():
    split = split_of("llama", "native")
    asked = [Asked(range(5, 12), 10, sampler(), threshold=tau) for tau in (0.0, 0.02, 0.05, 1.0)]
    batch = RunningBatch(split, POLICIES["max"], rows=4, longest=48, eos=(EOS,))
    policies = [offramp.ExitPolicy(confidence="max", threshold=one.threshold, min_layer=1) for one in asked]
    assert served(batch, asked) == [alone(split, p, one) for p, one in zip(policies, asked, strict=True)]


def first_tokens(lengths, chunk=4):
    """In which step each prompt of so many tokens gets its first token, where one comes with each step."""
    split = split_of("llama", "native")
    batch = RunningBatch(split, None, rows=len(lengths), longest=48, chunk=chunk)
    owner, seen = {}, {}
    for step in range(1, 40):
        if step <= len(lengths):
            owner[batch.admit(Asked(range(5, 5 + lengths[step - 1]), 20))] = step - 1
        assert sum(end - begin for _, begin, end in batch.pieces()) <= chunk
        for token in batch.step():
            seen.setdefault(owner[token.row], step)
    return [seen[index] for index in range(len(lengths))]


def test_short_prompts_overtake_long_ones():
    assert first_tokens([24]) == [6]
    assert first_tokens([24, 3, 2, 1]) == [8, 2, 3, 4]


def test_a_long_prompt_waits_for_no_longer_than_it_takes_to_read():
    """Short ones that take all there is to read come with every step: at first they pass, then it is read at a go."""
    assert first_tokens([24] + [4] * 11) == [10, 2, 3, 4, 5, 11, 12, 13, 14, 15, 16, 17]


@pytest.mark.parametrize("policy", ["max", "defer", "verify"])
def test_a_released_row_leaves_nothing_behind(policy):
    """Rows given back in the midst of their prompt, their answer or their drafts do not touch those after them."""
    split = split_of("llama", "native")
    asked = requests(8, split.shape.vocabulary, seed=2)
    batch = RunningBatch(split, POLICIES[policy], rows=2, longest=48, chunk=5, eos=(EOS,))
    for steps, one in enumerate(asked[:5]):
        row = batch.admit(Asked(one.ids, 14, sampler()))
        for _ in range(steps):
            if row in batch.active:
                batch.step()
        if row in batch.active:
            batch.release(row)
    assert batch.active == []
    assert served(batch, asked[5:]) == [alone(split, POLICIES[policy], one) for one in asked[5:]]


def test_what_is_owed_to_deeper_layers_does_not_pile_up():
    split = split_of("llama", "native")
    batch = RunningBatch(split, POLICIES["max"], rows=2, longest=48, eos=(EOS,))
    for round_ in range(6):
        served(batch, requests(4, split.shape.vocabulary, seed=round_))
    assert batch._batch.way.left == []


@pytest.mark.parametrize("policy", ["full", "max", "verify"])
def test_log_probabilities_are_those_of_the_readout(policy):
    split = split_of("llama", "torch")
    ids = list(range(5, 12))
    batch = RunningBatch(split, POLICIES[policy], rows=1, longest=48, eos=(EOS,))
    with_top, without = [], []
    for top, into in ((3, with_top), (0, without)):
        batch.admit(Asked(ids, 6, sampler(), top=top))
        while batch.active:
            into += batch.step()
    for seen, bare in zip(with_top, without, strict=True):
        assert (seen.token, seen.exit_layer) == (bare.token, bare.exit_layer)
        assert seen.logprob == pytest.approx(bare.logprob, abs=1e-4)
        assert seen.top[0] == (seen.token, pytest.approx(seen.logprob))
        assert len(seen.top) == 3
    if policy == "max":
        return
    tokens = torch.tensor([ids + [token.token for token in without]])
    logits = split.model(tokens).logits.float().log_softmax(-1)[0, len(ids) - 1 : -1]
    expected = logits.gather(1, tokens[0, len(ids) :, None])[:, 0].tolist()
    assert [token.logprob for token in without] == pytest.approx(expected, abs=1e-3)


def test_what_cannot_run_beside_others_is_refused():
    split = SplitModel(tiny("llama"))
    adaptive = offramp.ExitPolicy(threshold=0.5, adaptive=True, min_layer=2, skipped="defer")
    for policy, words in ((adaptive, "adaptive"), (offramp.ExitPolicy(threshold=0.5, batch="all"), "batch='all'")):
        with pytest.raises(ValueError, match=words):
            RunningBatch(split, policy, rows=1, longest=8)
    with pytest.raises(ValueError, match="encoder-decoders"):
        RunningBatch(SplitModel(tiny("t5")), None, rows=1, longest=8)
    batch = RunningBatch(split, POLICIES["static"], rows=1, longest=8)
    with pytest.raises(ValueError, match="leave after layer 2"):
        batch.admit(Asked([5], 2, threshold=None))
    with pytest.raises(ValueError, match="at most 8 together"):
        batch.admit(Asked([5] * 7, 2))
    with pytest.raises(ValueError, match="at least 1"):
        batch.admit(Asked([], 2))
    row = batch.admit(Asked([5], 2))
    with pytest.raises(ValueError, match="rows are taken"):
        batch.admit(Asked([5], 2))
    batch.release(row)
    with pytest.raises(ValueError, match="is free"):
        batch.release(row)
    verify = RunningBatch(split, POLICIES["verify"], rows=1, longest=8)
    with pytest.raises(ValueError, match="no token depends on it"):
        verify.admit(Asked([5], 2, threshold=0.5))


def test_costs_are_those_of_the_rows_alone():
    split = split_of("llama", "torch")
    asked = requests(4, split.shape.vocabulary)
    batch = RunningBatch(split, POLICIES["max"], rows=2, longest=48, eos=(EOS,))
    served(batch, asked)
    flops = 0
    for one in asked:
        ledger = Ledger(split.shape, split.device)
        for _ in decode(
            split, torch.tensor([list(one.ids)]), POLICIES["max"], max_new_tokens=one.max_new_tokens,
            sampler=sampler(), ledger=ledger,
        ):  # fmt: skip
            pass
        flops += ledger.costs.flops
    assert batch.ledger.costs.flops == pytest.approx(flops, rel=0.02)  # keys owed at a row's end are never filled

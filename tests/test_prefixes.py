"""What prompts begin with is computed once: no row's tokens change for it, and no more is kept than has room."""

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

import offramp
from few_bits import model_in, rounded
from offramp.core.prefixes import Prefixes
from offramp.core.running import Asked, RunningBatch
from offramp.cuda.model import CudaModel
from offramp.families import SplitModel
from offramp.families.state import BLOCK
from offramp.native.model import NativeModel
from test_branches import two_exits
from test_drafter import drafting
from test_running import EOS, POLICIES, alone, sampler, served, split_of
from tiny import tiny

DRAFTS = offramp.ExitPolicy(
    confidence="max", threshold=0.0, min_layer=0, vocabulary="frequent", skipped="verify", draft_length=3, accept=0.3
)


def asked_next(texts, rng, vocabulary, count=10, longest=64, seeded=False):
    """Requests whose prompts begin with parts of texts and end anyhow."""
    made = []
    for _ in range(count):
        begin = rng.choice([*texts, []])
        ids = begin[: rng.randint(0, len(begin))] + [rng.randrange(4, vocabulary) for _ in range(rng.randint(1, 20))]
        ids = ids[: longest - 14]
        made.append(Asked(ids, rng.randint(1, 14), sampler(rng.randrange(99) if seeded else None)))
    return made


def check_waves(split, policy, keep, *, seeded=False, draft_rows=3):
    """Three waves of requests, each beginning with parts of earlier prompts and answers; how many tokens were kept."""
    rng, texts, cached = random.Random(keep), [], 0
    batch = RunningBatch(
        split, policy, rows=3, longest=64, chunk=7, eos=(EOS,), keep=keep, draft_rows=draft_rows
    )  # fmt: skip
    step = batch.step

    def counted():
        nonlocal cached
        made = step()
        cached += sum(token.cached for token in made if token.prefill)
        return made

    batch.step = counted
    for wave in range(3):
        asked = asked_next(texts, rng, split.shape.vocabulary, seeded=seeded)
        seeds = [one.sampler.generator.initial_seed() if seeded else None for one in asked]
        expected = [alone(split, policy, one, seed) for one, seed in zip(asked, seeds, strict=True)]
        assert served(batch, asked, seed=wave) == expected
        texts += [[*one.ids, *(token for token, _ in new)] for one, new in zip(asked, expected, strict=True)]
        assert batch.prefixes.tokens <= keep
    return cached


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("keep", [48, 4096])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_that_do_not_compute_what_their_prompts_begin_with_get_what_they_get_alone(name, keep, policy):
    """Whatever of it was kept, and whatever has had to go."""
    assert check_waves(split_of(name, "native"), POLICIES[policy], keep) > 0


@pytest.mark.parametrize("draft_rows", [0, 4])
def test_a_drafter_knows_what_it_would_have_seen(draft_rows):
    split = split_of("llama", "native")
    split.exits = drafting(split, frequent=list(range(4, 60)))
    assert check_waves(split, DRAFTS, 512, draft_rows=draft_rows) > 0


@pytest.mark.parametrize("policy", ["full", "max"])
def test_rows_that_are_drawn_get_what_they_get_alone(policy):
    assert check_waves(split_of("llama", "native"), POLICIES[policy], 4096, seeded=True) > 0


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
def test_so_they_do_in_fewer_bits(form):
    assert check_waves(NativeModel(model_in(form, tiny("llama")), rounded=rounded(form)), POLICIES["max"], 4096) > 0


@pytest.mark.parametrize("policy", ["max", "verify"])
def test_exits_with_blocks_of_their_own_have_theirs_kept(policy):
    split = split_of("llama", "native")
    split.exits = two_exits(split)
    rule = dataclasses.replace(POLICIES[policy], min_layer=None, exit_layers=split.exit_layers)
    assert check_waves(split, rule, 4096) > 0


@pytest.mark.parametrize("policy", ["full", "max", "defer", "verify"])
@pytest.mark.parametrize("engine", [SplitModel, CudaModel])
def test_other_engines_can_be_asked_to_do_it(engine, policy):
    """Up to rounding, which changes no token of this model."""
    assert check_waves(engine(tiny("llama")), POLICIES[policy], 512) > 0


def test_what_leaves_early_is_not_kept():
    """Keys and values of such tokens are not those that a prompt's own pass gives them."""
    split, ids = split_of("llama", "native"), list(range(5, 5 + BLOCK))
    leaving = offramp.ExitPolicy(confidence="max", threshold=0.0, min_layer=1)
    for policy, kept in ((leaving, BLOCK), (None, 2 * BLOCK)):
        batch = RunningBatch(split, policy, rows=1, longest=64, keep=512)
        (answer,) = served(batch, [Asked(ids, 2 * BLOCK)])
        assert len(answer) == 2 * BLOCK
        assert batch.prefixes.known([*ids, *(token for token, _ in answer)]) == kept  # the last one was never read


def test_a_prompt_that_wants_to_be_computed_is():
    split = split_of("llama", "native")
    batch, ids = RunningBatch(split, None, rows=1, longest=64, keep=512), list(range(5, 45))
    cached = []
    for recall in (True, True, False):
        batch.admit(Asked(ids, 1, recall=recall))
        (token,) = batch.step()
        cached.append(token.cached)
    assert cached == [0, 32, 0]  # whole blocks


def test_rows_that_wait_take_what_others_have_read_meanwhile():
    split = split_of("llama", "native")
    batch, ids = RunningBatch(split, None, rows=3, longest=64, chunk=16, keep=512), list(range(5, 53))
    for last in range(3):
        batch.admit(Asked([*ids, last], 1))
    steps = [[token.cached for token in batch.step()] for _ in range(4)]
    assert steps == [[], [], [], [32, 32, 32]]  # each has read a piece for all, and then its own last token


class Blocks:
    """Two rows with a single layer, which holds one number for each token."""

    def __init__(self):
        self.rows = torch.zeros(2, 1, 10 * BLOCK)

    def blocks_of(self, context, row, layers, begin, end):
        return [self.rows[row, :, begin:end].unflatten(1, (-1, BLOCK))]


class Listed:
    """What `Prefixes` says of itself, as a list of the beginnings that are kept, the one used least recently first."""

    def __init__(self, room):
        self.room, self.kept, self.born = room, [], []

    def longest(self, text):
        return max((alike(text, some) for some in self.kept), default=0)

    def used(self, path):
        for some in reversed(path):
            self.kept.remove(some)
            self.kept.append(some)

    def load(self, text):
        """The first of those that begin as the text does, and go on as it does for longest."""
        if longest := self.longest(text):
            fits = [some for some in self.born if alike(text, some) == longest and len(some) < longest + BLOCK]
            self.used(beginnings(fits[0]))

    def save(self, text):
        path = [some for some in beginnings(text) if some in self.kept]
        self.used(path)
        for some in beginnings(text)[len(path) :]:
            if len(self.kept) == self.room:
                if not self.kept or self.kept[0] in path:
                    break
                self.born.remove(self.kept.pop(0))
            self.kept.append(some)
            self.born.append(some)
            path.append(some)
        self.used(path)


def beginnings(text):
    """Those of whole blocks."""
    return [tuple(text[: end * BLOCK]) for end in range(1, len(text) // BLOCK + 1)]


def alike(one, other):
    """How many first elements are the same."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def numbers(text):
    """One for each token, by all that stands before it."""
    return [float(hash(tuple(text[: end + 1])) % 1000) for end in range(len(text))]


@pytest.mark.parametrize("room", [0, 3, 8, 200])
def test_what_is_known_of_a_text_is_the_longest_beginning_kept(room):
    model, rng, texts, listed = Blocks(), random.Random(room), [[]], Listed(room)
    prefixes = Prefixes(model, SimpleNamespace(reach=lambda slots: None), [0], room * BLOCK)
    for _ in range(300):
        begin = rng.choice(texts)
        begin = begin[: rng.randint(0, len(begin))]
        text = (begin + [rng.randrange(9) for _ in range(rng.randint(1, 60))])[: 10 * BLOCK]
        texts.append(text)
        longest = listed.longest(text)
        assert prefixes.known(text) == longest
        assert prefixes.load(0, text) == (longest, None)
        assert model.rows[0, 0, :longest].tolist() == numbers(text)[:longest]
        listed.load(text)
        model.rows[1, 0, : len(text)] = torch.tensor(numbers(text))
        prefixes.save(1, text)
        listed.save(text)
        assert prefixes.tokens == len(listed.kept) * BLOCK <= room * BLOCK

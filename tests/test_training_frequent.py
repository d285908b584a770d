"""Counting frequent tokens, against a Counter; what training makes of them."""

import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import training_runs
from offramp import ExitPolicy, LanguageModel
from offramp.hub.exit_files import load_exits
from offramp.training.data import Data, Document, cut
from offramp.training.frequent import Listing, frequent_tokens, listed, share_covered
from offramp.training.trainer import train
from tiny import inputs_for, tiny
from training_runs import config, data, model

SETTINGS = settings(derandomize=True, deadline=None, max_examples=150, database=None)
ids = st.lists(st.integers(0, 30), min_size=1, max_size=40)


def fewest(tokens, coverage, ends):
    """By trying: the ends, then the most frequent one after another until the share is reached."""
    counts = Counter(tokens)
    order = sorted(range(60), key=lambda token: (-counts[token], token))
    chosen = set(ends)
    for token in order:
        if sum(counts[t] for t in chosen) >= coverage * len(tokens) - 1e-9 and len(chosen) >= 2:
            break
        chosen.add(token)
    return sorted(chosen)


@SETTINGS
@given(
    texts=st.lists(st.tuples(ids, st.integers(0, 10)), min_size=1, max_size=6),
    coverage=st.sampled_from([0.1, 0.5, 0.7, 0.9, 0.995, 1.0]),
    ends=st.lists(st.integers(0, 50), max_size=3),
)
def test_the_fewest_tokens_that_cover_a_share(texts, coverage, ends):
    documents = [Document(tuple(text), start, str(i)) for i, (text, start) in enumerate(texts)]
    predicted = [token for text, start in texts for token in text[max(start, 1) :]]
    if not predicted:
        with pytest.raises(ValueError, match="no token is to be predicted"):
            frequent_tokens(documents, coverage)
        return
    found = frequent_tokens(documents, coverage, ends=ends)
    assert found.dtype == torch.int64
    assert found.tolist() == fewest(predicted, coverage, ends)
    share = sum(token in found.tolist() for token in predicted) / len(predicted)
    assert share >= coverage - 1e-9
    assert share_covered(found, documents) == pytest.approx(share)
    assert frequent_tokens(cut(documents, 64), coverage, ends=ends).tolist() == found.tolist()


def test_prompts_do_not_count():
    documents = [Document((7, 7, 7, 7, 8, 9), 4, "a"), Document((7, 7, 9), 2, "b")]
    assert frequent_tokens(documents, 1.0).tolist() == [8, 9]
    assert frequent_tokens(documents, 0.6, ends=[3]).tolist() == [3, 9]


@pytest.mark.parametrize("coverage", [0, -0.1, 1.01, math.nan, "0.5", None])
def test_shares_that_are_none_are_refused(coverage, tmp_path):
    with pytest.raises(ValueError, match="coverage is "):
        frequent_tokens([Document((1, 2, 3), 0, "a")], coverage)
    if coverage is not None:
        with pytest.raises(ValueError, match="coverage is "):
            train(model(), data(), config(steps=1), tmp_path / "run", coverage=coverage)


@pytest.mark.parametrize(("job", "name"), [("exits", "llama"), ("all", "t5"), ("lora", "llama")])
def test_training_saves_a_list_with_the_exits(job, name, tmp_path):
    if job == "lora":
        pytest.importorskip("peft")
    options = {"trainable": job, "steps": 1, "layers": (1, 2)}
    result = train(model(name), data(name), config(**options), tmp_path, coverage=0.6)
    exits, parts = load_exits(result.exits), data(name)
    end = tiny(name).generation_config.eos_token_id
    predicted = [
        part.ids[row, column].item() for part in (parts.train,)
        for row, column in part.counted.nonzero().tolist() if column
    ]  # fmt: skip
    ends = [] if end is None else [end]
    counts = Counter(predicted)
    expected = sorted(counts, key=lambda t: (-counts[t], t))
    while sum(counts[t] for t in {*expected[:-1], *ends}) >= 0.6 * len(predicted):
        expected.pop()
    assert exits.frequent.tolist() == sorted({*expected, *ends})
    listing = result.frequent
    assert listing.tokens == len(exits.frequent)
    assert listing.train == pytest.approx(sum(counts[t] for t in exits.frequent.tolist()) / len(predicted))
    assert listing.train >= 0.6
    assert 0 < listing.held_out < 1
    assert result.table().splitlines()[-1] == str(listing)
    described = json.loads((result.exits / "exits.json").read_text())
    assert described["frequent"] == listing.tokens
    assert described["settings"]["frequent"] == result.to_dict()["frequent"] == {
        "tokens": listing.tokens, "coverage": 0.6, "train": listing.train, "held_out": listing.held_out,
    }  # fmt: skip
    lm = LanguageModel(tiny("llama"))
    if job == "exits":
        lm.attach_exits(exits)
        assert lm.generate(inputs_for("llama"), policy=ExitPolicy(threshold=0.1, vocabulary="frequent")).tokens


def test_a_run_may_go_on_with_another_share(tmp_path):
    """It is no part of what is learnt: the weights stay, the list is another."""
    first, second = (
        load_exits(train(model(), data(), config(steps=2), tmp_path, coverage=share).exits) for share in (0.3, 0.9)
    )
    assert len(first.frequent) < len(second.frequent)
    weights = (e.with_frequent(None).state_dict() for e in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_classifiers_keep_the_list_of_their_exits_unless_told_otherwise(tmp_path):
    lm = model()
    lenses = load_exits(training_runs.run(tmp_path / "lenses", steps=1).exits)
    for number, (given_list, coverage) in enumerate([([3, 5], None), ([3, 5], 0.9), (None, None)]):
        lm.attach_exits(lenses.with_frequent(given_list))
        options = {"objective": "consistency", "steps": 1, "layers": None}
        result = train(lm, data(), config(**options), tmp_path / str(number), coverage=coverage)
        kept = load_exits(result.exits).frequent.tolist() == [3, 5]
        assert kept == (given_list is not None and coverage is None)
        assert result.frequent.coverage == (None if kept else coverage or 0.995)


def test_a_list_of_what_has_a_single_token_has_two():
    lm = LanguageModel(tiny("llama"))
    same = cut([Document((5, 5, 5), 0, "a")], 8)
    exits, listing = listed(lm, model_exits(lm), Data(same, same), None)
    assert exits.frequent.tolist() == [2, 5]
    assert listing == Listing(2, 0.995, 1.0, 1.0)
    assert str(listing) == (
        "frequent vocabulary: 2 tokens cover 100.0% of the tokens trained on, 100.0% of those held out"
    )
    assert frequent_tokens(same).tolist() == [0, 5]


def model_exits(lm):
    from offramp import Exits

    return Exits.fresh(lm.split, (1, 2))

"""Scores of texts equal those of the reference implementations, and keep what they promise."""

import random
import sys

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from offramp.metrics.text import METRICS, normalise

WORDS = ["cat", "dogs", "running", "run", "Paris", "green", "in", "of", "the", "a", "42", "swimming", "über"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)
solid = texts.filter(normalise)  # not articles only


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("an apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre anagram", "theatre anagram"),
        ("the-end", "theend"),  # punctuation goes first, so this is no article
        ("\tLine\none ", "line one"),
        ("“a”", "“ ”"),  # only ASCII punctuation is removed
        ("The", ""),
    ],
)
def test_normalisation_is_that_of_squad(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "match", "f1"),
    [
        ("The Denver Broncos", ["Denver Broncos."], 1, 1),
        ("Broncos", ["Denver Broncos"], 0, 2 / 3),  # precision 1, recall 1/2
        ("Denver Broncos of Denver", ["Denver Broncos"], 0, 2 / 3),  # 2 of 4, 2 of 2: each word counts once
        ("Denver Denver", ["Denver Denver Broncos"], 0, 4 / 5),  # 2 of 2, 2 of 3
        ("carolina panthers", ["Denver Broncos", "Panthers"], 0, 2 / 3),  # the best reference
        ("308", ["308", "three hundred"], 1, 1),
        ("", ["Denver"], 0, 0),
        ("the", ["Denver"], 0, 0),
        ("the", ["a"], 1, 1),  # nothing is left of either (SQuAD 2.0's script)
    ],
)
def test_answers_score_as_in_squad(prediction, references, match, f1):
    assert METRICS["exact_match"](prediction, references) == match
    assert METRICS["f1"](prediction, references) == pytest.approx(f1)


@given(texts, st.lists(texts, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_rouge_is_that_of_rouge_score(prediction, references):
    for kind in ("rouge1", "rouge2", "rougeL"):
        scorer = rouge_scorer.RougeScorer([kind], use_stemmer=True)
        expected = max(scorer.score(reference, prediction)[kind].fmeasure for reference in references)
        assert METRICS[kind](prediction, references) == pytest.approx(expected)


def test_rouge_of_a_case_by_hand():
    prediction, reference = "the dog runs home", "a dog was running to its home"
    # stems dog, run, home are shared and in order; 4 and 7 words; no bigram is shared
    assert METRICS["rouge1"](prediction, [reference]) == pytest.approx(2 * 3 / (4 + 7))
    assert METRICS["rougeL"](prediction, [reference]) == pytest.approx(2 * 3 / (4 + 7))
    assert METRICS["rouge2"](prediction, [reference]) == 0


@given(texts, st.lists(texts, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_bleu_and_chrf_are_those_of_sacrebleu(prediction, references):
    assert METRICS["bleu"](prediction, references) == pytest.approx(
        sacrebleu.BLEU(effective_order=True).sentence_score(prediction, references).score / 100
    )
    assert METRICS["chrf"](prediction, references) == pytest.approx(
        max(sacrebleu.CHRF().sentence_score(prediction, [reference]).score for reference in references) / 100
    )


@pytest.mark.parametrize("name", METRICS)
@given(prediction=texts, references=st.lists(texts, min_size=1, max_size=4), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_scores_lie_in_the_unit_interval_whatever_the_order_of_references(name, prediction, references, seed):
    score = METRICS[name](prediction, references)
    assert 0 <= score <= 1
    random.Random(seed).shuffle(references)
    assert METRICS[name](prediction, references) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
@given(text=solid.filter(lambda text: len(text.split()) > 1), others=st.lists(texts, max_size=2))
@settings(max_examples=25, deadline=None)
def test_a_text_agrees_with_itself(name, text, others):
    assert METRICS[name](text, [*others, text]) == pytest.approx(1)


@pytest.mark.parametrize("name", METRICS)
def test_an_empty_prediction_scores_nothing(name):
    assert METRICS[name]("", ["the sky is blue"]) == 0


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ModuleNotFoundError, match=r"need sacrebleu; install it with: pip install 'offramp\[eval\]'"):
        METRICS["chrf"]("a", ["a"])

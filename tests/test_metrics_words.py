"""Words in any script, and metrics that read them; expected values counted by hand or taken from `sacrebleu`."""

import sys
from types import SimpleNamespace

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer, tokenize

from offramp.metrics import text as words_module
from offramp.metrics.text import METRICS, bleu_tokeniser, corpus_metric, normalise, parted, reads, tokenisers, words

CHINESE, OTHER_CHINESE = "今天天气很好我们去公园散步", "昨天下雨他在家读书"
JAPANESE, KOREAN, THAI, HINDI = "今日は天気がいいです", "오늘은 날씨가 좋다", "วันนี้อากาศดี", "आज मौसम अच्छा है"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's 42 hats", ["the", "cat", "s", "42", "hats"]),
        ("snake_case", ["snake", "case"]),
        ("Über den Fluß", ["über", "den", "fluß"]),
        ("u\u0308ber", ["über"]),  # an accent of its own is the same letter
        ("don’t", ["don", "t"]),
        ("Привет, мир!", ["привет", "мир"]),
        ("今天3点见", ["今", "天", "3", "点", "见"]),
        ("iPhone手机", ["iphone", "手", "机"]),
        ("１２", ["12"]),
        (KOREAN, ["오늘은", "날씨가", "좋다"]),
        (HINDI, ["आज", "मौसम", "अच्छा", "है"]),  # vowel signs are no blanks
        ("ดีที่", ["ดี", "ที่"]),  # nor do they stand alone
        ("co\u00adoperate", ["cooperate"]),
        ("👍 !?", []),
        ("", []),
    ],
)
def test_words_of_any_script(text, expected):
    assert words(text) == expected


@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=40))
@settings(max_examples=200, deadline=None)
def test_words_of_ascii_are_those_of_rouge_score(text):
    assert words(text) == tokenize.tokenize(text, None)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_word_is_empty_and_no_letter_is_lost(text):
    found = words(text)
    assert all(found)
    assert parted("".join(found)) or not found


@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=40), st.text(alphabet="ab 1.,THE", max_size=20))
@settings(max_examples=100, deadline=None)
def test_rouge_of_ascii_is_that_of_rouge_score(prediction, reference):
    for kind in ("rouge1", "rouge2", "rougeL"):
        expected = rouge_scorer.RougeScorer([kind], use_stemmer=True).score(reference, prediction)[kind].fmeasure
        assert METRICS[kind](prediction, [reference]) == expected


def test_rouge_of_english_with_a_foreign_letter_stems_the_rest():
    assert METRICS["rouge1"]("cafés running", ["cafés runs"]) == 1  # rouge-score: "caf", "s", and the stem run
    assert METRICS["rouge1"]("cafés", ["caf s"]) == 0


def test_rouge_reads_chinese():
    assert METRICS["rougeL"](CHINESE, [CHINESE]) == 1
    # 天, 在 … of 13 and 9 characters, in order: 天 only
    assert METRICS["rougeL"](OTHER_CHINESE, [CHINESE]) == pytest.approx(2 * 1 / (13 + 9))
    assert METRICS["rouge2"]("天气好", ["天气很好"]) == pytest.approx(2 * 1 / (2 + 3))


@pytest.mark.parametrize("text", [CHINESE, JAPANESE, KOREAN, THAI, HINDI, "Привет мир", "über den Fluß"])
@pytest.mark.parametrize("name", METRICS)
def test_every_metric_reads_every_script(name, text):
    assert reads(name, text)
    assert METRICS[name]("x", [text]) < 0.5


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("rougeL", "!!!", False), ("rougeL", "👍", False), ("rougeL", "", False), ("rouge2", "yes", False),
        ("f1", "The!", False), ("exact_match", "。", False), ("f1", "", True), ("exact_match", "", True),
        ("bleu", "", False), ("chrf", "", False), ("chrf", "!!!", True), ("bleu", "👍", True), ("f1", "👍", True),
    ],
)  # fmt: skip
def test_what_a_metric_cannot_read(name, text, expected):
    assert reads(name, text) is expected


def test_f1_of_chinese_is_of_characters():
    assert METRICS["f1"]("今天很好", ["今天"]) == pytest.approx(2 * 2 / (4 + 2))
    assert METRICS["f1"]("蓝色。", ["蓝色"]) == METRICS["exact_match"]("蓝色。", ["蓝色"]) == 1
    assert METRICS["f1"]("iPhone 手机", ["iphone"]) == pytest.approx(2 * 1 / (3 + 1))
    assert normalise("“a” – b") == "“ ” – b"  # as in SQuAD's script


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["the sky"], "13a"), ([""], "13a"), (["Привет мир"], "13a"), ([HINDI], "13a"), (["über"], "13a"),
        ([CHINESE], "zh"), (["iPhone 手机很好"], "zh"), (["He said 你好 to all of them"], "13a"),
        ([CHINESE, "OK", "2024"], "zh"), ([THAI], "char"),
    ],
)  # fmt: skip
def test_bleus_tokeniser_suits_the_script(texts, expected):
    assert bleu_tokeniser(texts) == expected


def test_japanese_and_korean_go_by_characters_where_mecab_is_missing(monkeypatch):
    monkeypatch.setattr(words_module, "find_spec", lambda name: None)
    assert (bleu_tokeniser([JAPANESE]), bleu_tokeniser([KOREAN])) == ("char", "char")
    monkeypatch.setattr(words_module, "find_spec", lambda name: SimpleNamespace())
    assert (bleu_tokeniser([JAPANESE]), bleu_tokeniser([KOREAN])) == ("ja-mecab", "ko-mecab")
    assert bleu_tokeniser([CHINESE, JAPANESE]) == "ja-mecab"


def test_bleu_of_chinese_is_sacrebleus():
    prediction, references = "今天天气不好", [CHINESE, "今天天气好"]
    expected = sacrebleu.sentence_bleu(prediction, references, tokenize="zh").score / 100
    assert METRICS["bleu"](prediction, references) == pytest.approx(expected) != pytest.approx(0)
    streams = [[references[0], "OK"], [references[1], "ok"]]
    corpus = corpus_metric("bleu", [references, ["OK", "ok"]]).corpus_score([prediction, "ok"], streams).score
    assert corpus == pytest.approx(sacrebleu.corpus_bleu([prediction, "ok"], streams, tokenize="zh").score)


def test_tokenisers_are_named():
    names = ["rougeL", "bleu", "f1", "exact_match", "chrf"]
    plain = {"rougeL": "rouge-score", "bleu": "13a", "f1": "squad", "exact_match": "squad"}
    assert tokenisers(names, ["the sky"]) == plain
    assert tokenisers(names, ["the sky", CHINESE * 2])["rougeL"] == "unicode"
    assert tokenisers(["bleu"], [CHINESE]) == {"bleu": "zh"}


def test_words_need_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert tokenisers(["bleu"], [CHINESE]) == {"bleu": "zh"}

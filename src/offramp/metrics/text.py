"""How well a text agrees with references: per sample in [0, 1], and for a whole corpus.

ROUGE is that of `rouge-score`, BLEU and chrF are those of `sacrebleu` with its defaults (extra `eval`). What these
cannot read is divided otherwise: words of other letters than a-z for ROUGE and F1 by `offramp.metrics.words`, texts of
scripts without blanks for BLEU by the tokeniser of `sacrebleu` that is made for them. `tokenisers` says by which.
"""

from __future__ import annotations

import importlib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from offramp.metrics.words import bleu_tokeniser, parted, words

Metric = Callable[[str, Sequence[str]], float]
"""(prediction, references, at least one) -> score in [0, 1], the best over the references."""

# ---------------------------------------------------------------- answers


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single blanks.

    Punctuation is that of ASCII, as in SQuAD's script, which leaves typographic quotes and dashes; and that of scripts
    other than the Latin one, such as full stops of Chinese.

    Returns:
        What is compared.
    """
    text = "".join(character for character in text.lower() if not _is_punctuation(character))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _is_punctuation(character: str) -> bool:
    if character < "\u0370":
        return character in string.punctuation
    return unicodedata.category(character)[0] == "P" and not "\u2000" <= character <= "\u206f"


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference after normalisation, else 0 (Rajpurkar et al., 2016)."""
    return float(normalise(prediction) in map(normalise, references))


def f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the bags of words after normalisation (Rajpurkar et al., 2016), best over references.

    Where a script is written without blanks every character counts as a word, as in the scripts of CMRC 2018 and MLQA.
    Where normalisation leaves nothing of one text, the score is 1 if nothing is left of the other and 0 if not, as in
    the script for SQuAD 2.0; that for 1.1 says 0 for both.

    Returns:
        The score, in [0, 1].
    """
    bag = _bag(prediction)
    return max(_bag_f1(bag, _bag(reference)) for reference in references)


def _bag(text: str) -> list[str]:
    return [part for word in normalise(text).split() for part in parted(word)]


def _bag_f1(bag: list[str], wanted: list[str]) -> float:
    if not bag or not wanted:
        return float(bag == wanted)
    common = sum((Counter(bag) & Counter(wanted)).values())
    return 2 * common / (len(bag) + len(wanted))  # the harmonic mean of precision and recall


# ---------------------------------------------------------------- summaries and translations


def rouge(kind: str, prediction: str, references: Sequence[str]) -> float:
    """F-measure of ROUGE (Lin, 2004) on words, those of a-z and 0-9 stemmed, best over references.

    On texts in ASCII it is that of `rouge-score`, which takes all other letters for blanks; here they are letters. The
    kinds are "rouge1", "rouge2", and "rougeL", which takes a text as one sentence.

    Returns:
        The score, in [0, 1].
    """
    score: float = _rouge(kind).score_multi(references, prediction)[kind].fmeasure
    return score


@cache
def _rouge(kind: str) -> Any:
    return _require("rouge_score.rouge_scorer").RougeScorer([kind], tokenizer=_RougeWords())


class _RougeWords:
    """What `rouge-score` divides texts by: its own tokeniser for a-z and 0-9, and words of all other letters."""

    def __init__(self) -> None:
        self._own = _require("rouge_score.tokenizers").DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Words, stemmed."""
        if text.isascii():
            return list(self._own.tokenize(text))
        return [part for word in words(text) for part in (self._own.tokenize(word) if word.isascii() else [word])]


def bleu(prediction: str, references: Sequence[str]) -> float:
    """BLEU of a sentence (Papineni et al., 2002) with exponential smoothing and effective order, over 100.

    References are taken together, as BLEU does: n-grams may come from any of them. They also decide how words are found
    (`offramp.metrics.words.bleu_tokeniser`).

    Returns:
        The score, in [0, 1].
    """
    return _share(_bleu(bleu_tokeniser(references)).sentence_score(prediction, references).score)


@cache
def _bleu(tokeniser: str) -> Any:
    return _require("sacrebleu").BLEU(tokenize=tokeniser, effective_order=True)


def chrf(prediction: str, references: Sequence[str]) -> float:
    """chrF2 of a sentence (Popović, 2015), over 100, best over references."""
    return _share(_require("sacrebleu").sentence_chrf(prediction, references).score)


def _share(score: float) -> float:
    return min(score / 100, 1.0)  # a perfect score is 100 but for rounding


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = error.name or module
        raise ModuleNotFoundError(
            f"ROUGE, BLEU and chrF need {name}; install it with: pip install 'offramp[eval]'", name=name
        ) from error


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "f1": f1,
    "rouge1": partial(rouge, "rouge1"),
    "rouge2": partial(rouge, "rouge2"),
    "rougeL": partial(rouge, "rougeL"),
    "bleu": bleu,
    "chrf": chrf,
}
"""Scores of one sample by name; larger is better."""


# ---------------------------------------------------------------- what a metric makes of texts


def tokenisers(names: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    """What divides texts for the metrics that look at words.

    Returns:
        By name of the metric: "rouge-score" and "squad", or "unicode" for texts that these do not read in full; for
        BLEU a tokeniser of `sacrebleu`.
    """
    plain = all(word.isascii() for text in texts for word in words(text))
    found = {}
    for name in names:
        if name == "bleu":
            found[name] = bleu_tokeniser(texts)
        elif name.startswith("rouge"):
            found[name] = "rouge-score" if plain else "unicode"
        elif name in ("f1", "exact_match"):
            found[name] = "squad" if plain else "unicode"
    return found


PLAIN = ("rouge-score", "squad", "13a")
"""What texts in English are divided by."""


def reads(name: str, text: str) -> bool:
    """Whether a metric can tell answers apart by a reference: it scores 1 itself, and saying nothing scores less.

    ROUGE does not read a text of nothing but signs; normalisation leaves nothing of "The!" for F1. An empty reference,
    a question without an answer, need only score 1 itself.

    Returns:
        Whether it does.
    """
    metric = METRICS[name]
    return metric(text, [text]) > 1 - 1e-6 and (not text.strip() or metric("", [text]) < 1)


# ---------------------------------------------------------------- a corpus


def corpus_metric(name: str, references: Sequence[Sequence[str]]) -> Any:
    """What `sacrebleu` scores a corpus with, "bleu" or "chrf"; all references decide how BLEU divides them."""
    package = _require("sacrebleu")
    if name == "chrf":
        return package.CHRF()
    return package.BLEU(tokenize=bleu_tokeniser([text for texts in references for text in texts]))

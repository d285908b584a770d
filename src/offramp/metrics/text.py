"""How well a text agrees with references: per sample in [0, 1], and for a whole corpus.

ROUGE is that of `rouge-score`, BLEU and chrF are those of `sacrebleu` with its defaults (extra `eval`).
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import zip_longest
from statistics import fmean
from typing import Any

Metric = Callable[[str, Sequence[str]], float]
"""(prediction, references, at least one) -> score in [0, 1], the best over the references."""

# ---------------------------------------------------------------- answers


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation (ASCII), no articles, single blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference after normalisation, else 0 (Rajpurkar et al., 2016)."""
    return float(normalise(prediction) in map(normalise, references))


def f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the bags of words after normalisation (Rajpurkar et al., 2016), best over references.

    Where normalisation leaves nothing of one text, the score is 1 if nothing is left of the other and 0 if not, as in
    the script for SQuAD 2.0; that for 1.1 says 0 for both.

    Args:
        prediction: A text.
        references: At least one.

    Returns:
        The score, in [0, 1].
    """
    words = normalise(prediction).split()
    return max(_bag_f1(words, normalise(reference).split()) for reference in references)


def _bag_f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))  # the harmonic mean of precision and recall


# ---------------------------------------------------------------- summaries and translations


def rouge(kind: str, prediction: str, references: Sequence[str]) -> float:
    """F-measure of ROUGE (Lin, 2004) on stemmed words, best over references.

    Args:
        kind: "rouge1", "rouge2", or "rougeL", which takes a text as one sentence.
        prediction: A text.
        references: At least one.

    Returns:
        The score, in [0, 1].
    """
    score: float = _rouge(kind).score_multi(references, prediction)[kind].fmeasure
    return score


@cache
def _rouge(kind: str) -> Any:
    return _require("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=True)


def bleu(prediction: str, references: Sequence[str]) -> float:
    """BLEU of a sentence (Papineni et al., 2002) with exponential smoothing and effective order, over 100.

    References are taken together, as BLEU does: n-grams may come from any of them.

    Args:
        prediction: A text.
        references: At least one.

    Returns:
        The score, in [0, 1].
    """
    return _share(_require("sacrebleu").sentence_bleu(prediction, references).score)


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


# ---------------------------------------------------------------- a corpus


def corpus_scores(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Scores of all samples together: corpus BLEU and chrF in 0..100, means in [0, 1] of everything else.

    Args:
        names: Of `METRICS`.
        predictions: [N], at least one.
        references: At least one for each prediction; their number may differ.

    Returns:
        Score by name.

    Raises:
        ValueError: An unknown name, or numbers that do not fit.
    """
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"there are {len(predictions)} predictions and references for {len(references)}; "
            "give at least one, and references for each"
        )
    if (bare := next((i for i, texts in enumerate(references) if not texts), None)) is not None:
        raise ValueError(f"prediction {bare + 1} has no reference; give at least one for each")
    return {name: _corpus_score(name, predictions, references) for name in names}


def _corpus_score(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    if name in ("bleu", "chrf"):
        streams = list(zip_longest(*references))  # the first references of all, the second, …; None: that many only
        score: float = getattr(_require("sacrebleu"), f"corpus_{name}")(list(predictions), streams).score
        return score
    return fmean(METRICS[name](*pair) for pair in zip(predictions, references, strict=True))

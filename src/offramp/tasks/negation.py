"""Words of negation in a hypothesis: the attribute of MultiNLI's and SNLI's groups."""

from __future__ import annotations

import string
from collections.abc import Mapping
from types import MappingProxyType

from offramp.values import choice

PUBLISHED = "four words"
EXTENDED = "twelve words"
RULES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        PUBLISHED: frozenset({"nobody", "no", "never", "nothing"}),
        EXTENDED: frozenset(
            {"nobody", "no", "never", "nothing", "not", "nt", "none", "without", "nowhere", "neither", "nor", "cannot"}
        ),
    }
)
"""Lists by name. Four words: Gururangan et al. (2018, arXiv 1803.02324), as group_DRO uses them for MultiNLI. The
longer list is ours, for SNLI, where the four are too rare."""
VALUES = ("no negation", "negation")

_DROP = str.maketrans("", "", string.punctuation)


def has_negation(text: str, rule: str = PUBLISHED) -> bool:
    """Whether a text has one of the words of a rule.

    As group_DRO looks: punctuation removed, so that "don't" is one word "dont"; lower case; divided at single blanks.

    Args:
        text: A hypothesis.
        rule: A name in `RULES`.

    Returns:
        Whether it does.

    Raises:
        ValueError: There is no such rule.
    """
    choice("the negation rule", rule, tuple(RULES))
    return not RULES[rule].isdisjoint(text.translate(_DROP).lower().split(" "))

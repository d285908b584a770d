"""The tokens that answers consist of: the fewest that cover a share of what is predicted in training text.

Early exits that score only these (`ExitPolicy(vocabulary="frequent")`) save most of a test where the vocabulary is
large. That is the idea of the draft head of FR-Spec, arXiv 2502.14856, which counts a general corpus; here it is what
exits are trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offramp.core.exits import Exits
from offramp.core.sampling import ends_of
from offramp.training.data import Data, Document, Windows
from offramp.values import number

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel

COVERAGE = 0.995
"""Share of the predicted tokens that are to be covered."""
DRAFTED = 0.95
"""The same for a drafter, which reads the list out for every draft, and is checked."""


@dataclass(frozen=True)
class Listing:
    """A list of frequent tokens, in numbers.

    Attributes:
        tokens: How many there are.
        coverage: Share of the predicted tokens that was asked for; None: the exits had a list, which they keep.
        train: Share of those trained on that it covers.
        held_out: Share of those held out.
    """

    tokens: int
    coverage: float | None
    train: float
    held_out: float

    def __str__(self) -> str:
        return (
            f"frequent vocabulary: {self.tokens:,} tokens cover {self.train:.1%} of the tokens trained on, "
            f"{self.held_out:.1%} of those held out"
        )


def frequent_tokens(
    source: Windows | Sequence[Document], coverage: float = COVERAGE, *, ends: Iterable[int] = ()
) -> Tensor:
    """The fewest tokens that make up a share of all that are to be predicted, for `Exits.with_frequent`.

    Args:
        source: Documents or windows; only tokens that are to be predicted count, so not those of prompts.
        coverage: The share, in (0, 1]; 1: all tokens that occur.
        ends: Ids that are in the list however rare they are: those that end a sequence.

    Returns:
        Ascending ids, int64 [K], at least two; of equally frequent ones the lowest.

    Raises:
        ValueError: The share is out of range, or nothing is to be predicted.
    """
    coverage = checked(coverage)
    predicted, always = _predicted(source), sorted(set(ends))
    if not len(predicted):
        raise ValueError("no token is to be predicted in these documents; give such with answers or texts")
    counts = torch.bincount(predicted, minlength=max([1, *always]) + 1)
    rank = counts.index_fill(0, torch.tensor(always, dtype=torch.long), len(predicted) + 1)
    order = rank.argsort(descending=True, stable=True)
    needed = math.ceil(coverage * len(predicted) - 1e-9)  # a product such as .7 * 10 is a little above 7
    count = int((counts[order].cumsum(0) < needed).sum()) + 1
    return order[: max(count, len(always), 2)].sort().values


def share_covered(tokens: Tensor, source: Windows | Sequence[Document]) -> float:
    """Share of the tokens to be predicted that are listed, in [0, 1]; NaN if there are none."""
    return float(torch.isin(_predicted(source), tokens.cpu()).float().mean())


def listed(
    lm: LanguageModel, exits: Exits, data: Data, coverage: float | None, default: float = COVERAGE
) -> tuple[Exits, Listing]:
    """Exits with the tokens that are frequent in what they were trained on.

    Args:
        lm: The model, whose ends of a sequence are always listed.
        exits: The exits.
        data: What they were trained on.
        coverage: See `frequent_tokens`; None: the default, but exits that have a list keep it.
        default: `COVERAGE`, or for a drafter `DRAFTED`.

    Returns:
        The exits, and their list in numbers.
    """
    if coverage is None and exits.frequent is None:
        coverage = default
    if coverage is not None:
        ends = ends_of(lm.model.generation_config)
        exits = exits.with_frequent(frequent_tokens(data.train, coverage, ends=ends))
    assert exits.frequent is not None
    shares = (share_covered(exits.frequent, part) for part in (data.train, data.held_out))
    return exits, Listing(len(exits.frequent), coverage, *shares)


def checked(coverage: float) -> float:
    """A share to cover, in (0, 1], as a plain number; anything else is refused by a ValueError."""
    return number("coverage", coverage, 0, 1, above=True, why="it is a share of the predicted tokens, in (0, 1]")


def _predicted(source: Windows | Sequence[Document]) -> Tensor:
    """The tokens to be predicted, [N]; the first one of a sequence never is."""
    if isinstance(source, Windows):
        return source.ids[:, 1:][source.counted[:, 1:]]
    return torch.tensor([token for d in source for token in d.ids[max(d.start, 1) :]], dtype=torch.long)

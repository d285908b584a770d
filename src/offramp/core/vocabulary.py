"""Pruned readouts: after the first test of a token, only K kept tokens are scored; or from the first one on.

The rule of "Early Exit LLMs" and of "Dynamic Vocabulary Pruning" (arXiv 2410.18952), with two corrections: kept ids
stay in rank order (the reference code slices an id-sorted set, which drops the best token), and the adaptive size
shrinks from the current size (theirs, relative to V, never binds).

A first test of all tokens may cost what several blocks do. Where the tokens that the answers of a domain consist of are
known, these will do: `Frequent` is their list, which belongs to the model's exits, the same for all tokens and rows
(the idea of the draft head of FR-Spec, arXiv 2502.14856). A token outside of it is chosen by the last layer only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.families.readouts import ranked

if TYPE_CHECKING:
    from offramp.families import SplitModel
    from offramp.families.readouts import HeadRows

KINDS = ("fixed", "decaying", "adaptive")
"""Rules by which tests after the first one prune."""
FREQUENT = "frequent"
"""The first test scores the exits' frequent tokens, and so do later ones, unless one of `KINDS` stands behind it."""
VOCABULARIES = (*KINDS, FREQUENT, *(f"{FREQUENT}-{kind}" for kind in KINDS))
"""What `ExitPolicy.vocabulary` may be, besides None."""


def rule_of(vocabulary: str | None) -> str | None:
    """By which of `KINDS` tests after the first one prune; None: they score what the first one does."""
    return None if vocabulary is None else vocabulary.removeprefix(FREQUENT).removeprefix("-") or None


@dataclass(frozen=True)
class Pruning:
    """How many tokens each test keeps.

    Attributes:
        kind: "fixed" keeps the first size; "decaying" follows `decayed`; "adaptive" shrinks by the last confidence.
        vocabulary: V.
        num_layers: L.
        first_layer: The first tested layer, which still reads all V.
        size: Kept tokens after the first test; None: `decayed(first_layer)`.
        floor: k*, the smallest size the rules reach; None: ⌈V / 128⌉, but at least 2.
        start: k_1 of the decay function; None: V. The source documents used 35000 with floor 250.
        shrink: s of the adaptive rule.
        recursive: Decay from the previous layer's size instead of from `start`.
    """

    kind: str
    vocabulary: int
    num_layers: int
    first_layer: int
    size: int | None = None
    floor: int | None = None
    start: int | None = None
    shrink: float = 0.9
    recursive: bool = False

    @property
    def smallest(self) -> int:
        """k*, clamped to V."""
        return min(self.vocabulary, self.floor or max(2, -(-self.vocabulary // 128)))

    def decayed(self, layer: int, start: int | None = None) -> int:
        """f(l) = max(k*, ⌊k_1 / (1 + (k_1 - k*)/k* · l/L)⌋), clamped to V."""
        first, least = start or self.start or self.vocabulary, self.smallest
        # The same fraction in whole numbers: floats would round a whole quotient down by one.
        size = first * least * self.num_layers // (least * self.num_layers + (first - least) * layer)
        return min(self.vocabulary, max(least, size))

    def first_size(self) -> int:
        """Tokens kept after the first test."""
        return self.size or self.decayed(self.first_layer)

    def next_size(self, layer: int, previous: int, confidence: float) -> int:
        """Tokens scored at `layer`, given the last test's size and confidence; never more than `previous`."""
        if self.kind == "fixed":
            return previous
        if self.kind == "adaptive":
            sure = min(max(confidence, 0.0), 1.0) if confidence == confidence else 0.0
            least, size = self.smallest, math.ceil(previous * (1 - self.shrink * sure))
        elif self.recursive:
            least, size = self.smallest, self.decayed(layer, previous)
        else:
            least = min(self.smallest, self.first_size())
            size = math.floor(self.first_size() * self.decayed(layer) / self.decayed(self.first_layer))
        return min(previous, max(least, size))

    def sizes(self, layers: Sequence[int]) -> dict[int, int | None]:
        """Tokens scored at tested layers, ascending; None (all V) at the first. Not for "adaptive" sizes."""
        found: dict[int, int | None] = {}
        size = self.first_size()
        for layer in layers:
            size = self.next_size(layer, size, math.nan) if found else size
            found[layer] = size if found else None
        return found


def kept_sizes(sizes: Sequence[int], scored: int, protected: Tensor) -> list[int]:
    """How many ranked ids rows keep: what the rule says, or all that are scored and not protected."""
    return [min(size, scored - len(protected)) for size in sizes]


class Kept:
    """The kept tokens of A rows within one token step, best first, and the head's rows for them.

    Protected ids (end of sequence) stand behind the ranked ones: they are not ranked, not counted in K and never lost.
    Rows of a batch may keep different numbers of ids: the shorter ones are masked.

    Args:
        ids: Ranked ids, [A, K], none of them protected.
        sizes: How many of them each row keeps, A numbers up to K.
        protected: Ids that are always scored, [P].
        rows: The head's rows of all K + P ids, if already gathered.
    """

    shared = False

    def __init__(self, ids: Tensor, sizes: list[int], protected: Tensor, rows: HeadRows | None = None) -> None:
        self.ranked, self.sizes, self.protected, self.rows = ids, sizes, protected, rows
        self.ids = torch.cat([ids, protected.expand(len(ids), -1)], dim=1)  # [A, K + P]
        self.scored = torch.ones_like(self.ids, dtype=torch.bool)  # [A, K + P]
        self.ragged = min(sizes) < ids.shape[1]
        if self.ragged:
            lengths = torch.tensor(sizes, device=ids.device)[:, None]
            places = torch.arange(self.ids.shape[1], device=ids.device)
            self.scored = (places < lengths) | (places >= ids.shape[1])

    @classmethod
    def best(
        cls,
        logits: Tensor,
        sizes: list[int],
        protected: Tensor,
        rank: Callable[[Tensor, int, Tensor], Tensor] = ranked,
    ) -> Kept:
        """The `sizes[a]` best unprotected ids of each row of logits [A, V], or all that there are.

        Returns:
            These, found by `rank`, which an engine may have a faster one of (see `SplitModel.rank`).
        """
        sizes = kept_sizes(sizes, logits.shape[1], protected)
        return cls(rank(logits, max(sizes), protected), sizes, protected)

    def gather(self, model: SplitModel) -> HeadRows:
        """The head's rows [A, K + P, D], copied once and reused by later tests of the token."""
        if self.rows is None:
            self.rows = model.gather(self.ids)
        return self.rows

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [A, K + P] in float32, with -inf where a row keeps fewer ids than the largest row."""
        return logits.float().masked_fill(~self.scored, -torch.inf) if self.ragged else logits.float()

    def shrunk(self, logits: Tensor, sizes: list[int]) -> Kept:
        """The `sizes[a]` best ids of each row in the order of logits [A, K + P]; copies only the kept head rows."""
        sizes = [min(pair) for pair in zip(sizes, self.sizes, strict=True)]
        order = logits[:, : self.ranked.shape[1]].topk(max(sizes), dim=-1).indices  # [A, K']
        rows = self.rows
        if rows is not None:
            behind = torch.arange(self.ranked.shape[1], self.ids.shape[1], device=order.device)
            rows = rows.columns(torch.cat([order, behind.expand(len(order), -1)], dim=1))
        return Kept(self.ranked.gather(1, order), sizes, self.protected, rows)

    def select(self, index: list[int]) -> Kept:
        """Some of the batch rows."""
        rows = torch.tensor(index, device=self.ranked.device)
        gathered = None if self.rows is None else self.rows.select(rows)
        return Kept(self.ranked[rows], [self.sizes[i] for i in index], self.protected, gathered)

    def scatter(self, logits: Tensor, vocabulary: int) -> Tensor:
        """Logits [A, K + P] at their places among all V tokens, -inf elsewhere, [A, V]."""
        return logits.new_full((len(logits), vocabulary), -torch.inf).scatter(1, self.ids, logits)


def require_frequent(exits: Any, vocabulary: str | None) -> None:
    """See that there are frequent tokens where a policy's `vocabulary` asks for them.

    Raises:
        ValueError: There are no exits, or they have no such list.
    """
    if vocabulary is None or not vocabulary.startswith(FREQUENT):
        return
    if exits is None or exits.frequent is None:
        have = "the model has no trained exits" if exits is None else "the model's exits have no such list"
        raise ValueError(
            f"vocabulary is {vocabulary!r}, but {have}; train exits with offramp train, which counts the frequent "
            "tokens, or attach lm.exits.with_frequent(frequent_tokens(documents))"
        )


@dataclass(frozen=True)
class Frequent:
    """The exits' frequent tokens, which are scored for all A rows alike: nothing of it is made anew for a token.

    To a test it is what `Kept` is.

    Attributes:
        tokens: Their ids, ascending, [K].
        rows: The head's rows for them, [K, D].
        places: Of the protected ones among them, [P].
        count: A.
    """

    tokens: Tensor
    rows: HeadRows
    places: Tensor
    count: int = 1

    shared = True
    ragged = False

    @classmethod
    def of(cls, model: SplitModel, protected: Tensor, vocabulary: str) -> Frequent:
        """Those of a model's exits, their rows of the head gathered.

        Args:
            model: The model.
            protected: Ids that pruning never drops, [P].
            vocabulary: What the policy says, for the error.

        Returns:
            For one row.

        Raises:
            ValueError: It has none, or they are for another vocabulary.
        """
        require_frequent(model.exits, vocabulary)
        tokens: Tensor = model.exits.frequent
        if int(tokens[-1]) >= model.shape.vocabulary:
            raise ValueError(
                f"the exits' frequent tokens go up to {int(tokens[-1])}, but the model's are "
                f"0..{model.shape.vocabulary - 1}; give others with with_frequent"
            )
        return cls(tokens, model.gather(tokens), torch.isin(tokens, protected).nonzero()[:, 0])

    def over(self, count: int) -> Frequent:
        """The same for so many rows."""
        return replace(self, count=count)

    @property
    def ids(self) -> Tensor:
        """The tokens by row, [A, K]; they are not copied."""
        return self.tokens.expand(self.count, -1)

    @property
    def scored(self) -> Tensor:
        """That all of them are, bool [A, K]."""
        return self.tokens.new_ones((), dtype=torch.bool).expand(self.count, len(self.tokens))

    def gather(self, _: SplitModel) -> HeadRows:
        """The head's rows, which are there."""
        return self.rows

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [A, K] in float32."""
        return logits.float()

    def shrunk(self, logits: Tensor, sizes: list[int]) -> Kept:
        """The `sizes[a]` best unprotected ids of each row in the order of logits [A, K]; copies their head rows."""
        sizes = kept_sizes(sizes, len(self.tokens), self.places)
        order = ranked(logits, max(sizes), self.places)  # [A, K']
        columns = torch.cat([order, self.places.expand(len(order), -1)], dim=1)
        return Kept(self.tokens[order], sizes, self.tokens[self.places], self.rows.columns(columns))

    def select(self, index: list[int]) -> Frequent:
        """Some of the batch rows."""
        return self.over(len(index))

    def scatter(self, logits: Tensor, vocabulary: int) -> Tensor:
        """Logits [A, K] at their places among all V tokens, -inf elsewhere, [A, V]."""
        return logits.new_full((len(logits), vocabulary), -torch.inf).index_copy(1, self.tokens, logits)

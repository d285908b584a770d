"""Keys and values of texts that were read, kept for prompts that begin alike.

Chat templates begin with the same words, and each turn of a conversation with all that was said before. Tokens are kept
in blocks of 16, each under the one before it, so that texts share the blocks of what they share (as in vLLM, Kwon et
al., SOSP 2023, and as a tree like SGLang's, Zheng et al., 2023); unlike there, a row gets copies, and may use the first
tokens of a block. Whatever was of use least recently goes first, and what a text ends with before what it begins with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from offramp.families import SplitModel
from offramp.families.state import BLOCK, Context


@dataclass(eq=False)
class _Node:
    """A block of tokens behind those of its ancestors, and where its keys and values lie."""

    tokens: tuple[int, ...]
    above: _Node | None
    place: int
    below: dict[tuple[int, ...], _Node] = field(default_factory=dict)


class Prefixes:
    """Texts whose keys and values are kept.

    Args:
        model: Whose.
        context: Of the batch whose rows they are copied from and to.
        layers: Blocks that have keys and values of all tokens.
        tokens: How many are kept at most; only whole blocks of them are.

    Attributes:
        room: Blocks there is room for.
    """

    def __init__(self, model: SplitModel, context: Context, layers: Sequence[int], tokens: int) -> None:
        self._model, self._context, self._layers, self.room = model, context, layers, tokens // BLOCK
        self._root = _Node((), None, -1)
        self._recent: OrderedDict[_Node, None] = OrderedDict()  # a block comes before those it stands behind
        self._kept: list[Tensor] = []  # keys and values of each layer and what comes beside, [room, H, ...]

    @property
    def tokens(self) -> int:
        """How many are kept."""
        return BLOCK * len(self._recent)

    def known(self, tokens: Sequence[int]) -> int:
        """How many tokens at the beginning of a text are kept."""
        return self._find(tokens)[1]

    def _find(self, tokens: Sequence[int]) -> tuple[list[_Node], int]:
        """The blocks that a text begins with, and how many of its tokens these are."""
        node, path, count = self._root, [], 0
        while (found := node.below.get(tuple(tokens[count : count + BLOCK]))) is not None:
            path.append(node := found)
            count += BLOCK
        rest, longest = tokens[count : count + BLOCK], 0
        for some, part in node.below.items() if rest else ():
            if some[0] == rest[0] and (alike := common_prefix(some, rest)) > longest:
                longest, found = alike, part
        return (path if found is None else [*path, found]), count + longest

    def _touch(self, path: list[_Node]) -> None:
        for node in reversed(path):
            self._recent.move_to_end(node)

    def load(self, row: int, tokens: Sequence[int]) -> tuple[int, Tensor | None]:
        """Give a row what is kept of a text's beginning.

        Args:
            row: Of the batch.
            tokens: The text.

        Returns:
            How many tokens that are, n (slots behind them hold anything), and what is kept of them beside, [n, D].
        """
        path, count = self._find(tokens)
        if not count:
            return 0, None
        self._touch(path)
        places = [node.place for node in path]
        own = self._blocks(row, 0, len(path))
        for into, kept in zip(own, self._kept, strict=False):
            into.copy_(kept[places].transpose(0, 1))
        beside = [kept[places].flatten(0, 2)[:count] for kept in self._kept[len(own) :]]
        return count, beside[0] if beside else None

    def save(self, row: int, tokens: Sequence[int], beside: Tensor | None = None) -> None:
        """Keep what a row has of a text's beginning, as far as it is not kept and there is room.

        Args:
            row: Of the batch; it has keys and values of all these tokens.
            tokens: The text, [T].
            beside: What else is kept of each token, [T, D]; always given, or never.
        """
        path, count = self._find(tokens)
        path = path[: count // BLOCK]
        self._touch(path)
        old = len(path)
        for begin in range(BLOCK * old, len(tokens) - BLOCK + 1, BLOCK):
            if (place := self._place(path)) is None:
                break
            above, block = path[-1] if path else self._root, tuple(tokens[begin : begin + BLOCK])
            above.below[block] = node = _Node(block, above, place)
            self._recent[node] = None
            path.append(node)
        if len(path) == old:
            return
        self._touch(path)
        parts = self._blocks(row, old, len(path))
        if beside is not None:
            parts.append(beside[BLOCK * old : BLOCK * len(path)].unflatten(0, (-1, BLOCK))[None])  # type: ignore[no-untyped-call]
        self._kept = self._kept or [part.new_empty(self.room, len(part), *part.shape[2:]) for part in parts]
        places = [node.place for node in path[old:]]
        for part, kept in zip(parts, self._kept, strict=True):
            kept[places] = part.transpose(0, 1)

    def _blocks(self, row: int, begin: int, end: int) -> list[Tensor]:
        """Some blocks of a row, as keys and values [H, n, ...] of each layer: views."""
        self._context.reach(BLOCK * end)
        return self._model.blocks_of(self._context, row, self._layers, BLOCK * begin, BLOCK * end)

    def _place(self, path: list[_Node]) -> int | None:
        """Room for a block behind `path`, another one's if need be; None: all there is, `path` has."""
        if len(self._recent) < self.room:
            return len(self._recent)
        oldest = next(iter(self._recent), None)
        if oldest is None or oldest in path:
            return None
        del self._recent[oldest]
        assert oldest.above is not None
        del oldest.above.below[oldest.tokens]
        return oldest.place


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many first elements are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

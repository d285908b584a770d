"""Tokens become text one by one: whole characters only, and nothing that may be the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from offramp.core.running import Emitted

_HALF = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or not yet."""


class Detokenizer:
    """What each further token adds to a text.

    A token's text depends on those before it (blanks between words, bytes of one character), so the last few are
    decoded again with it, and what is new is taken. Together the pieces are what the tokenizer makes of all tokens, but
    where it would take back what was written: those that spell unknown characters in bytes do, if bytes spell none.

    Args:
        decode: Ids to text, special tokens left out.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._open: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain with one more token; empty while a character lacks bytes."""
        self._open.append(token)
        return self._advance(whole=True)

    def end(self) -> str:
        """What is left: half characters, as the tokenizer writes them."""
        return self._advance(whole=False)

    def _advance(self, *, whole: bool) -> str:
        before = self._decode(self._context)
        text = self._decode(self._context + self._open)
        if len(text) <= len(before) or (whole and text.endswith(_HALF)):
            return ""
        self._context, self._open = self._open, []
        return text[len(before) :]


class Piece(NamedTuple):
    """A token and the text that came with it."""

    token: Emitted
    text: str


class Writer:
    """Writes one answer up to its first stop string.

    Tokens come out with their text once it is certain that the text stands: later than they go in where a character is
    not whole, or where the text may be the beginning of a stop string. The pieces of all tokens put together are the
    answer; those behind its end are empty.

    Args:
        decode: Ids to text, special tokens left out.
        stop: Texts before which the answer ends, none of them empty.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._detokenizer, self._stop = Detokenizer(decode), tuple(stop)
        self._held: list[Piece] = []
        self.stopped = False

    def add(self, token: Emitted, *, silent: bool = False) -> list[Piece]:
        """Take one more token.

        Args:
            token: The token.
            silent: It has no text, as that which ends a sequence.

        Returns:
            The tokens whose text is certain now, in their order.
        """
        self._held.append(Piece(token, "" if silent else self._detokenizer.add(token.token)))
        text = self._text()
        return self._cut(text) or self._release(len(text) - self._unsure(text))

    def end(self) -> list[Piece]:
        """The tokens that were held back, when no more come."""
        if rest := self._detokenizer.end():  # of the last one held
            token, text = self._held.pop()
            self._held.append(Piece(token, text + rest))
        held = self._cut(self._text()) or self._held
        self._held = []
        return held

    def _text(self) -> str:
        return "".join(piece.text for piece in self._held)

    def _unsure(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a stop string."""
        return max(
            (
                size
                for stop in self._stop
                for size in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:size])
            ),
            default=0,
        )

    def _release(self, certain: int) -> list[Piece]:
        """Those that lie within so many characters of the text; one without any waits for the next that has some."""
        end = count = 0
        for index, piece in enumerate(self._held):
            end += len(piece.text)
            if end > certain:
                break
            count = index + 1 if piece.text else count
        released, self._held = self._held[:count], self._held[count:]
        return released

    def _cut(self, text: str) -> list[Piece]:
        """All of them up to the first stop string in their text; none where there is none."""
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if not found:
            return []
        self.stopped, certain, released = True, min(found), []
        for token, piece in self._held:
            released.append(Piece(token, piece[: max(certain, 0)]))
            certain -= len(piece)
        self._held = []
        return released

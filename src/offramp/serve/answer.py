"""One answer on its way from the batch to whoever asked: its tokens, their text, and what it cost.

Tokens become text one by one: whole characters only, and nothing that may be the beginning of a stop string.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from offramp.core.running import Asked
from offramp.serve.requests import ApiError

if TYPE_CHECKING:
    from offramp.core.running import Emitted
    from offramp.families.sizes import ModelShape

# ---------------------------------------------------------------- from tokens to text

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


# ---------------------------------------------------------------- the answer

STOP, LENGTH = "stop", "length"
"""Why an answer ended: by itself or before a stop string; because it was as long as allowed."""


@dataclass(frozen=True)
class Finished:
    """An answer's end.

    Attributes:
        reason: `STOP` or `LENGTH`.
        flops: The answer's share of what the batch spent: each step's FLOPs are divided by the tokens that were read.
        full_flops: What the full model spends on the same part of the prompt and as many tokens.
        seconds: Since it was asked for.
    """

    reason: str
    flops: float
    full_flops: int
    seconds: float


Event = list[Piece] | Finished | ApiError
"""Tokens whose text stands; the end; or what went wrong instead. One of the latter two comes last."""


@dataclass(eq=False)
class Answer:
    """One answer.

    Args:
        asked: Of the batch.
        decode: Ids to text.
        send: Gets the events, in the thread of the batch.
        stop: Texts before which the answer ends.
        deadline: When it must be finished, on the clock of `time.monotonic`; None: whenever.
        promised: Whether it is one that the promise is about, as far as its options say.
        check: Whether it is one of the server's own, made at full depth to compare another with.
    """

    asked: Asked
    decode: Callable[[list[int]], str]
    send: Callable[[Event], None]
    stop: Sequence[str] = ()
    deadline: float | None = None
    promised: bool = False
    check: bool = False
    began: float = field(default_factory=time.monotonic)
    tokens: list[Emitted] = field(default_factory=list)
    text: str = ""
    flops: float = 0.0

    def __post_init__(self) -> None:
        self._writer = Writer(self.decode, self.stop)

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were not computed, as far as is known."""
        return self.tokens[0].cached if self.tokens else 0

    @property
    def ids(self) -> list[int]:
        """The tokens so far."""
        return [token.token for token in self.tokens]

    def take(self, token: Emitted) -> str | None:
        """Write one more token, and send what is certain of it.

        Returns:
            Why the answer has ended; None: it has not.
        """
        self.tokens.append(token)
        ends = token.ended and (token.token < 0 or token.token in self.asked.sampler.eos)
        pieces = self._writer.add(token, silent=ends)
        if token.ended:
            pieces += self._writer.end()
        self.text += "".join(piece.text for piece in pieces)
        if pieces:
            self.send(pieces)
        if self._writer.stopped or ends:
            return STOP
        return LENGTH if token.ended else None


class FullDepth:
    """`ModelShape.generation_flops` for answers of any length at once: sums over positions are made beforehand.

    Args:
        shape: The model.
        longest: Most tokens of a prompt and its answer together.
    """

    def __init__(self, shape: ModelShape, longest: int) -> None:
        self._shape, self._layers = shape, range(len(shape.blocks))
        each = (sum(shape.block_flops(layer, 1, start, 0) for layer in self._layers) for start in range(longest))
        self._sums = list(accumulate(each, initial=0))

    def flops(self, prompt: int, new: int, cached: int = 0) -> int:
        """FLOPs of a prompt of so many tokens and so many new ones, the last of which is not read.

        Args:
            prompt: Tokens.
            new: New ones.
            cached: Of the prompt's, those that need not be computed.

        Returns:
            FLOPs.
        """
        if not new:
            return 0
        blocks = sum(self._shape.block_flops(layer, prompt - cached, cached, 0) for layer in self._layers)
        behind = self._sums[prompt + new - 1] - self._sums[prompt]
        return blocks + behind + new * self._shape.readout_flops()

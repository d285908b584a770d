"""One answer on its way from the batch to whoever asked: what was asked, what has come, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offramp.core.running import Asked
from offramp.serve.errors import ApiError
from offramp.serve.text import Piece, Writer

if TYPE_CHECKING:
    from offramp.core.running import Emitted

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

"""One request on its way: its answers, what has come of them, and how it is told, as a whole or in a stream.

It is worded as in OpenAI's interface, with what is known of the exits beside.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from offramp.core.running import OWN
from offramp.serve.answer import Answer, Event, Finished, Piece
from offramp.serve.requests import ApiError

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.serve.requests import Wanted
    from offramp.serve.serving import Ready, Serving

LEFT = 499
"""What is counted for a client that left; nobody reads it."""
_DEAF = 60.0
"""Seconds after which a client that reads nothing of a stream is given up."""
_DRAINING = 3600.0
"""Of a stream when the server stops: the engine ends it, with an error if it must."""


class Exchange:
    """The answers to one request.

    Args:
        serving: Whose.
        wanted: The request.
        ready: What the batch is asked for.
        began: When it came, on the clock of `time.monotonic`.
    """

    def __init__(self, serving: Serving, wanted: Wanted, ready: Ready, began: float) -> None:
        self._serving, self._wanted = serving, wanted
        self._against = serving.promised.against(ready.settings, overridden=wanted.threshold != OWN)
        self._reply = Reply(serving.lm, serving.name, wanted, ready.prompt_tokens)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        promised = serving.promised.certificate is not None and not self._against
        self.answers = [
            Answer(
                asked, serving.text_of, self._sender(index), stop=wanted.stop, began=began,
                deadline=began + serving.limits.timeout, promised=promised,
            )
            for index, asked in enumerate(ready.asked)
        ]  # fmt: skip
        self._open = set(range(len(self.answers)))

    def _sender(self, index: int) -> Callable[[Event], None]:
        def send(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return send

    def leave(self) -> None:
        """Give back the rows of answers that have not ended."""
        if self._open:
            self._serving.engine.cancel(self.answers[index] for index in self._open)

    async def _come(self) -> AsyncIterator[tuple[int, list[Piece] | Finished]]:
        """What comes of all answers, until the last one's end.

        Yields:
            The number of an answer, and what has come of it.

        Raises:
            ApiError: Of one that ended with it.
        """
        while self._open:
            index, event = await self._events.get()
            if not isinstance(event, list):
                self._open.discard(index)
            if isinstance(event, ApiError):
                raise event
            yield index, event

    def _about(self) -> dict[str, Any]:
        """What is known of the exits besides tokens and costs."""
        serving, full = self._serving, all(answer.asked.threshold is None for answer in self.answers)
        policy = None if serving.policy is None or full else serving.policy.to_dict()
        if policy is not None and isinstance(self._wanted.threshold, float):
            policy["threshold"] = self._wanted.threshold
        against = [*self._against, *serving.watch.against]
        if full and not self._wanted.full:
            against.append("all answers go to full depth, since the promise was found broken")
        return {"policy": policy, "certificate": serving.promised.told(against)}

    # ------------------------------------------------------------ as a whole

    async def whole(self, request: Request) -> Response:
        """All of it, when all of it is there.

        Returns:
            The answer; an empty one where the client has left before, which nobody reads.

        Raises:
            ApiError: An answer ended with it.
        """
        told, left = asyncio.ensure_future(self._all()), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({told, left}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(told.result()) if told.done() else Response(status_code=LEFT)
        finally:
            told.cancel(), left.cancel()
            self.leave()

    async def _all(self) -> dict[str, Any]:
        pieces: list[list[Piece]] = [[] for _ in self.answers]
        ends: dict[int, Finished] = {}
        async for index, event in self._come():
            if isinstance(event, Finished):
                ends[index] = event
            else:
                pieces[index] += event
        in_order = [ends[index] for index in range(len(self.answers))]
        return self._reply.whole(self.answers, pieces, in_order, self._about())

    # ------------------------------------------------------------ in a stream

    def stream(self) -> Response:
        """As it comes."""
        return _Streamed(self._chunks(), self.leave)

    async def _chunks(self) -> AsyncIterator[dict[str, str]]:
        """Events for the client; an error is one of them, since the status has been sent."""
        if self._wanted.chat:
            for index in range(len(self.answers)):
                yield _data(self._reply.chunk(index, []))
        try:
            async for index, event in self._come():
                if isinstance(event, Finished):
                    yield _data(self._reply.last(index, self.answers[index], event, self._about()))
                else:
                    yield _data(self._reply.chunk(index, event))
        except ApiError as error:
            yield _data(error.body())
        else:
            if self._wanted.usage:
                yield _data(self._reply.usage(self.answers))
        yield {"data": "[DONE]"}


class _Streamed(EventSourceResponse):
    """A stream that says when it is over, whoever ended it: also one that never began."""

    def __init__(self, content: AsyncIterator[dict[str, str]], over: Callable[[], None]) -> None:
        super().__init__(content, sep="\n", send_timeout=_DEAF, shutdown_grace_period=_DRAINING)
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


def _data(values: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(values, ensure_ascii=False, allow_nan=False)}


async def _gone(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---------------------------------------------------------------- in the words of OpenAI's interface


class Reply:
    """Words the answers to one request.

    Args:
        lm: The model.
        name: What it is called.
        wanted: The request.
        prompt_tokens: Of its prompts.
    """

    def __init__(self, lm: LanguageModel, name: str, wanted: Wanted, prompt_tokens: int) -> None:
        self._lm, self._wanted, self._prompt_tokens = lm, wanted, prompt_tokens
        kind = "chat.completion" if wanted.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if wanted.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if wanted.chat and wanted.stream else kind,
            "created": int(time.time()), "model": name,
        }  # fmt: skip
        self._offsets: dict[int, int] = {}

    # ------------------------------------------------------------ whole

    def whole(
        self, answers: Sequence[Answer], pieces: Sequence[list[Piece]], ends: Sequence[Finished], about: dict[str, Any]
    ) -> dict[str, Any]:
        """The body of an answer that is not streamed, as JSON values.

        Args:
            answers: Of the request.
            pieces: Of each, all tokens.
            ends: Of each.
            about: What `offramp` holds besides tokens and costs.

        Returns:
            The body.
        """
        choices = [
            self._choice(index, answer.text, some, end.reason)
            for index, (answer, some, end) in enumerate(zip(answers, pieces, ends, strict=True))
        ]
        tokens = [self._tokens(some) for some in pieces]
        lists = {name: [one[name] for one in tokens] for name in ("exit_layers", "confidences")}
        told = {"num_layers": self._lm.num_layers, **lists, **about, "cost": self._cost(answers, ends)}
        return {**self._head, "choices": choices, "usage": self._usage(answers), "offramp": told}

    def _choice(self, index: int, text: str, pieces: list[Piece], reason: str | None) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text}
        if self._wanted.chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **content, "logprobs": self._logprobs(index, pieces), "finish_reason": reason}

    # ------------------------------------------------------------ in chunks

    def chunk(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        """Some tokens of an answer; none: its beginning."""
        text = "".join(piece.text for piece in pieces)
        delta = {"content": text} if pieces else {"role": "assistant", "content": ""}
        choice = self._delta(index, delta, None)
        choice["logprobs"] = self._logprobs(index, pieces) if pieces else None
        return self._chunk([choice], self._tokens(pieces) | {"num_layers": self._lm.num_layers} if pieces else None)

    def last(self, index: int, answer: Answer, end: Finished, about: dict[str, Any]) -> dict[str, Any]:
        """An answer's end."""
        told = {"num_layers": self._lm.num_layers, **about, "cost": self._cost([answer], [end])}
        return self._chunk([self._delta(index, {}, end.reason)], told)

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk behind all others, if it is wanted."""
        return {**self._head, "choices": [], "usage": self._usage(answers)}

    def _delta(self, index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        content = {"delta": delta} if self._wanted.chat else {"text": delta.get("content", "")}
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]], told: dict[str, Any] | None) -> dict[str, Any]:
        chunk = {**self._head, "choices": choices}
        if self._wanted.usage:
            chunk["usage"] = None
        return chunk if told is None else {**chunk, "offramp": told}

    # ------------------------------------------------------------ parts

    def _tokens(self, pieces: list[Piece]) -> dict[str, list[Any]]:
        return {
            "exit_layers": [token.exit_layer for token, _ in pieces],
            "confidences": [_finite(token.confidence) for token, _ in pieces],
            "tokens": [text for _, text in pieces],
        }

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        count = self._wanted.n
        cached = sum(min(a.cached for a in answers[i : i + count]) for i in range(0, len(answers), count))
        new = sum(len(answer.tokens) for answer in answers)
        return {
            "prompt_tokens": self._prompt_tokens, "completion_tokens": new, "total_tokens": self._prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def _cost(self, answers: Sequence[Answer], ends: Sequence[Finished]) -> dict[str, Any]:
        layers = [token.exit_layer for answer in answers for token in answer.tokens]
        seconds = max(end.seconds for end in ends)
        return {
            "mean_depth": sum(layers) / max(len(layers), 1) / self._lm.num_layers,
            "flops": round(sum(end.flops for end in ends)),
            "full_flops": sum(end.full_flops for end in ends),
            "seconds": seconds,
            "tokens_per_second": len(layers) / max(seconds, 1e-9),
        }

    def _logprobs(self, index: int, pieces: list[Piece]) -> dict[str, Any] | None:
        """Of the tokens that have a part in the text."""
        if not self._wanted.logprobs:
            return None
        shown = [piece for piece in pieces if piece.text or not piece.token.ended]
        if self._wanted.chat:
            return {"content": [self._of_chat(piece) for piece in shown], "refusal": None}
        offsets, at = [], self._offsets.get(index, 0)
        for piece in shown:
            offsets.append(at)
            at += len(piece.text)
        self._offsets[index] = at
        return {
            "tokens": [self._word(piece.token.token) for piece in shown],
            "token_logprobs": [_finite(piece.token.logprob) for piece in shown],
            "top_logprobs": [{self._word(token): _finite(log) for token, log in piece.token.top} for piece in shown],
            "text_offset": offsets,
        }

    def _of_chat(self, piece: Piece) -> dict[str, Any]:
        token = piece.token
        top = [self._log(other, log) for other, log in token.top]
        return {**self._log(token.token, token.logprob), "top_logprobs": top}

    def _log(self, token: int, log: float) -> dict[str, Any]:
        word = self._word(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in word  # else a part of a character, whose bytes are not known here
        return {"token": word, "logprob": _finite(log), "bytes": list(word.encode()) if whole else None}

    def _word(self, token: int) -> str:
        return "" if self._lm.tokenizer is None or token < 0 else str(self._lm.tokenizer.decode([token]))


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None

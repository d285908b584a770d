"""One request on its way: its answers, what has come of them, and how it is told, as a whole or in a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from offramp.core.running import OWN
from offramp.serve.answer import Answer, Event, Finished
from offramp.serve.errors import ApiError
from offramp.serve.replies import Reply
from offramp.serve.text import Piece

if TYPE_CHECKING:
    from offramp.serve.preparing import Ready
    from offramp.serve.requests import Wanted
    from offramp.serve.serving import Serving

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

"""Before any path: keys, names of this machine, and the count of requests."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp.serve.errors import ApiError

if TYPE_CHECKING:
    from offramp.serve.metrics import Metrics

_OPEN = ("/", "/health")
"""Paths that need no key: a page without data, and whether the server lives."""
_COUNTED = ("/", "/health", "/metrics", "/v1/models", "/v1/offramp", "/v1/completions", "/v1/chat/completions")
_LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")


class Guard:
    """An ASGI application around another one.

    Args:
        app: The other one.
        metrics: Counts requests.
        key: What `Authorization: Bearer …` must be; None: nothing.
        local: Refuse requests for other names than this machine's own, unless there is a key: a page of another site
            may have its name point here.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, key: str | None, local: bool) -> None:
        self._app, self._metrics, self._key, self._local = app, metrics, key, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the other one."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in _COUNTED else "other"
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        headers = Headers(scope=scope)
        error = self._stranger(headers) or self._locked(scope["path"], headers)
        if error is None:
            await self._app(scope, receive, counted)
            return
        await JSONResponse(error.body(), error.status, headers=error.headers)(scope, receive, counted)

    def _stranger(self, headers: Mapping[str, str]) -> ApiError | None:
        host = headers.get("host", "localhost")
        name = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
        if not self._local or self._key is not None or name.lower() in _LOCAL:
            return None
        return ApiError(
            403, f"the request is for the host {name!r:.80}, but this server listens for its own machine only; start "
            "it with --api-key to be called otherwise", code="unknown_host",
        )  # fmt: skip

    def _locked(self, path: str, headers: Mapping[str, str]) -> ApiError | None:
        if self._key is None or path in _OPEN:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._key.encode()):
            return None
        return ApiError(
            401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip

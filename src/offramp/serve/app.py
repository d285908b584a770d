"""The server's HTTP, as an ASGI application: a guard, the paths behind it, and the page to try them with."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp import __version__
from offramp.report.drawing import colours
from offramp.serve.exchange import LEFT, Exchange
from offramp.serve.metrics import CONTENT_TYPE
from offramp.serve.requests import ApiError, parse

if TYPE_CHECKING:
    from offramp.serve.metrics import Metrics
    from offramp.serve.serving import Serving

_LARGE = 2**16
"""Bytes above which bodies are made tokens of one at a time, so that small ones wait for one of them at most."""
_LINGER = 2.0
"""Seconds in which a client whose body is too large may go on sending it."""


def application(serving: Serving) -> Guard:
    """What an ASGI server runs; it closes the engine when it ends."""
    paths = _Paths(serving)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(paths.close)

    routes = [
        Route("/", paths.page),
        Route("/health", paths.health),
        Route("/metrics", paths.metrics),
        Route("/v1/models", paths.models),
        Route("/v1/models/{name:path}", paths.model),
        Route("/v1/offramp", paths.about),
        Route("/v1/completions", paths.completions, methods=["POST"]),
        Route("/v1/chat/completions", paths.chat, methods=["POST"]),
    ]
    handlers: Any = {ApiError: _refuse, HTTPException: _refuse_http, Exception: _refuse_unknown}
    inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    return Guard(inner, serving.metrics, key=serving.limits.key, local=serving.limits.local)


class _Paths:
    """Answers by path."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._large = asyncio.Semaphore()
        self._thread = ThreadPoolExecutor(1, "offramp-prepare")  # tokenizers and `generate` are not for several

    def close(self) -> None:
        """Wait for the server's threads to end."""
        self._thread.shutdown(cancel_futures=True)
        self._serving.engine.close()

    # ------------------------------------------------------------ small answers

    async def page(self, _: Request) -> Response:
        """To try it with."""
        return page(self._serving.name)

    async def health(self, _: Request) -> Response:
        """Whether it lives, and what is known of the promise."""
        engine, watch = self._serving.engine, self._serving.watch
        told = {
            "status": "stopping" if engine.draining else "ok", "model": self._serving.name, "active": engine.active,
            "waiting": engine.waiting, "promise": watch.state, "watch": watch.to_dict(),
        }  # fmt: skip
        return JSONResponse(told, 503 if engine.draining else 200)

    async def metrics(self, _: Request) -> Response:
        """For Prometheus."""
        return Response(self._serving.metrics.text(), media_type=CONTENT_TYPE)

    def _model_object(self) -> dict[str, Any]:
        return {"id": self._serving.name, "object": "model", "created": self._serving.began, "owned_by": "offramp"}

    async def models(self, _: Request) -> Response:
        """All one of them."""
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def model(self, request: Request) -> Response:
        """The one."""
        if (name := request.path_params["name"]) != self._serving.name:
            raise ApiError(
                404, f"the model {name!r:.80} does not exist; there is {self._serving.name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip
        return JSONResponse(self._model_object())

    async def about(self, _: Request) -> Response:
        """What the page needs to know."""
        serving, limits = self._serving, self._serving.limits
        return JSONResponse({
            "model": serving.name, "version": __version__, "num_layers": serving.lm.num_layers,
            "engine": serving.lm.engine, "number_format": serving.lm.number_format,
            "policy": None if serving.policy is None else serving.policy.to_dict(),
            "exit_layers": serving.exit_layers,
            "has_chat_template": serving.lm.has_chat_template,
            "certificate": {
                "on_file": serving.promised.certificate is not None, "statement": serving.promised.statement,
                "promise": serving.watch.state,
            },
            "limits": {
                "rows": limits.rows, "context": limits.longest, "max_tokens": limits.longest - 1,
                "default_max_tokens": serving.usual, "max_body": limits.body, "waiting": limits.waiting,
                "kept": serving.kept, "timeout": limits.timeout,
            },
        })  # fmt: skip

    # ------------------------------------------------------------ answers

    async def completions(self, request: Request) -> Response:
        """Answers to prompts."""
        return await self._answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        """Answers to chats."""
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        began = time.monotonic()
        try:
            body = await self._body(request)
        except ClientDisconnect:
            return Response(status_code=LEFT)
        wanted = parse(body, chat=chat, most=max(self._serving.limits.rows, 1))
        alone = self._large if len(body) > _LARGE else nullcontext()
        with self._serving.engine.expected(wanted.n * len(wanted.prompts)):
            async with alone:
                ready = await asyncio.get_running_loop().run_in_executor(self._thread, self._serving.prepare, wanted)
        exchange = Exchange(self._serving, wanted, ready, began)
        self._serving.engine.submit(exchange.answers)
        return exchange.stream() if wanted.stream else await exchange.whole(request)

    async def _body(self, request: Request) -> bytes:
        """The body, up to the limit and no further."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what pages of other sites can send without asking is not
            raise ApiError(
                415, f"the body is {kind or 'of no type'!r:.60}; send it with Content-Type: application/json",
                code="unsupported_media_type",
            )  # fmt: skip
        most, body = self._serving.limits.body, bytearray()
        too_large = ApiError(
            413, f"the body has more than the {most} bytes that are allowed; send less", code="request_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip
        said = request.headers.get("content-length", "")
        if said.isdigit() and int(said) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._serving.limits.reading):
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {self._serving.limits.reading:g} s; send it faster", code="timeout",
                headers={"Connection": "close"},
            ) from None  # fmt: skip
        return bytes(body)


class _Lingering(JSONResponse):
    """An error in the middle of a body, told at once; then the rest of the body is let in and forgotten.

    A connection that is closed on a client that still sends would lose it the error as well.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while (message := await receive()).get("more_body", False):
                    del message
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    kind = _Lingering if error.headers.get("Connection") == "close" else JSONResponse
    return kind(error.body(), error.status, headers=error.headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    """What Starlette refuses: paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    what = {404: f"there is no {request.url.path!r:.80}", 405: f"{request.method} is not allowed here"}
    told = ApiError(error.status_code, what.get(error.status_code, error.detail), code=None, headers=error.headers)
    return await _refuse(request, told)


async def _refuse_unknown(request: Request, _: Exception) -> Response:
    """What should not have happened; it is logged, and nobody else's business."""
    return await _refuse(request, ApiError(500, "the server failed; see its log", kind="server_error"))


# ---------------------------------------------------------------- before any path

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


# ---------------------------------------------------------------- the page

_PAGE = Path(__file__).with_name("page.html")


def page(model: str) -> Response:
    """The page, which may load nothing and talk to this server alone; a line of text where it was not installed."""
    if not _PAGE.exists():
        return PlainTextResponse(f"offramp serves {model}: POST /v1/chat/completions or /v1/completions\n")
    html, rules = _read_page()
    return HTMLResponse(html, headers={"Content-Security-Policy": rules, "X-Content-Type-Options": "nosniff"})


@cache
def _read_page() -> tuple[str, str]:
    """The file in the colours of all pages, and the policy that allows its own scripts and styles by their digests."""
    html = _PAGE.read_text(encoding="utf-8").replace("/* colours.css */", colours())
    scripts, styles = (" ".join(_digests(html, tag)) or "'none'" for tag in ("script", "style"))
    return html, (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digests(html: str, tag: str) -> list[str]:
    contents = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, flags=re.DOTALL | re.IGNORECASE)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in contents]

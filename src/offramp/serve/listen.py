"""Where the application listens: on this machine, by uvicorn, or in replicas on a cluster, by Ray Serve.

Here connections that dawdle are closed, and a signal lets the answers at work finish. On a cluster each replica has a
model of its own, tests the promise on its own answers, and counts for itself:

    from ray import serve
    from offramp.serve.listen import deployment

    def build():
        return Serving(offramp.load("smollm2"), policy, certificate, limits=Limits(local=False))

    serve.run(deployment(build, replicas=4))

The header `offramp-replica` of every response says which one it is of.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from offramp.serve.app import application

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from offramp.serve.serving import Serving

_HEADERS = 10.0
"""Seconds within which the first request of a connection must have begun."""
_LAST_WORDS = 5
"""Seconds that errors have to reach their clients when answers are ended."""


class _Connection(H11Protocol):
    """One that is closed where no request comes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        self.loop.call_later(_HEADERS, self._require_request)

    def _require_request(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """Ends in two steps: no new answers, then, after a while, an error for those at work."""

    def __init__(self, config: uvicorn.Config, serving: Serving, grace: float) -> None:
        super().__init__(config)
        self._serving, self._grace = serving, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called when a signal has come."""
        self._serving.engine.drain()
        asyncio.get_running_loop().call_later(self._grace, self._serving.engine.stop)
        await super().shutdown(sockets)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: Name or address.
        port: 0: any that is free.

    Returns:
        The socket; its name says which port it is.

    Raises:
        OSError: The address is not this machine's, or is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from error


def listen(serving: Serving, sock: socket.socket, *, grace: float) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends at once.

    Args:
        serving: The model.
        sock: Where to listen.
        grace: Seconds that answers at work have to finish.
    """
    config = uvicorn.Config(
        application(serving), http=_Connection, ws="none", log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=30, timeout_graceful_shutdown=int(grace) + _LAST_WORDS, lifespan="on",
    )  # fmt: skip
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it has ended
            signal.signal(number, lambda *_: None)
    Server(config, serving, grace).run(sockets=[sock])


# ---------------------------------------------------------------- on a cluster


def deployment(build: Callable[[], Serving], *, replicas: int = 1) -> Any:
    """An application for `ray.serve.run`.

    Args:
        build: Makes what is served, in each replica anew; so it loads the model itself.
        replicas: How many there are.

    Returns:
        The application.

    Raises:
        ModuleNotFoundError: Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ModuleNotFoundError(
            f"serving on a cluster needs Ray Serve ({error}); install it with: pip install 'offramp[serve-ray]'"
        ) from error

    def served() -> ASGIApp:
        return _signed(application(build()), serve.get_replica_context().replica_tag)

    asgi = serve.ingress(served)()
    made: Any = serve.deployment(asgi, name="offramp", num_replicas=replicas)
    return made.bind()


def _signed(inner: ASGIApp, name: str) -> ASGIApp:
    """An application whose responses say which replica they are of."""

    async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"offramp-replica", name.encode())]}
            await send(message)

        await inner(scope, receive, signed)

    return asgi

"""Listening: connections that dawdle are closed, and a signal lets the answers at work finish."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from offramp.serve.app import application

if TYPE_CHECKING:
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

"""Beyond one machine: the same application as a deployment of Ray Serve, each replica with a model of its own.

Not imported by anything here: a few lines for whoever has a cluster.

    from ray import serve
    from offramp.serve.ray import deployment

    def build():
        return Serving(offramp.load("smollm2"), policy, certificate, limits=Limits(local=False))

    serve.run(deployment(build, replicas=4))

Each replica tests the promise on its own answers, and counts for itself. The header `offramp-replica` of every response
says which one it is of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from offramp.serve.serving import Serving


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
    from offramp.serve.app import application

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

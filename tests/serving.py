"""A server in a thread for tests, and a running batch that returns what it is told."""

import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("sse_starlette", reason="needs the extra serve")

from offramp import LanguageModel  # noqa: E402
from offramp.core.running import Emitted  # noqa: E402
from offramp.serve.app import application  # noqa: E402
from offramp.serve.listen import Server, bound  # noqa: E402
from offramp.serve.serving import Limits, Serving  # noqa: E402
from tiny import character_tokenizer, tiny  # noqa: E402

EOS = 2


def spelt(text):
    """Token ids of the characters of a text."""
    return [ord(sign) - 32 + 4 for sign in text]


class ScriptedBatch:
    """Rows get the tokens of a script by their prompt's text, a prompt that is not in it its own tokens again.

    A prompt is read in one step; at full depth (threshold None) the script `full` is taken, if it has the prompt.
    """

    def __init__(self, script=None, full=None, *, rows=4, longest=200, layers=4, pause=0.0):
        self.script, self.full, self.layers, self.pause = script or {}, full or {}, layers, pause
        self.longest, self.chunk, self.free = longest, 64, list(range(rows))
        self.ledger = SimpleNamespace(costs=SimpleNamespace(flops=0))
        self.asked, self.left, self.released, self.fails = {}, {}, [], False
        self.reading = set()
        self.model = SimpleNamespace(at_work=contextlib.nullcontext)

    @property
    def active(self):
        return sorted(self.asked)

    def pieces(self):
        return [(row, 0, len(self.asked[row].ids)) for row in self.reading]

    def admit(self, asked):
        row = self.free.pop(0)
        self.reading.add(row)
        ids = list(asked.ids)
        tokens = self.script.get(tuple(ids), [*ids, EOS])
        if asked.threshold is None:
            tokens = self.full.get(tuple(ids), tokens)
        self.asked[row], self.left[row] = asked, list(tokens)[: asked.max_new_tokens]
        return row

    def release(self, row):
        del self.asked[row], self.left[row]
        self.reading.discard(row)
        self.free.append(row)
        self.released.append(row)

    def step(self):
        time.sleep(self.pause)
        if self.fails:
            self.fails = False
            raise RuntimeError("scripted to fail")
        self.ledger.costs.flops += 1000 * len(self.asked)
        self.reading.clear()
        made = []
        for row in self.active:
            token, ended = self.left[row].pop(0), not self.left[row] or self.left[row][0] is None
            asked = self.asked[row]
            depth = self.layers if asked.threshold is None else 2
            made.append(Emitted(
                row, token, depth, float("nan") if asked.threshold is None else 0.5, -0.25,
                [(token, -0.25), (5, -2.0)][: asked.top], ended, False,
            ))  # fmt: skip
        for emitted in made:
            if emitted.ended:
                del self.asked[emitted.row], self.left[emitted.row]
                self.free.append(emitted.row)
        return made


def model(name="llama"):
    """A tiny model that spells."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return LanguageModel(tiny(name), tokenizer, name="tiny")


@contextlib.contextmanager
def listening(app, kind):
    """The address of an application, until the end of the block; `kind` makes the server of its configuration."""
    import uvicorn

    sock = bound("127.0.0.1", 0)
    config = uvicorn.Config(
        app, ws="none", log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=5
    )
    server = kind(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def served(serving, grace=5.0):
    """The address of a server that listens until the end of the block."""
    return listening(application(serving), lambda config: Server(config, serving, grace))


@contextlib.contextmanager
def connected(address, data):
    """A connection over which bytes were sent as they are."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(data)
        yield connection


def raw(address, data):
    """What a server sends for some bytes until it closes the connection."""
    found = b""
    with connected(address, data) as connection:
        while piece := connection.recv(65536):
            found += piece
    return found


def posted(path, body, **headers):
    """The bytes of a request."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": len(body),
        "Connection": "close",
    }
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def until(true, seconds=60.0):
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


__all__ = [
    "EOS",
    "Limits",
    "ScriptedBatch",
    "Serving",
    "bound",
    "connected",
    "listening",
    "model",
    "posted",
    "raw",
    "served",
    "spelt",
    "until",
]

"""A peer as the bench sees it: a process that loads a model once and generates when asked (see `answer`)."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from offramp.hub.messages import first_line

SCRIPT = Path(__file__).with_name("answer.py")
LOAD_LIMIT, ANSWER_LIMIT = 600.0, 300.0
"""Seconds that loading and one generation may take."""


class PeerError(RuntimeError):
    """A peer cannot be had or has failed; the message is one line that says what to do."""


class Answer(NamedTuple):
    """One generation.

    Attributes:
        tokens: The new ones.
        seconds: Wall-clock time, as the peer's own process measured it.
        first: Seconds until the first of them.
    """

    tokens: list[int]
    seconds: float
    first: float


class Peer:
    """A process that generates; it ends with `close`, with the `with` block, and when this process ends.

    It has a session of its own, so that Ctrl-C reaches only this process, which then ends it.

    Args:
        name: What messages call it.
        command: The Python that has the engine.
        settings: The first line of `answer`'s protocol: the engine, and what it loads.
        environment: Of the process; None: this one's.
        script: What it runs.
        load_limit: Most seconds until it is ready.
        answer_limit: Most seconds of one generation.

    Attributes:
        versions: Of the engine and what it rests on.

    Raises:
        PeerError: It cannot be started, or does not load.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        settings: Mapping[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        script: Path = SCRIPT,
        load_limit: float = LOAD_LIMIT,
        answer_limit: float = ANSWER_LIMIT,
    ) -> None:
        self.name, self._limit = name, answer_limit
        self._said = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                [*command, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
                env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._said.close()
            raise PeerError(f"{command[0]} cannot be run: {first_line(error)}") from None
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.versions: dict[str, str] = dict(self._ask(settings, load_limit, "loading")["versions"])
        except BaseException:  # also Ctrl-C
            self.close()
            raise

    def generate(self, ids: Sequence[int], new: int) -> Answer:
        """Continue a prompt greedily.

        Args:
            ids: The prompt.
            new: Tokens to generate.

        Returns:
            The tokens, and how long they took.

        Raises:
            PeerError: It crashed, took too long, or answered something else. It has ended then.
        """
        said = self._ask({"ids": list(ids), "new": new}, self._limit, "generating")
        try:
            answer = Answer([int(token) for token in said["tokens"]], float(said["seconds"]), float(said["first"]))
        except (KeyError, TypeError, ValueError):
            raise self._failed(f"it answered {first_line(RuntimeError(json.dumps(said)))}") from None
        if len(answer.tokens) != new:
            raise self._failed(f"{new} tokens were asked for and {len(answer.tokens)} came")
        return answer

    def close(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError):  # what was not sent any more
            self._process.stdin.close()  # type: ignore[union-attr]
        self._said.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        """Move lines from the pipe into the queue, and an empty one when it ends."""
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for line in pipe:
                self._lines.put(line)
        self._lines.put(b"")

    def _ask(self, values: Mapping[str, Any], limit: float, doing: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(values)).encode() + b"\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            raise self._failed(f"{doing} took more than {limit:.0f} s") from None
        except OSError:  # it has ended and reads no more; what it said last is not read either
            line = b""
        if not line:
            raise self._failed(f"it ended while {doing}: {self._last_words()}")
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise self._failed(f"it answered {line[:80]!r}, which is no JSON object")
        if "error" in said:
            raise self._failed(first_line(RuntimeError(said["error"])))
        return said

    def _failed(self, reason: str) -> PeerError:
        self.close()
        return PeerError(reason)

    def _last_words(self) -> str:
        """The last line on its standard error, or how it ended."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        ended = f"by signal {-code}" if code < 0 else f"with exit status {code}"
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return first_line(RuntimeError(f"{said} ({ended})" if said else ended))

"""Starting the peers of a bench, each with its package, and ending them.

A package is a folder in the cache that pip fills once, or a Python that has it. The folder goes before this
environment's packages in the peer's process only, so that nothing here changes, and what both use (torch, transformers,
numpy) is of the same version for both.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offramp.core.language_model import LanguageModel
from offramp.hub.messages import first_line
from offramp.hub.model_sources import cache_folder, sole_maker
from offramp.native.kernels import processor
from offramp.peers.process import Peer, PeerError
from offramp.peers.weights import FORMATS, gguf_file, model_folder, require_llama
from offramp.runs.files import replace_folder
from offramp.values import choice

EVERY = 30.0
"""Seconds between two lines on an installation that takes long."""


@dataclass(frozen=True)
class Package:
    """What pip installs for a peer, without dependencies: those that are not named are offramp's own.

    Attributes:
        requirements: Exact versions; the first is the engine's.
        compiled: Whether the registry has its source only.
        environment: For its build.
    """

    requirements: tuple[str, ...]
    compiled: bool = False
    environment: tuple[tuple[str, str], ...] = ()


PACKAGES = {
    "llama.cpp": Package(
        ("llama-cpp-python==0.3.36", "diskcache==5.6.3"),
        compiled=True,
        environment=(("CMAKE_ARGS", "-DLLAVA_BUILD=OFF"),),  # images and sound, which nothing here needs
    ),
    "economize": Package(("economize==0.3.2",)),
}
"""Packages by the name of the peer."""


def python_of(name: str, pythons: Mapping[str, str], say: Callable[[str], None]) -> tuple[list[str], dict[str, str]]:
    """The Python that runs a peer.

    Args:
        name: Of the peer.
        pythons: Pythons that have a peer's package, by the peer's name. One that is not there runs in this Python, with
            its package before those that are here; it is installed into the cache if it is not there yet.
        say: Gets lines on an installation.

    Returns:
        The command and the environment of a process.

    Raises:
        PeerError: The package cannot be installed.
    """
    if name in pythons:
        return [pythons[name]], {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    folder = _installed(name, PACKAGES[name], say)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return [sys.executable], {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def folder_of(name: str) -> Path:
    """Where in the cache a peer's package is, or will be: a folder for each version, Python and kind of processor."""
    package = PACKAGES[name]
    made_for = [*package.requirements, sys.version, processor() if package.compiled else ""]
    digest = hashlib.sha256("\0".join(made_for).encode()).hexdigest()[:12]
    return cache_folder() / "peers" / f"{package.requirements[0].replace('==', '-')}-{digest}"


def _installed(name: str, package: Package, say: Callable[[str], None]) -> Path:
    """The folder with the package, complete or not at all; one process makes it, others wait."""
    folder = folder_of(name)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with sole_maker(folder):
            if not folder.is_dir():
                replace_folder(
                    folder, lambda new: _install(name, package, new, folder.with_name(f"{folder.name}.log"), say)
                )
    except OSError as error:
        raise PeerError(f"{folder} cannot be written: {first_line(error)}") from error
    return folder


def _install(name: str, package: Package, into: Path, log: Path, say: Callable[[str], None]) -> None:
    """Let pip fill a folder, in the background's priority, with all it says in a log."""
    what = package.requirements[0].replace("==", " ")
    how = "compiling it takes minutes, once" if package.compiled else "once"
    say(f"installing {what} for the peer {name} ({how}); log: {log}")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-v", "--no-deps"]
    if nice := shutil.which("nice"):
        command = [nice, "-n", "10", *command]
    cores = str(os.cpu_count() or 1)
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": cores, **dict(package.environment), **os.environ}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--target", str(into), *package.requirements], stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code = _wait(process, log, what, say)
        except BaseException:  # also Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code:
        raise PeerError(f"pip could not install {what}: {_reason(log)}; all it said: {log}")


def _wait(process: subprocess.Popen[bytes], log: Path, what: str, say: Callable[[str], None]) -> int:
    began = time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(EVERY)
        say(f"installing {what}, after {time.monotonic() - began:.0f} s: {_step(log)}")


def _step(log: Path) -> str:
    """How far a compilation is, "[34/112]", or the log's last line."""
    lines = _lines(log)
    steps = (line.split("]")[0] + "]" for line in reversed(lines) if line.startswith("[") and "/" in line.split("]")[0])
    return next(steps, lines[-1][:80] if lines else "begun")


def _reason(log: Path) -> str:
    """The first line of a log that tells of an error, or the last one."""
    lines = _lines(log)
    told = [line for line in lines if "error:" in line.lower() and "subprocess-exited" not in line]
    return first_line(RuntimeError((told or lines or ["it said nothing"])[0 if told else -1]))


def _lines(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.split("\n") if line.strip()]


NAMES = tuple(PACKAGES)
LLAMA_CPP = "llama.cpp"
"""What the names of its arms begin with."""


@contextmanager
def started(
    lm: LanguageModel,
    names: Sequence[str],
    *,
    context: int,
    threshold: float = 0.9,
    min_layer: int | None = None,
    pythons: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Peer | PeerError]]:
    """Peers that have loaded the model's weights; they end with the block.

    Args:
        lm: The model, on the CPU.
        names: Some of `NAMES`: "llama.cpp" is three arms, one for each number format; "economize" decodes as CALM does.
        context: Most tokens of a prompt and its continuation.
        threshold: Of economize's tests.
        min_layer: First layer that economize tests; None: half the depth.
        pythons: Pythons that have a peer's package, by name; for the others it is installed into the cache.
        say: Gets lines on what takes long, and on peers that cannot be had.

    Yields:
        Peers by the name of their arm, and in place of one that cannot be had, why.

    Raises:
        ValueError: A name is unknown, or the model is not on the CPU, where peers run.
    """
    pythons = dict(pythons or {})
    for name in (*names, *pythons):
        choice("peer", name, NAMES)
    if lm.split.device.type != "cpu":
        raise ValueError(f"the model is on {lm.split.device}, but peers run on the CPU; use device='cpu'")
    calm = {"threshold": threshold, "min_layer": lm.num_layers // 2 if min_layer is None else min_layer}
    plans: dict[str, Callable[[], Iterator[tuple[str, dict[str, Any]]]]] = {
        LLAMA_CPP: lambda: _llama_cpp(lm, context),
        "economize": lambda: _economize(lm, calm),
    }
    peers: dict[str, Peer | PeerError] = {}
    with ExitStack() as running:
        for name in dict.fromkeys(names):
            try:
                settings = list(plans[name]())
                command, environment = python_of(name, pythons, say)
                for arm, values in settings:
                    say(f"starting {arm}")
                    asked = {"peer": name, "threads": torch.get_num_threads(), **values}
                    peers[arm] = running.enter_context(_tried(arm, command, asked, environment, say))
            except PeerError as error:
                say(f"{name} is left out: {error}")
                peers = {arm: peer for arm, peer in peers.items() if not arm.startswith(name)} | {name: error}
        yield peers


def _tried(
    arm: str, command: Sequence[str], asked: Mapping[str, Any], environment: Mapping[str, str],
    say: Callable[[str], None],
) -> Peer:  # fmt: skip
    """A peer that has generated something, without matrix instructions where it dies of them.

    Virtual machines may show AMX and not allow it: llama.cpp then meets an illegal instruction.

    Returns:
        The peer.

    Raises:
        PeerError: It fails anyhow.
    """
    peer = Peer(arm, command, asked, environment=environment)
    try:
        peer.generate([0] * 16, 2)
    except PeerError as error:
        if not (asked.get("tiles") and f"signal {signal.SIGILL.value}" in str(error)):
            raise
        say(f"{arm} meets an instruction that is not allowed here; it goes on without packing weights for AMX")
        return _tried(arm, command, {**asked, "tiles": False}, environment, say)
    return peer


def _llama_cpp(lm: LanguageModel, context: int) -> Iterator[tuple[str, dict[str, Any]]]:
    require_llama(lm.model)
    for format in FORMATS:
        file = str(gguf_file(lm.model, format))
        yield f"{LLAMA_CPP} {format}", {"file": file, "context": context, "tiles": True}


def _economize(lm: LanguageModel, calm: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if lm.split.is_encoder_decoder:
        raise PeerError("it runs decoder-only models, and this one has an encoder")
    dtype = str(lm.model.dtype).removeprefix("torch.")
    yield "economize calm", {"folder": str(model_folder(lm.model)), "dtype": dtype, **calm}

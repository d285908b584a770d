"""Compiling the kernels: once per machine, into the cache folder, with the C++ compiler that is there.

The file's name says what it was made of: a digest of the source, the compiler's own words about itself, the flags and
the processor's features. So a cache shared by unlike machines holds one file for each, and a change of any of them
makes a new one.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from offramp.hub.messages import first_line, say
from offramp.hub.packaged import cache_folder
from offramp.native.library import open_library

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=fast")
_TIME_LIMIT = 300  # seconds; it takes ten


class NativeError(RuntimeError):
    """The native engine cannot be had, for a reason the user can act on; the message is one line."""


@cache
def library() -> ctypes.CDLL:
    """The kernels, compiled if they are not in the cache yet.

    A compiler is looked for in `$CXX`, then as c++, g++ and clang++, then as the package `ziglang`; `$OFFRAMP_CXXFLAGS`
    is added to its flags, such as -fsanitize=address or a plainer -march. Two processes may compile at once: each into
    a file of its own, and the last rename wins. Where the cache cannot be written, or nothing can be run from it, the
    file lives in a temporary folder as long as it takes to open it, and a line on standard error says so.

    Returns:
        The opened library.

    Raises:
        NativeError: There is no compiler, or it fails, or what it makes cannot be opened.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *_machine_flags(), *shlex.split(os.environ.get("OFFRAMP_CXXFLAGS", "")))
    digest = hashlib.sha256(SOURCE.read_bytes())
    digest.update("\0".join([*compiler, _version(tuple(compiler)), *flags, processor()]).encode())
    name = f"kernels-{digest.hexdigest()[:20]}.so"
    path = cache_folder() / "native" / name
    try:
        if path.is_file():
            return open_library(path)
    except OSError:
        pass  # damaged, such as by a full disk: make it again
    say("compiling the native kernels for this processor, which takes about ten seconds, once")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as work:
            made = _compile(compiler, flags, Path(work) / name)
            opened = open_library(made)
            made.replace(path)
            return opened
    except OSError as problem:
        with tempfile.TemporaryDirectory(prefix="offramp-native-") as work:
            try:
                opened = open_library(_compile(compiler, flags, Path(work) / name))
            except OSError as error:
                raise NativeError(f"the compiled kernels cannot be opened: {first_line(error)}") from error
        say(
            f"the kernels cannot be kept in {path.parent} ({first_line(problem)}), so that each start compiles them; "
            "name another folder in OFFRAMP_CACHE"
        )
        return opened


def find_compiler() -> list[str]:
    """The command of a C++ compiler.

    Returns:
        The command and what has to follow it.

    Raises:
        NativeError: There is none.
    """
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise NativeError(
        "no C++ compiler was found; install one (such as g++), name it in CXX, or: pip install 'offramp[native]'"
    )


def _compile(compiler: list[str], flags: tuple[str, ...], into: Path) -> Path:
    """Compile the kernels to `into`."""
    command = [*compiler, *flags, str(SOURCE), "-o", str(into)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"the compiler {compiler[0]} cannot be run: {first_line(error)}") from error
    if done.returncode or not into.is_file():
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr or "it made no file")
        raise NativeError(f"the compiler {compiler[0]} failed: {first_line(RuntimeError(said))}")
    return into


@cache
def _version(compiler: tuple[str, ...]) -> str:
    """What a compiler says it is."""
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"the compiler {compiler[0]} cannot be run: {first_line(error)}") from error
    return done.stdout


def _machine_flags() -> tuple[str, ...]:
    """Compile for this very processor."""
    return ("-mcpu=native",) if platform.machine() in ("aarch64", "arm64") else ("-march=native",)


def processor() -> str:
    """What tells processors apart for which different code is made."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = ("flags", "Features", "model name", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(told)))

"""The kernels of `kernels.cpp` as Python sees them: compiled, opened, their structs field by field, and their threads.

They are compiled once per machine, into the cache folder, with the C++ compiler that is there. The file's name says
what it was made of: a digest of the source, the compiler's own words about itself, the flags and the processor's
features. So a cache shared by unlike machines holds one file for each, and a change of any of them makes a new one.
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
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from offramp.hub.messages import first_line, say
from offramp.hub.model_sources import cache_folder

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


# ---------------------------------------------------------------- as structs and functions

F32, BF16, INT8, INT4 = 0, 1, 2, 3
"""Formats of weights, and the first two of cached keys and values."""

RMS, LAYER = 1, 2
"""Kinds of norms."""

ACTIVATIONS = {"identity": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5}
"""Activations of feed-forward layers."""

LINEAR, NORM, ROTATE, ATTEND = 0, 1, 2, 3
"""Kinds of operations."""

STORE, ADD, ACTIVATE, GATE = 0, 1, 2, 3
"""What becomes of an operation's result: it is stored, added to the target, activated, or gates its other half."""


class Matrix(Structure):
    """[rows, cols] in some format, with a bias or none; `stride` bytes from one row to the next."""

    _fields_ = [
        ("format", c_int64), ("rows", c_int64), ("cols", c_int64), ("stride", c_int64),
        ("data", c_void_p), ("bias", c_void_p),
    ]  # fmt: skip


class Norm(Structure):
    """A norm over `cols` values; kind 0 is none."""

    _fields_ = [("kind", c_int64), ("cols", c_int64), ("eps", c_double), ("weight", c_void_p), ("bias", c_void_p)]


class Op(Structure):
    """One operation of a block's program."""

    _fields_ = [
        ("kind", c_int64), ("src", c_int64), ("dst", c_int64), ("first", c_int64),
        ("into", c_int64), ("activation", c_int64), ("count", c_int64), ("multiplier", c_double),
        ("norm", Norm), ("key_norm", Norm), ("matrix", Matrix * 3),
        ("heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64), ("rotation", c_int64),
        ("rotated", c_int64), ("interleaved", c_int64), ("window", c_int64), ("scale", c_double), ("cap", c_double),
        ("sinks", c_void_p), ("memory", c_int64), ("biased", c_int64), ("clip", c_double), ("headwise", c_int64),
    ]  # fmt: skip


class Model(Structure):
    """Programs and the registers they work on."""

    _fields_ = [
        ("width", c_int64), ("registers", c_int64), ("widths", POINTER(c_int64)), ("ops", POINTER(Op)),
        ("program", POINTER(c_int64)), ("kv_format", c_int64),
    ]  # fmt: skip


class Readout(Structure):
    """One readout of A states: what the head reads, logits [A, K] and the best of them, each if it has an address."""

    _fields_ = [
        ("rows", c_int64), ("width", c_int64), ("count", c_int64), ("threads", c_int64), ("scale", c_double),
        ("factor", c_double), ("cap", c_double), ("hidden", c_void_p), ("lenses", c_int64), ("lens", POINTER(Matrix)),
        ("norm", POINTER(Norm)), ("head", POINTER(Matrix)), ("ids", c_void_p), ("ids_step", c_int64),
        ("inputs", c_void_p), ("logits", c_void_p), ("best", c_void_p), ("tokens", c_void_p), ("normaliser", c_void_p),
    ]  # fmt: skip


class Rotation(Structure):
    """Cosines and sines by position, [positions, rotated / 2] each."""

    _fields_ = [("cosines", c_void_p), ("sines", c_void_p)]


class Call(Structure):
    """One run of some programs over M tokens."""

    _fields_ = [
        ("first", c_int64), ("last", c_int64), ("rows", c_int64), ("layer", c_int64), ("capacity", c_int64),
        ("threads", c_int64), ("hidden", c_void_p), ("batch", c_void_p), ("slot", c_void_p), ("position", c_void_p),
        ("keys", c_void_p), ("values", c_void_p), ("rotations", c_void_p), ("distances", c_void_p), ("reach", c_int64),
        ("memory_capacity", c_int64), ("memory_lengths", c_void_p), ("memory_keys", c_void_p),
        ("memory_values", c_void_p),
    ]  # fmt: skip


class Cycles(Structure):
    """Tokens of one row that are drafted and checked, in turns."""

    _fields_ = [
        ("mix", Readout), ("call", Call), ("test", Readout), ("deep", Call), ("check", Readout),
        ("embeddings", c_void_p), ("format", c_int64), ("count", c_int64), ("tokens", c_void_p), ("before", c_void_p),
        ("both", c_void_p), ("most", c_int64), ("confidence", c_int64), ("threshold", c_double), ("accept", c_double),
        ("room", c_int64), ("cycles", c_int64), ("ends", c_void_p), ("ends_count", c_int64), ("confidences", c_void_p),
        ("logprobs", c_void_p), ("notes", c_void_p), ("seconds", c_void_p), ("made", c_int64),
    ]  # fmt: skip


class Exit(Structure):
    """Where a token may leave, or has to."""

    _fields_ = [("layer", c_int64), ("test", Readout)]


class Stretch(Structure):
    """Tokens of one row, one after another, each as deep as it needs to go."""

    _fields_ = [
        ("call", Call), ("fill", Call), ("embeddings", c_void_p), ("format", c_int64), ("token", c_int64),
        ("most", c_int64), ("exits", c_int64), ("exit", POINTER(Exit)), ("thresholds", c_void_p),
        ("confidence", c_int64), ("keep", c_int64), ("kept", c_void_p), ("skip", c_void_p), ("skipped", c_int64),
        ("blocks", c_int64), ("frozen", c_void_p), ("frozen_layer", c_void_p), ("frozen_slot", c_void_p),
        ("frozen_position", c_void_p), ("frozen_count", c_int64), ("filled", c_void_p), ("ends", c_void_p),
        ("ends_count", c_int64), ("tokens", c_void_p), ("layers", c_void_p), ("tests", c_void_p),
        ("confidences", c_void_p), ("normalisers", c_void_p), ("fills", c_void_p), ("fills_count", c_int64),
        ("seconds", c_void_p), ("made", c_int64),
    ]  # fmt: skip


STRUCTS = (Matrix, Norm, Op, Model, Call, Readout, Cycles, Exit, Stretch)
"""In the order in which the kernels give their sizes."""


def address(tensor: Tensor) -> int:
    """Where a tensor's values lie one after another; a view that skips some would be read wrongly."""
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous")
    return tensor.data_ptr()


def open_library(path: Path) -> ctypes.CDLL:
    """The compiled kernels.

    Returns:
        The library, its functions typed.

    Raises:
        OSError: It is damaged, or not for this machine.
    """
    library = ctypes.CDLL(str(path))
    try:
        library.offramp_sizes.restype = c_int64
        sizes = [library.offramp_sizes(c_int64(i)) for i in range(len(STRUCTS))]
        library.offramp_run.argtypes = [POINTER(Model), POINTER(Call)]
        library.offramp_run.restype = None
        library.offramp_readout.argtypes = [POINTER(Readout)]
        library.offramp_readout.restype = None
        library.offramp_cycles.argtypes = [POINTER(Model), POINTER(Cycles)]
        library.offramp_cycles.restype = None
        library.offramp_stretch.argtypes = [POINTER(Model), POINTER(Stretch)]
        library.offramp_stretch.restype = None
        library.offramp_rank.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p]
        library.offramp_rank.restype = None
        library.offramp_read.argtypes = [c_void_p, c_int64, c_int64]
        library.offramp_read.restype = ctypes.c_uint64
    except AttributeError as error:
        raise OSError(f"{path} lacks a function ({error})") from error
    if sizes != [ctypes.sizeof(struct) for struct in STRUCTS]:
        raise OSError(f"{path} was made for other structures")
    return library


# ---------------------------------------------------------------- who has the processor


class Threads:
    """The kernels' threads: those that torch has, or had when it was kept to one."""

    def __init__(self) -> None:
        self._before: int | None = None

    @property
    def count(self) -> int:
        """How many."""
        return self._before or torch.get_num_threads()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep torch to one thread in the block, while the kernels have as many as it had.

        A thread that helped torch with one operation waits for the next one by spinning, and takes a core from the
        kernels meanwhile: on two cores, decoding was slower by a quarter to a half.
        """
        if self._before is not None:
            yield
            return
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._before)
            self._before = None

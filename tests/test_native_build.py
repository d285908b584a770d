"""Compiling the kernels: without a compiler, with a broken one, into a cache that cannot be written, by two at once."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from offramp.native import kernels
from offramp.native.kernels import NativeError, open_library
from offramp.native.model import NativeModel
from tiny import LAYERS, inputs_for, tiny


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and nothing remembered."""
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(kernels, "FLAGS", ("-O0", *kernels.FLAGS[1:]))  # quick to compile
    kernels.library.cache_clear()
    kernels._version.cache_clear()
    yield tmp_path
    kernels.library.cache_clear()
    kernels._version.cache_clear()


def kept(folder):
    return sorted(folder.glob("native/*"))


def test_it_is_compiled_once(fresh, monkeypatch):
    kernels.library()
    (made,) = kept(fresh)
    before = made.stat().st_mtime_ns
    kernels.library.cache_clear()
    kernels.library()
    assert [made] == kept(fresh)
    assert made.stat().st_mtime_ns == before


def test_a_damaged_file_is_made_again(fresh):
    kernels.library()
    (made,) = kept(fresh)
    made.unlink()  # the open library keeps the old one
    made.write_bytes(b"\x7fELF and nothing else")
    kernels.library.cache_clear()
    assert kernels.library().offramp_sizes(0) > 0
    assert made.stat().st_size > 1000


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NativeError, match=r"no C\+\+ compiler was found; install one"):
        kernels.library()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", "failed"),
        ("echo 'kernels.cpp:1: error: not today' >&2; exit 1", "not today"),
        ('while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"', "cannot be opened"),
    ],
)
def test_a_broken_compiler(fresh, monkeypatch, script, message):
    compiler = fresh / "compiler"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo one && exit 0\n{script}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(NativeError, match=message):
        kernels.library()
    assert kept(fresh) == []  # nothing half-made


def test_a_compiler_that_is_not_there(fresh, monkeypatch):
    monkeypatch.setenv("CXX", str(fresh / "nothing"))
    with pytest.raises(NativeError, match="cannot be run"):
        kernels.library()


def test_a_cache_that_is_a_file(fresh, capsys):
    (fresh / "native").write_text("in the way")
    assert kernels.library().offramp_sizes(0) > 0
    assert "cannot be kept in" in capsys.readouterr().err


def test_a_cache_that_nothing_can_be_run_from(fresh, monkeypatch, capsys):
    """A file system mounted noexec, or another user's folder: the compiled file is there and does not open."""

    def opened(path):
        if path.is_relative_to(fresh):
            raise OSError(f"{path}: failed to map segment from shared object: Operation not permitted")
        return open_library(path)

    monkeypatch.setattr(kernels, "open_library", opened)
    assert kernels.library().offramp_sizes(0) > 0
    assert "Operation not permitted), so that each start compiles them" in capsys.readouterr().err
    assert kept(fresh) == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its flags are those of x86-64")
@torch.no_grad()
def test_a_processor_without_avx(fresh, monkeypatch):
    """Vectors are the compiler's own: a plainer processor gets a file of its own, which computes the same."""
    monkeypatch.setenv("OFFRAMP_CXXFLAGS", "-march=x86-64")
    plain = NativeModel(tiny("llama"))
    ids = inputs_for("llama", 3)["input_ids"]
    got = plain.readout(plain.run(plain.start(ids), 0, LAYERS).hidden)
    torch.testing.assert_close(got, tiny("llama")(ids).logits, atol=2e-5, rtol=1e-5)
    kernels.library.cache_clear()
    monkeypatch.delenv("OFFRAMP_CXXFLAGS")
    kernels.library()
    assert len(kept(fresh)) == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="whoever may write anywhere is not stopped")
def test_a_cache_that_cannot_be_written(fresh):
    fresh.chmod(0o500)
    assert kernels.library().offramp_sizes(0) > 0


def test_two_processes_at_once(fresh):
    code = (
        "from offramp.native import kernels; kernels.FLAGS = ('-O0', *kernels.FLAGS[1:]); "
        "print(kernels.library().offramp_sizes(0))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert len(set(said)) == 1
    assert len(kept(fresh)) == 1


def test_a_child_after_a_fork_computes_the_same():
    """Workers do not survive a fork: the child starts its own."""
    code = """
import ctypes, os, torch
from offramp.native import kernels as lib
from offramp.native.weights import Part, Weights
from offramp.native.kernels import library
torch.manual_seed(0)
linear, weights = torch.nn.Linear(64, 4096, bias=False), Weights()
matrix, x = weights.matrix(Part(linear)), torch.randn(1, 64)
def times():
    out = torch.empty(1, 4096)
    call = lib.Readout(1, 64, 4096, 2, 1, 1, head=ctypes.pointer(matrix))
    call.hidden, call.logits = lib.address(x), lib.address(out)
    library().offramp_readout(call)
    return out
first = times()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(times(), first) else 1)
assert torch.equal(times(), first)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_workers_sleep_between_calls():
    """A second after a call no thread of this process works."""
    code = """
import resource, time, torch
from offramp.native import kernels as lib
from offramp.native.kernels import library
data = torch.zeros(1 << 16, dtype=torch.int64)
library().offramp_read(lib.address(data), len(data), 4)
time.sleep(0.2)
before = resource.getrusage(resource.RUSAGE_SELF)
time.sleep(1)
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert float(done.stdout) < 0.5

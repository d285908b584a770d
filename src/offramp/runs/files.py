"""Writing files and folders so that an interrupted write leaves the old one, or none.

Links are followed, modes and umask are kept, and pipes and devices are written into. What a killed process left half
done, in hidden files and folders beside its target, goes with the next write there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FRESH = 60.0
"""Seconds for which a hidden file is left alone even if no process seems to have it: one may be about to lock it."""
_LOOKS = 16
"""Times that this process looks for leftovers in a folder: one that fills up is not looked through for every file."""
_looked: Counter[Path] = Counter()
_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_HERE = -100  # AT_FDCWD: paths are as they are given


# ---------------------------------------------------------------- files


def require_writable(path: Path) -> None:
    """Raise a ValueError, before long work is done for it, if a file could not be written there; nothing is made."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file, such as {path / 'result.json'}")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise ValueError(f"{path} may not be written; change its permissions, or name another file")
        if _special(path):
            return
    folder = next(parent for parent in _target(path).parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be made, since {folder} is no folder; name another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be made, since {folder} may not be written; name a file elsewhere")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`; on any failure remove it.

    The file that a link leads to is replaced, not the link. A file keeps its mode; a new one has that of the umask.
    What is no regular file, such as a pipe or /dev/stdout, is written into once `write` is done. The temporary name
    keeps the suffix of `path`, for writers that look at it.

    Raises:
        IsADirectoryError: It is a folder.
        OSError: It cannot be written; `path` is what it was.
    """
    if _special(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, f"new{path.suffix}")
            write(temporary)
            _pour(temporary, path)
        return
    target = _target(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file", str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = _hidden(target, target.suffix)
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        _lock(handle)
        mode = stat.S_IMODE(target.stat().st_mode if target.exists() else os.fstat(handle).st_mode)
        write(temporary)
        temporary.chmod(mode)
        temporary.replace(target)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text, atomically."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """Write one JSON document, atomically; NaN is refused, as JSON has none."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _special(path: Path) -> bool:
    """Whether a path is written into: a pipe, a device, or a name of an open file, such as /dev/stdout."""
    if Path(os.path.abspath(path)).parts[:2] in (("/", "dev"), ("/", "proc")):  # noqa: PTH100 - no link is followed
        return path.exists() and not path.is_dir() and not path.absolute().is_relative_to("/dev/shm")
    return path.exists() and not path.is_file() and not path.is_dir()


def _pour(source: Path, path: Path) -> None:
    """Write a file's bytes into what is open elsewhere, behind what was written there."""
    sys.stdout.flush()
    with source.open("rb") as file, open(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as into:  # noqa: PTH123
        shutil.copyfileobj(file, into)


def _target(path: Path) -> Path:
    """Where a path leads, through links."""
    return Path(os.path.realpath(path))


# ---------------------------------------------------------------- folders


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder beside `path`, then put it in the place of `path`; on any failure undo it.

    Whether what is there may go is for the caller to know. On Linux the two change places in one step, where the file
    system can. Elsewhere there is a moment without either, and `recover_folder` ends what a process killed then began.

    Raises:
        OSError: It cannot be written; `path` is what it was.
    """
    path = _target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    _remove_leftovers(path)
    work = _hidden(path)
    work.mkdir()
    handle = _opened(work)
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        write(new)
        _settle_modes(new, path)
        if not path.exists() or not _exchange(new, path):
            if path.exists():
                path.rename(old)
            new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(work, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def recover_folder(path: Path) -> None:
    """Finish what a process began that was killed while it replaced this folder; a living one is waited for."""
    deadline = time.monotonic() + 2
    while not path.exists() and time.monotonic() < deadline:
        begun = [work for work in path.parent.glob(f".{glob.escape(path.name)}-*") if _between(work)]
        if not begun:
            return
        for work in begun:
            if (handle := _opened(work)) is not None:
                with contextlib.suppress(OSError):  # another reader was first
                    (work / "new").rename(path)  # it was whole before the old one went
                    shutil.rmtree(work)
                os.close(handle)
        time.sleep(0.01)


def _between(work: Path) -> bool:
    """Whether its writer is between its two renames; without `new` it is behind them, and `old` may be half removed."""
    return (work / "old").is_dir() and (work / "new").is_dir()


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places at once; False: this system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _settle_modes(new: Path, path: Path) -> None:
    """Give a folder the mode of the one it replaces, and its files that of the umask: some are written for one only."""
    plain = stat.S_IMODE(new.stat().st_mode) & 0o666
    for file in new.rglob("*"):
        if file.is_file():
            file.chmod(plain)
    if path.exists():
        new.chmod(stat.S_IMODE(path.stat().st_mode))


# ---------------------------------------------------------------- hidden files


def _hidden(target: Path, suffix: str = "") -> Path:
    """A name beside a target that nothing has."""
    stem = target.name.removesuffix(suffix)
    return target.with_name(f".{stem}-{os.urandom(6).hex()}{suffix}")


def _lock(handle: int) -> bool:
    """Mark an open file as this process's, until it ends or closes it; False: another has it."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where leftovers stay
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _opened(folder: Path) -> int | None:
    """A handle of a folder or file that no other process has; None: one has it, or it cannot be told."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    if _lock(handle):
        return handle
    os.close(handle)
    return None


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left beside a target; what a living one is at work on stays."""
    if _looked[target.parent] >= _LOOKS:
        return
    _looked[target.parent] += 1
    stem, suffix = target.name.removesuffix(target.suffix), target.suffix
    names = {f".{glob.escape(stem)}-*{glob.escape(suffix)}", f".{glob.escape(target.name)}-*"}
    for left in {left for name in names for left in target.parent.glob(name)}:
        token = left.name.removesuffix(suffix).rpartition("-")[2]
        unfinished = _between(left) and not target.exists()
        if len(token) != 12 or set(token) - set("0123456789abcdef") or unfinished:
            continue
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime < _FRESH or (handle := _opened(left)) is None:
                continue
            shutil.rmtree(left) if left.is_dir() else left.unlink()
            os.close(handle)

"""Writing files and folders so that an interrupted write leaves the old one, or none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`; on any failure remove it.

    The temporary name keeps the suffix of `path`, for writers that look at it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text, atomically."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """Write one JSON document, atomically; NaN is refused, as JSON has none."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder beside `path`, then put it in the place of `path`; on any failure undo it.

    Whether what is there may go is for the caller to know. A process killed between the two renames leaves the old
    folder beside `path`, in a hidden folder named after it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        write(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(work, ignore_errors=True)


def differences(have: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two JSON objects, in words."""
    found = []
    for key in dict.fromkeys([*have, *asked]):
        old, new = have.get(key), asked.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r} and is now {new!r}")
    return found


@contextlib.contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """A run folder, made if missing, for this process alone.

    Args:
        folder: The folder.
        busy: What to say if another process has it, such as "another calibration runs".

    Yields:
        Nothing.

    Raises:
        ValueError: Another process has it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{busy} in {folder}; wait for it, or give another folder") from None
    try:
        yield
    finally:
        lock.release()

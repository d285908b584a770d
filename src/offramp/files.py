"""Writing files and folders so that an interrupted write leaves the old one, or none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, contiguous ones, as safetensors that others may read too; into a folder not yet in use."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path)
    path.chmod(0o644)  # it is written for its owner's eyes only


def append_lines(path: Path, values: Iterable[Any]) -> None:
    """Add JSON documents to a file, one per line; they are on the disk when this returns. NaN is refused."""
    text = "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values)
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def open_lines(
    path: Path, header: Mapping[str, Any], what: str, whole: Callable[[int], int] | None = None
) -> list[Any]:
    """Begin a file of JSON lines with a header, or go on with one that begins with the same.

    Half a line, which an interrupted `append_lines` may have left at the end, is cut off.

    Args:
        path: The file; made if missing, with its folder.
        header: How the lines come about, as JSON values.
        what: They are, for messages.
        whole: From the number of lines behind the header to how many of them count; the others are cut off, too. None:
            all count.

    Returns:
        The values behind the header.

    Raises:
        ValueError: The header is another one, or the file holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # behind the last line end: half a line
    asked = json.loads(json.dumps(header))
    if not lines:
        path.write_bytes(b"")
        append_lines(path, [asked])
        return []
    try:
        have, *values = [json.loads(line) for line in lines]
        if not isinstance(have, dict):
            raise ValueError(f"it begins with a JSON {type(have).__name__}")
    except ValueError as error:
        raise ValueError(f"{path} does not hold {what} ({error}); remove it, or use another folder") from None
    if differing := differences(have, asked):
        raise ValueError(
            f"{path} holds {what} made otherwise ({'; '.join(differing)}); remove it, or use another folder"
        )
    count = len(values) if whole is None else whole(len(values))
    os.truncate(path, sum(len(line) + 1 for line in lines[: count + 1]))
    return values[:count]


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

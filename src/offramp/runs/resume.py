"""What lets a killed run go on: what it was asked for, one process at a time, and files of JSON lines that grow.

What was asked for is written when a run begins and compared whenever it goes on. Every line is an object with the
SHA-256 of itself and of the line before it under "digest", so that a line that was changed, moved or taken out of the
middle does not go unnoticed. Half a line at the end, which a killed process may have left, counts for nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from offramp.runs import digests
from offramp.runs.bounded import content, parsed, read_object
from offramp.runs.digests import sealed, unsealed
from offramp.runs.files import replace_file, write_json

SAME = "give the same options to continue it, or another folder"
_DIGITS = 32  # of a digest
_CHUNK = 1 << 16
Lines = list[dict[str, Any]]
REMOVE = "remove it, or use another folder"


def differences(have: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two JSON objects, in words."""
    found = []
    for key in dict.fromkeys([*have, *asked]):
        old, new = have.get(key), asked.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r} and is now {new!r}")
    return found


def require_same(
    have: Mapping[str, Any], asked: Mapping[str, Any], place: object, holds: str = "another run: {}", way: str = SAME
) -> None:
    """A ValueError if they differ: `place` holds `holds`, with {} for the differences; `way` says what to do."""
    if differing := differences(have, asked):
        raise ValueError(f"{place} holds {holds.format('; '.join(differing))}; {way}")


def write_asked(path: Path, asked: Mapping[str, Any], **beside: Any) -> None:
    """Write what is asked for, with a digest; what stands beside it is not compared."""
    write_json(path, sealed({**asked, **beside}))


def read_asked(path: Path, advice: str, *beside: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write_asked` wrote, and what stands `beside` it; a ValueError with the advice if it is damaged."""
    have = unsealed(read_object(path, advice), path, advice)
    return have, {name: have.pop(name) for name in beside if name in have}


def as_json(values: Any) -> Any:
    """JSON values as they come back: without tuples and other keys than texts."""
    return json.loads(json.dumps(values))


@contextlib.contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """A run folder, made if missing, for this process alone; a ValueError begins with `busy` if another has it."""
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


def append_lines(path: Path, values: Iterable[Mapping[str, Any]], *, durable: bool = True) -> None:
    """Add JSON objects without NaN, one per line; `durable`: they are on the disk when this returns."""
    text = _text(values, _last_digest(path))  # to a file of an earlier version, without digests, without
    with path.open("ab") as file:
        file.write(text)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file of JSON objects, one per line, atomically."""
    text = _text(values, "")
    replace_file(path, lambda temporary: temporary.write_bytes(text))


def read_lines(path: Path, what: str, advice: str = REMOVE) -> Lines:
    """The objects, without digests and half a line at the end; a ValueError if a line is not what was written."""
    found: Lines = []
    last: str | None = ""
    for number, line in enumerate(content(path).split(b"\n")[:-1], 1):
        place = f"{path}, line {number}"
        try:
            value = parsed(line.decode("utf-8"), place)
            if not isinstance(value, dict):
                raise ValueError(f"{place} is a JSON {type(value).__name__}")  # noqa: TRY004 - it is in a file
        except ValueError as error:
            raise ValueError(f"{path} does not hold {what} ({error}); {advice}") from None
        given = value.pop("digest", None)
        if number == 1 and given is None:
            last = None
        if given != (None if last is None else _digest(last, value)):
            raise ValueError(
                f"{place} is not what was written: {what} were changed or are damaged (the digest differs); {advice}"
            )
        last = given
        found.append(value)
    if last is None:
        digests.warn_of_none(path)
    return found


def keep_lines(path: Path, count: int) -> None:
    """Cut off all lines behind the first `count`, and half a line at the end."""
    lines = content(path).split(b"\n")[:-1]
    os.truncate(path, sum(len(line) + 1 for line in lines[:count]))


def open_lines(path: Path, header: Mapping[str, Any], what: str, whole: Callable[[Lines], int] | None = None) -> Lines:
    """Begin a file with a header, or go on with one with the same: the objects behind it, as many as `whole` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = as_json(header)
    lines = read_lines(path, what) if path.exists() else []
    if not lines:
        path.write_bytes(b"")
        append_lines(path, [asked])
        return []
    have, *values = lines
    require_schema(path, have, asked.get("schema"), what)
    require_same(have, asked, path, f"{what} made otherwise ({{}})", REMOVE)
    count = len(values) if whole is None else whole(values)
    keep_lines(path, count + 1)
    return values[:count]


def require_schema(path: Path, header: Mapping[str, Any], schema: str | None, what: str) -> None:
    """Raise a ValueError unless lines of this kind stand behind a header."""
    if (found := header.get("schema")) != schema:
        raise ValueError(f"{path} does not hold {what} (its schema is {found!r}, not {schema!r}); {REMOVE}")


def _text(values: Iterable[Mapping[str, Any]], last: str | None) -> bytes:
    """Lines behind one of that digest; None: behind one that has none."""
    lines = []
    for value in values:
        plain = json.loads(json.dumps(dict(value), allow_nan=False))
        if last is not None:
            last = _digest(last, plain)
            plain["digest"] = last
        lines.append(json.dumps(plain, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _digest(before: str, value: Mapping[str, Any]) -> str:
    return hashlib.sha256((before + json.dumps(value)).encode()).hexdigest()[:_DIGITS]


def _last_digest(path: Path) -> str | None:
    """Of the last line; empty: there is no line; None: it has none."""
    if not path.exists() or not (size := path.stat().st_size):
        return ""
    tail, length = b"", _CHUNK
    with path.open("rb") as file:
        while len(tail) < size and tail.count(b"\n") < 2:  # the end of the last line, and that of the line before it
            file.seek(max(0, size - length))
            tail, length = file.read(), 4 * length
    try:
        value = json.loads(tail.split(b"\n")[-2])
    except (ValueError, IndexError):
        raise ValueError(f"{path} does not end with a whole line; {REMOVE}") from None
    digest = value.get("digest") if isinstance(value, dict) else None
    return digest if isinstance(digest, str) else None

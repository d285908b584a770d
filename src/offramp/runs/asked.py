"""What a run was asked for: written when it begins, compared whenever it goes on; and one process at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offramp.runs.bounded import read_object
from offramp.runs.digests import sealed, unsealed
from offramp.runs.files import write_json

SAME = "give the same options to continue it, or another folder"


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

"""What comes from files nobody has looked at yet: whole, but never more than memory should hold.

A few kilobytes of gzip can unpack to gigabytes, and a few of JSON can be nested or numbered beyond what Python reads.
All of that is refused with one line while little of it is in memory.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

MOST_BYTES = 4 << 30
"""Of one file, unpacked."""
MOST_JSON = 256 << 20
"""Bytes of a file that is one JSON document: its values take several times as much memory."""
MOST_RATIO, FREE_BYTES = 200, 64 << 20
"""A gzip file may unpack to so many times its size; what unpacks to no more than `FREE_BYTES`, to any number of times.
Text packs to a third or a tenth, black images to a fiftieth; only what was made for it comes near gzip's 1,000."""
LONGEST_LINE = 10_000_000
"""Characters: a long book, three times over."""
DEEPEST = 100
"""Objects and lists of JSON within one another."""

_CHUNK = 1 << 20


def content(path: Path) -> bytes:
    """All bytes of a file, unpacked if its name ends in `.gz`; a ValueError if damaged or more than is sensible."""
    with path.open("rb") as file:
        if path.suffix.lower() != ".gz":
            return whole(file, path)
        try:
            return whole(cast("BinaryIO", gzip.GzipFile(fileobj=file)), path, packed=file)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error}); fetch it again, or drop the .gz") from None


def read_json(path: Path, advice: str) -> Any:
    """The value of a JSON document without NaN and infinity, not larger and not deeper than sensible."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_JSON + 1)
        if len(data) > MOST_JSON:
            raise ValueError(f"{path} holds more than {MOST_JSON:,} bytes, the most that is read of one document")
        return parsed(decoded(data, path), str(path), finite=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {advice}") from error
    except ValueError as error:
        said = str(error)
        said = f"it {said.removeprefix(f'{path} ')}" if said.startswith(f"{path} ") else said
        raise ValueError(f"{path} is damaged: {said}; {advice}") from None


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """`read_json` for a file that holds an object; a ValueError for any other value, too."""
    values = read_json(path, advice)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds a JSON {type(values).__name__}, not an object; {advice}")
    return values


def whole(file: BinaryIO, place: object, *, packed: BinaryIO | None = None) -> bytes:
    """All that an open file, perhaps unpacked from `packed`, holds; a ValueError, about `place`, if it is too much."""
    found = bytearray()
    while piece := file.read(_CHUNK):
        found += piece
        if len(found) > MOST_BYTES:
            raise ValueError(
                f"{place} holds more than {MOST_BYTES:,} bytes{' unpacked' if packed else ''}, the most that is read "
                "of one file; divide it"
            )
        if packed and len(found) > FREE_BYTES and len(found) > MOST_RATIO * (packed.tell() if packed.seekable() else 0):
            raise ValueError(
                f"{place} unpacks to more than {MOST_RATIO} times its size, which data hardly do; if it is right, "
                "unpack it with gunzip and give the result"
            )
    return bytes(found)


def decoded(data: bytes, place: object) -> str:
    r"""Bytes as text, UTF-8 with or without a mark, line ends as ``\n``; a ValueError about `place` if it is none."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}, line {_line(data, error.start)} is not UTF-8; convert the file") from None
    if (at := data.find(b"\0")) >= 0:
        raise ValueError(
            f"{place}, line {_line(data, at)} holds a NUL, which text does not; if the file is UTF-16, convert it "
            "to UTF-8"
        )
    text = text.replace("\r\n", "\n")
    return text if "\n" in text else text.replace("\r", "\n")  # as old Macs ended lines


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1


def parsed(text: str, place: str, *, hint: str = "", finite: bool = False) -> Any:
    """The value of a JSON text; a ValueError names the place, and gives the hint if it is no JSON at all."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant if finite else float,
            parse_float=_finite if finite else float,
        )
    except _ConstantError as error:
        raise ValueError(f"{place} holds {error}, which is no JSON number") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}){hint}") from None
    except _TwiceError as error:
        raise ValueError(f"{place} has the key {str(error)!r:.80} twice in one object; keep one of them") from None
    except RecursionError:
        raise ValueError(_too_deep(place)) from None
    except ValueError:  # of whole numbers; others become infinite
        raise ValueError(
            f"{place} holds a number of more than {sys.get_int_max_str_digits():,} digits; put it in quotes, or "
            "remove it"
        ) from None
    if _depth_exceeds(value, DEEPEST):
        raise ValueError(_too_deep(place))
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{place} holds half of a character (\\ud800 to \\udfff alone); write it whole, or remove it"
            ) from None
    return value


class _TwiceError(Exception):
    """A key that an object has twice."""


class _ConstantError(Exception):
    """NaN or infinity."""


def _constant(name: str) -> Any:
    raise _ConstantError(name)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # such as 1e999, which no float holds
        raise _ConstantError(text)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


def _too_deep(place: str) -> str:
    return f"{place} has objects and lists nested more than {DEEPEST} times; give flatter JSON"


def _depth_exceeds(value: Any, most: int) -> bool:
    level, depth = [value], 0
    while level := [outer for outer in level if isinstance(outer, dict | list)]:
        if (depth := depth + 1) > most:
            return True
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return False

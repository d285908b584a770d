"""Rows of files and of data sets on the hub, whatever they are about: JSON, JSON Lines, lines of text; also gzipped."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

HUB = "hub:"


class Row(NamedTuple):
    """One entry.

    Attributes:
        place: Where it stands, for messages.
        position: Its line or entry, counted from 1, as text.
        value: What stands there.
    """

    place: str
    position: str
    value: Any

    @property
    def keys(self) -> str:
        """What there is in an object, for messages."""
        return ", ".join(map(repr, self.value)) or "nothing"


def kind(path: Path) -> str:
    """The ending of a file's name in lower case, without `.gz`."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Args:
        path: The file, gzipped if its name ends in `.gz`.

    Returns:
        Its text.

    Raises:
        ValueError: It is empty, not UTF-8, or damaged.
    """
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error}); fetch it again, or drop the .gz") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is not UTF-8; convert the file") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; give a file with text")
    return text


def text_rows(path: Path) -> list[Row]:
    """The lines of a file, empty ones included."""
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()
    return [Row(f"{path}, line {n}", str(n), line) for n, line in enumerate(lines, 1)]


def json_rows(path: Path) -> Iterator[Row]:
    """The values of a `.jsonl` file's lines, or of a `.json` file's list (SQuAD keeps it under "data").

    Yields:
        The values, of any type.

    Raises:
        ValueError: Not JSON, or not such a list.
    """
    if kind(path) == ".jsonl":
        for row in text_rows(path):
            if row.value.strip():
                try:
                    yield row._replace(value=json.loads(row.value))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{row.place} is not JSON ({error})") from None
        return
    try:
        values = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); JSON Lines need the ending .jsonl") from None
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
    if not isinstance(values, list):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}, but a list of objects is needed")
    yield from (Row(f"{path}, entry {n}", str(n), value) for n, value in enumerate(values, 1))


def objects(rows: Iterable[Row], *keys: object) -> Iterator[Row]:
    """The rows, all of which must be JSON objects.

    Args:
        rows: Any.
        keys: That they need, for the message; they are not looked for.

    Yields:
        The same rows.

    Raises:
        ValueError: One is something else.
    """
    for row in rows:
        if not isinstance(row.value, dict):
            needed = f"an object with {', '.join(map(repr, keys))}" if keys else "an object"
            raise ValueError(f"{row.place}: {type(row.value).__name__} {row.value!r:.40} stands where {needed} must")
        yield row


def hub_rows(name: str) -> Iterator[Row]:
    """The rows of a data set on the hub, or of any that `datasets.load_dataset` finds by name.

    Args:
        name: `hub:OWNER/NAME[:CONFIG][:SPLIT]`; one alone is a split if it begins with train, validation, dev or test.

    Yields:
        The rows.

    Raises:
        ValueError: No name, too many parts, or several splits and none named.
        ModuleNotFoundError: `datasets` is not installed.
    """
    data_set, *parts = re.split(r":(?![^\[]*\])", name.removeprefix(HUB))  # train[:100] stays whole
    if not data_set or not all(parts) or len(parts) > 2:
        raise ValueError(f"{name!r} is not of the form hub:OWNER/NAME[:CONFIG][:SPLIT]")
    config = parts.pop(0) if parts and not re.match("train|valid|dev|test", parts[0]) else None
    if len(parts) > 1:
        raise ValueError(f"{name!r} names two splits, {parts[0]} and {parts[1]}; the configuration goes first")
    try:
        load_dataset = import_module("datasets").load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs datasets; install it with: pip install 'offramp[hub]', or give a local file"
        ) from error
    rows = load_dataset(data_set, config, split=parts[0] if parts else None)
    if isinstance(rows, dict):
        if len(rows) > 1:
            raise ValueError(f"{name} has the splits {', '.join(rows)}; name one, as in {name}:{next(iter(rows))}")
        rows = next(iter(rows.values()))
    yield from (Row(f"{name}, row {n}", str(n), value) for n, value in enumerate(rows, 1))

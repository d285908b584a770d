"""Rows of files, also gzipped, and of data sets on the hub, whatever they are about: JSON, CSV, lines of text."""

from __future__ import annotations

import csv
import io
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from offramp.runs.bounded import LONGEST_LINE, content, decoded, parsed

HUB = "hub:"
T = TypeVar("T")


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
    """The text of a file in UTF-8, gzipped if it ends in `.gz`, with line feeds; a ValueError if empty or damaged."""
    text = decoded(content(path), path)
    if not text.strip():
        raise ValueError(f"{path} is empty; give a file with text")
    return text


def text_rows(path: Path) -> list[Row]:
    """The lines of a file, empty ones included."""
    return line_rows(read_text(path), path)


def line_rows(text: str, place: object) -> list[Row]:
    """The lines of a text that stands at a place, empty ones included; a ValueError above `LONGEST_LINE` characters."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    for n, line in enumerate(lines, 1):
        if len(line) > LONGEST_LINE:
            raise ValueError(
                f"{place}, line {n} has {len(line):,} characters; at most {LONGEST_LINE:,} are read, divide it"
            )
    return [Row(f"{place}, line {n}", str(n), line) for n, line in enumerate(lines, 1)]


def prompt_rows(path: Path) -> list[Row]:
    """The lines of a text file with one prompt on each; a ValueError for a table, whose lines are none."""
    if kind(path) in (".csv", ".tsv"):
        raise ValueError(f"{path} is a table, and prompts stand one on a line; give .txt, or .jsonl with prompt")
    return text_rows(path)


def csv_rows(path: Path) -> list[Row]:
    """The rows of a CSV file, header included, as lists of text, no empty lines; positions are their last lines."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    usual = csv.field_size_limit(LONGEST_LINE)
    try:
        return [Row(f"{path}, line {reader.line_num}", str(reader.line_num), value) for value in reader if value]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV ({error}); mend its quotes") from None
    finally:
        csv.field_size_limit(usual)


def require_columns(row: Row, columns: Sequence[object], what: str = "") -> None:
    """Raise a ValueError unless a header, a row whose value are names, has each of these columns, and once."""
    for column in columns:
        if (count := row.value.count(column)) == 1:
            continue
        have = ", ".join(map(repr, row.value))
        if count:
            raise ValueError(f"{row.place}, the header, names {column!r} {count} times; rename all but one of {have}")
        raise ValueError(
            f"{row.place} lacks the column {column!r}{f' of {what}' if what else ''}; as a header it names "
            f"{have:.400}: give the columns by these names, or by places where there is no header"
        )


def table_rows(path: Path, columns: Sequence[str], *, what: str) -> Iterator[Row]:
    """The rows of a CSV file with a header.

    Args:
        path: The file, UTF-8, also with `.gz`.
        columns: Those that must be there.
        what: What the file is, for messages, such as "the table of Waterbirds".

    Yields:
        Rows; each value is a dict from column to text, and each position the row's number, from 0 on.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Not CSV, a column is missing or there twice, or a row is shorter or longer than the header.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, {what}; nothing is downloaded, give the folder as published")
    header, *rows = csv_rows(path)
    require_columns(header, columns, what)
    for number, row in enumerate(rows):
        if len(row.value) != len(header.value):
            raise ValueError(
                f"{row.place} has {len(row.value)} columns, but the header has {len(header.value)}; mend the row"
            )
        yield Row(row.place, str(number), dict(zip(header.value, row.value, strict=True)))


def one_of(row: Row, column: str, allowed: Mapping[str, T]) -> T:
    """What one of the few values that a column may have stands for; a ValueError for any other."""
    value = row.value[column].strip()
    if value not in allowed:
        raise ValueError(f"{row.place} has {value!r} as {column}; allowed are {', '.join(allowed)}")
    return allowed[value]


def share(row: Row, column: str) -> float:
    """The number in [0, 1] in a column; a ValueError for anything else."""
    value = row.value[column].strip()
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ValueError(f"{row.place} has {value!r} as {column}; a number in [0, 1] is needed")
    return number


def require_texts(row: Row, *columns: Any) -> None:
    """Raise a ValueError that names the first of these columns, None aside, whose text is empty."""
    for column in columns:
        if column is not None and not row.value[column].strip():
            raise ValueError(f"{row.place} has an empty text in column {column!r}; fill it, or remove the row")


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
                yield row._replace(value=parsed(row.value, row.place))
        return
    values = parsed(read_text(path), str(path), hint="; JSON Lines need the ending .jsonl")
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
    if not isinstance(values, list):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}, but a list of objects is needed")
    yield from (Row(f"{path}, entry {n}", str(n), value) for n, value in enumerate(values, 1))


def written(value: object) -> str | None:
    """A JSON value as a file of text would have it: 1, 1.0 and "1" are "1"; None for all that is no text or number."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def by_size(names: Iterable[str]) -> list[str]:
    """Whole numbers by size if all are such, others by alphabet."""
    given = list(names)
    numbers = all(re.fullmatch(r"-?\d{1,18}", name) for name in given)
    return sorted(given, key=lambda name: (int(name) if numbers else 0, name))


def objects(rows: Iterable[Row], *keys: object) -> Iterator[Row]:
    """The same rows, all of which must be JSON objects; the keys that they need are for the message alone."""
    for row in rows:
        if not isinstance(row.value, dict):
            needed = f"an object with {', '.join(map(repr, keys))}" if keys else "an object"
            raise ValueError(
                f"{row.place}: {type(row.value).__name__} {reprlib.repr(row.value):.40} stands where {needed} must"
            )
        yield row


def as_texts(row: Row, columns: Iterable[Any], spelt: Callable[[Any, Any], Any] = lambda column, value: value) -> Row:
    """An object as {column: text}; a value that `spelt` makes no text or whole number of is a ValueError."""
    found = {column: written(spelt(column, row.value.get(str(column)))) for column in columns}
    if wrong := [column for column, text in found.items() if text is None]:
        have = f", but {reprlib.repr(row.value[str(wrong[0])])}" if str(wrong[0]) in row.value else ""
        raise ValueError(f"{row.place} has no text or whole number under {wrong[0]!r}{have}; it has {row.keys:.400}")
    return row._replace(value=found)


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

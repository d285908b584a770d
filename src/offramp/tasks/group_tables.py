"""Tables of CSV files, with the place of every row for messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from offramp.tasks.rows import Row, csv_rows, require_columns

T = TypeVar("T")


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


def choice(row: Row, column: str, allowed: Mapping[str, T]) -> T:
    """What one of a few values stands for.

    Args:
        row: Of a table.
        column: Which value.
        allowed: What there may be, and what it stands for.

    Returns:
        It.

    Raises:
        ValueError: Another value.
    """
    value = row.value[column].strip()
    if value not in allowed:
        raise ValueError(f"{row.place} has {value!r} as {column}; allowed are {', '.join(allowed)}")
    return allowed[value]


def share(row: Row, column: str) -> float:
    """A number in [0, 1].

    Args:
        row: Of a table.
        column: Which value.

    Returns:
        It.

    Raises:
        ValueError: Another value.
    """
    value = row.value[column].strip()
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ValueError(f"{row.place} has {value!r} as {column}; a number in [0, 1] is needed")
    return number

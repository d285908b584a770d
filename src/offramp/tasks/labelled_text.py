"""Labelled texts and pairs of texts from files: .tsv, .csv and .jsonl, each also with .gz."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offramp.tasks.labelled import Labelled
from offramp.tasks.rows import Row, json_rows, kind, objects, read_text, text_rows

Column = str | int
"""A name in the header (or key of an object), or a place counted from 0 in a file without header."""


@dataclass(frozen=True)
class TextLayout:
    """Where things stand in a file.

    Attributes:
        text: The text, or the first of a pair.
        label: As it is written there.
        pair: The second text; None: there is one only.
        classes: What labels mean, in the order of the classes: as written -> name, or names that are written as they
            are. None: the labels of the file, numbers by size, others by alphabet.
        unlabelled: Labels whose rows are left out, such as SNLI's "-"; a warning counts them.
        group: A number from 0 on, see `Labelled.groups`.
        cluster: Rows that have the same there are never divided between splits.
        id: Of the row; None: FILE/LINE, counted from 1 without the header.

    Raises:
        ValueError: Names and places are mixed.
    """

    text: Column = "text"
    label: Column = "label"
    pair: Column | None = None
    classes: Mapping[str, str] | Sequence[str] | None = None
    unlabelled: tuple[str, ...] = ()
    group: Column | None = None
    cluster: Column | None = None
    id: Column | None = None

    def __post_init__(self) -> None:
        if len({type(column) for column in self.columns}) > 1:
            raise ValueError(f"columns are {', '.join(map(repr, self.columns))}; give all by name or all by place")

    @property
    def columns(self) -> list[Column]:
        """All that are read."""
        given = (self.text, self.pair, self.label, self.group, self.cluster, self.id)
        return list(dict.fromkeys(column for column in given if column is not None))

    @property
    def header(self) -> bool:
        """Whether the first line names the columns."""
        return isinstance(self.text, str)


SST2 = TextLayout(text=0, label=1, classes={"0": "negative", "1": "positive"})
"""Sentence, tab, label; no header."""
SNLI = TextLayout(
    "premise", "label", "hypothesis", {"0": "entailment", "1": "neutral", "2": "contradiction"}, ("-1",),
    cluster="premise",
)  # fmt: skip
"""Header premise, hypothesis, label."""
SNLI_PUBLISHED = TextLayout(
    "sentence1", "gold_label", "sentence2", ("entailment", "neutral", "contradiction"), ("-",),
    cluster="sentence1", id="pairID",
)  # fmt: skip
"""The objects of snli_1.0_train.jsonl and its kin."""


def read_labelled_text(path: str | Path, layout: TextLayout) -> Labelled:
    """The rows of a file.

    Args:
        path: `.tsv` (split at tabs, no quotes), `.csv` (quotes as usual) or `.jsonl`, UTF-8, also with `.gz`.
        layout: Where things stand in it, such as `SST2`.

    Returns:
        Texts, or pairs of texts, with labels.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another format, no such column, too few columns, an empty text, an unknown label, not one row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a file with labelled texts, .tsv, .csv or .jsonl")
    rows, left_out = [], 0
    for row in _rows(path, layout):
        if row.value[layout.label] in layout.unlabelled:
            left_out += 1
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no labelled row; give a file with some")
    if left_out:
        warnings.warn(f"{path}: {left_out} rows without a label were left out", stacklevel=2)
    labels, classes = _labels(rows, layout, path)
    text, pair = layout.text, layout.pair
    return Labelled(
        ids=tuple(f"{path.name}/{row.position}" if layout.id is None else row.value[layout.id] for row in rows),
        inputs=tuple(row.value[text] if pair is None else (row.value[text], row.value[pair]) for row in rows),
        labels=torch.tensor(labels),
        classes=classes,
        groups=None if layout.group is None else torch.tensor([_number(row, layout.group) for row in rows]),
        clusters=() if layout.cluster is None else tuple(row.value[layout.cluster] for row in rows),
        source=str(path),
    )


def _labels(rows: Sequence[Row], layout: TextLayout, path: Path) -> tuple[list[int], tuple[str, ...]]:
    """The label of each row, and the names of the classes."""
    written = [row.value[layout.label] for row in rows]
    given = layout.classes
    if given is None:
        number = all(label.lstrip("-").isdecimal() for label in written)
        given = sorted(set(written), key=lambda label: (int(label) if number else 0, label))
        if len(given) < 2:
            raise ValueError(f"{path} has the label {given[0]!r} only; classes are needed that differ, or name them")
    names = given if isinstance(given, Mapping) else {name: name for name in given}
    places = {label: place for place, label in enumerate(names)}
    for row, label in zip(rows, written, strict=True):
        if label not in places:
            raise ValueError(f"{row.place} has the label {label!r}; allowed are {', '.join(map(repr, names))}")
    return [places[label] for label in written], tuple(names.values())


def _number(row: Row, column: Column) -> int:
    value = row.value[column]
    if not value.isdecimal():
        raise ValueError(f"{row.place} has the group {value!r}; a whole number from 0 on is needed")
    return int(value)


# ---------------------------------------------------------------- rows as {column: text}


def _rows(path: Path, layout: TextLayout) -> Iterator[Row]:
    """What stands in the layout's columns, as text."""
    readers = {".tsv": _tab_rows, ".csv": _csv_rows}
    if (ending := kind(path)) in readers:
        found = _named(readers[ending](path), layout, path)
    elif ending == ".jsonl":
        if not layout.header:
            raise ValueError(f"{path} has keys, no places; name its columns, such as text and label")
        found = (_object(row, layout) for row in objects(json_rows(path), *layout.columns))
    else:
        raise ValueError(f"{path} ends in {ending or 'nothing'}; give .tsv, .csv or .jsonl, also with .gz")
    for row in found:
        for column in (layout.text, layout.pair):
            if column is not None and not row.value[column].strip():
                raise ValueError(f"{row.place} has an empty text in column {column!r}; fill it, or remove the row")
        yield row


def _tab_rows(path: Path) -> Iterator[Row]:
    for row in text_rows(path):
        if row.value.strip("\r"):
            yield row._replace(value=row.value.rstrip("\r").split("\t"))


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for value in reader:
            if value:
                yield Row(f"{path}, line {reader.line_num}", str(reader.line_num), value)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV ({error}); mend its quotes") from None


def _named(rows: Iterator[Row], layout: TextLayout, path: Path) -> Iterator[Row]:
    """Lists of columns as {column: text}."""
    places: dict[Column, int] = {column: column for column in layout.columns if isinstance(column, int)}
    width: int | None = None
    for row in rows:
        if width is None:
            width = len(row.value)
            if layout.header:
                if missing := [column for column in layout.columns if column not in row.value]:
                    raise ValueError(
                        f"{row.place} is the header, {', '.join(map(repr, row.value))}; it has no {missing[0]!r}, name "
                        "the columns as they are"
                    )
                places = {column: row.value.index(column) for column in layout.columns}
                continue
        if len(row.value) != width or max(places.values()) >= width:
            need = max(width, max(places.values()) + 1)
            raise ValueError(f"{row.place} has {len(row.value)} columns where {need} are needed")
        position = str(int(row.position) - 1) if layout.header else row.position
        yield row._replace(position=position, value={column: row.value[place] for column, place in places.items()})
    if width is None:
        raise ValueError(f"{path} is empty; give a file with labelled texts")


def _object(row: Row, layout: TextLayout) -> Row:
    found: dict[Column, Any] = {}
    for column in layout.columns:
        value = row.value.get(str(column))
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise ValueError(f"{row.place} has no text or number under {column!r}; it has {row.keys}")
        found[column] = str(value)
    return row._replace(value=found)

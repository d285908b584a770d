"""Labelled texts and pairs of texts from files: .tsv, .csv and .jsonl, each also with .gz."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from offramp.tasks.labelled import Labelled
from offramp.tasks.rows import (
    Row,
    as_texts,
    by_size,
    csv_rows,
    json_rows,
    kind,
    objects,
    require_columns,
    require_texts,
    text_rows,
)  # fmt: skip

Column = str | int
"""A name in the header (or key of an object), or a place counted from 0 in a file without header."""
LABEL_NAMES = (
    "label", "labels", "gold_label", "class", "category", "target", "sentiment", "stars", "rating", "score", "y",
)  # fmt: skip
"""What columns of labels are called: such a label in the first line of a file without header says it has one."""
MOST_GROUPS = 1_000_000
"""Above any number of groups: what is counted by group takes memory for each."""


@dataclass(frozen=True)
class TextLayout:
    """Where things stand in a file.

    Attributes:
        text: The text, or the first of a pair.
        label: As it is written there.
        pair: The second text; None: there is one only.
        classes: What labels mean, in the order of the classes: as written -> name, or names that are written as they
            are. None: the labels of the file, numbers by size, others by alphabet. Blanks around a label are no part of
            it, and 1, 1.0 and "1" are one label.
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

    def spelt(self, column: Column, value: object) -> object:
        """What a value of JSON is in a table: true and false are labels, as JSON has them."""
        return str(value).lower() if isinstance(value, bool) and column == self.label else value


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

    What is not taken as it stands is said in one warning each: a header in a layout without one, labels with blanks
    around them or written as 1.0, quotes in `.tsv`, labels that differ in capitals only.

    Args:
        path: `.tsv` (split at tabs, no quotes), `.csv` (quotes as usual) or `.jsonl`, UTF-8, also with `.gz`.
        layout: Where things stand in it, such as `SST2`.

    Returns:
        Texts, or pairs of texts, with labels.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another format, no such column or two of that name, too few columns, an empty text or label, an
            unknown label, not one row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a file with labelled texts, .tsv, .csv or .jsonl")
    rows, left_out, changed = [], 0, Counter[str]()
    for row in _rows(path, layout):
        label = _label(row, layout)
        if label in layout.unlabelled:
            left_out += 1
        else:
            changed[f"{row.value[layout.label]!r} as {label!r}"] += label != row.value[layout.label]
            rows.append(row._replace(value={**row.value, layout.label: label}))
    if not rows:
        raise ValueError(f"{path} holds no labelled row; give a file with some")
    if left_out:
        warnings.warn(f"{path}: {left_out} rows without a label were left out", stacklevel=2)
    labels, classes = _labels(rows, layout, path)
    if total := changed.total():
        warnings.warn(f"{path}: {total} labels were read without blanks and .0, {_some(+changed)}", stacklevel=2)
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


def _label(row: Row, layout: TextLayout) -> str:
    """The label of a row, without blanks around it; a number without a fraction of zeros."""
    label: str = row.value[layout.label].strip()
    if not label or label.lower() == "nan":
        raise ValueError(
            f"{row.place} has {'an empty label' if not label else f'{label} as label, a missing number'} in column "
            f"{layout.label!r}; fill it, or remove the row"
        )
    if layout.classes is not None and label in layout.classes:
        return label
    return number.group(1) if (number := re.fullmatch(r"(-?\d+)\.0+", label)) else label


def _labels(rows: Sequence[Row], layout: TextLayout, path: Path) -> tuple[list[int], tuple[str, ...]]:
    """The label of each row, and the names of the classes."""
    labels = [row.value[layout.label] for row in rows]
    given = layout.classes
    if given is None:
        given = by_size(set(labels))
        if len(given) < 2:
            raise ValueError(f"{path} has the label {given[0]!r} only; classes are needed that differ, or name them")
        _suspect(given, len(rows), layout, path)
    names = given if isinstance(given, Mapping) else {name: name for name in given}
    places = {label: place for place, label in enumerate(names)}
    for row, label in zip(rows, labels, strict=True):
        if label not in places:
            raise ValueError(f"{row.place} has the label {label!r:.80}; allowed are {', '.join(map(repr, names))}")
    return [places[label] for label in labels], tuple(names.values())


def _suspect(classes: Sequence[str], rows: int, layout: TextLayout, path: Path) -> None:
    """Warn of classes that are hardly meant, and refuse those that cannot be."""
    truths = [label for label in classes if label.lower() in ("true", "false")]
    if truths and (numbers := [label for label in classes if _is_number(label)]):
        raise ValueError(f"{path} has both {truths[0]} and {numbers[0]} as labels; write all labels in one way")
    if len(classes) > max(20, rows / 2):
        warnings.warn(
            f"{path}: {rows} rows have {len(classes)} different labels; is {layout.label!r} the column of labels?",
            stacklevel=4,
        )
    folded = Counter(label.casefold() for label in classes)
    if alike := [label for label in classes if folded[label.casefold()] > 1]:
        warnings.warn(
            f"{path}: the labels {', '.join(map(repr, alike[:6]))} differ in capitals only and stay different classes",
            stacklevel=4,
        )


def _number(row: Row, column: Column) -> int:
    value = row.value[column].strip()
    if not re.fullmatch(r"\d{1,18}", value) or int(value) >= MOST_GROUPS:
        raise ValueError(
            f"{row.place} has the group {row.value[column]!r:.80}; a whole number from 0 to {MOST_GROUPS - 1:,} is "
            "needed"
        )
    return int(value)


def _some(counts: Counter[str]) -> str:
    """What was done how often, the most frequent first."""
    more = f", and {len(counts) - 3} others" if len(counts) > 3 else ""
    return ", ".join(f"{what} ({count})" for what, count in counts.most_common(3)) + more


# ---------------------------------------------------------------- rows as {column: text}


def _rows(path: Path, layout: TextLayout) -> Iterator[Row]:
    """What stands in the layout's columns, as text."""
    readers = {".tsv": _tab_rows, ".csv": csv_rows}
    if (ending := kind(path)) in readers:
        found = _named(readers[ending](path), layout, path)
    elif ending == ".jsonl":
        if not layout.header:
            raise ValueError(f"{path} has keys, no places; name its columns, such as text and label")
        found = (as_texts(row, layout.columns, layout.spelt) for row in objects(json_rows(path), *layout.columns))
    else:
        raise ValueError(f"{path} ends in {ending or 'nothing'}; give .tsv, .csv or .jsonl, also with .gz")
    for row in found:
        require_texts(row, layout.text, layout.pair)
        yield row


def _tab_rows(path: Path) -> list[Row]:
    rows = [row._replace(value=row.value.split("\t")) for row in text_rows(path) if row.value]
    if quoted := sum(_looks_quoted(field) for row in rows for field in row.value):
        warnings.warn(
            f'{path}: {quoted} fields look like quoted ones ("…""…"); in .tsv quotes are letters like others, so if '
            "they are not part of the texts, save the file as .csv",
            stacklevel=2,
        )
    return rows


def _looks_quoted(field: str) -> bool:
    """Whether a writer of CSV put a field in quotes: those inside are doubled, each of them."""
    inside = field[1:-1]
    return len(field) > 3 and field[0] == field[-1] == '"' and '""' in inside and '"' not in inside.replace('""', "")


def _named(rows: Iterable[Row], layout: TextLayout, path: Path) -> Iterator[Row]:
    """Lists of columns as {column: text}."""
    rows = list(rows)
    if not rows:
        raise ValueError(f"{path} is empty; give a file with labelled texts")
    places: dict[Column, int] = {column: column for column in layout.columns if isinstance(column, int)}
    width, header = len(rows[0].value), layout.header
    if header:
        require_columns(rows[0], layout.columns)
        places = {column: rows[0].value.index(column) for column in layout.columns}
    elif header := _is_header(rows, layout):
        warnings.warn(
            f"{rows[0].place} is taken for a header, {', '.join(map(repr, rows[0].value)):.200}, not for a row",
            stacklevel=2,
        )
    for row in rows[header:]:
        if len(row.value) != width or max(places.values()) >= width:
            need = max(width, max(places.values()) + 1)
            raise ValueError(f"{row.place} has {len(row.value)} columns where {need} are needed")
        position = str(int(row.position) - header)
        yield row._replace(position=position, value={column: row.value[place] for column, place in places.items()})


def _is_header(rows: Sequence[Row], layout: TextLayout) -> bool:
    """Whether the first line of a file that should have no header is one: the label is what columns are called.

    Returns:
        Whether the first label is in `LABEL_NAMES`, or a word where all other rows have numbers; classes that the
        layout names are labels and no header.
    """
    at = layout.label
    if not isinstance(at, int) or at >= len(rows[0].value):
        return False
    first, *others = (row.value[at].strip() for row in rows if at < len(row.value))
    if first in (layout.classes or ()):
        return False
    return first.lower() in LABEL_NAMES or bool(
        first and others and not _is_number(first) and all(map(_is_number, others))
    )


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"-?\d+(\.\d+)?", text))

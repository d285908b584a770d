"""Any set with groups from a CSV or JSON Lines file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from offramp.metrics.groups import UNKNOWN, Groups
from offramp.tasks.group_images import SquareImages, existing_images
from offramp.tasks.group_sets import SPLITS, Grouped, GroupedSet
from offramp.tasks.image_files import look_at, tell
from offramp.tasks.labelled import Labelled
from offramp.tasks.labelled_inputs import Inputs
from offramp.tasks.rows import Row, as_texts, by_size, json_rows, kind, objects, require_texts, table_rows

NOT_KNOWN = ("", "?", "-1", "null", "None")
"""What stands for an attribute that is not known."""


@dataclass(frozen=True)
class GroupLayout:
    """Where things stand in a file.

    Attributes:
        label: Column of the class.
        attributes: Columns of the attributes; may be empty, and blank in some rows or splits.
        text: Column of the text; None: the inputs are images.
        pair: Column of a second text; None: there is one only.
        filename: Column of image files, relative to the file; used if `text` is None.
        split: Column with train, val, test or 0, 1, 2.
        id: Column of the ids; None: line numbers.
        classes: As written, in the order of the classes; None: what there is, numbers by size, words by alphabet.
        overlapping: Attributes are yes or no (1 or 0), and a group is an attribute that holds x a class; else a group
            is a class x a value of the one attribute.
        size: Side of images in pixels.

    Raises:
        ValueError: Several attributes without `overlapping`.
    """

    label: str = "y"
    attributes: tuple[str, ...] = ("a",)
    text: str | None = None
    pair: str | None = None
    filename: str = "filename"
    split: str = "split"
    id: str | None = "id"
    classes: tuple[str, ...] | None = None
    overlapping: bool = False
    size: int = 224

    def __post_init__(self) -> None:
        if len(self.attributes) > 1 and not self.overlapping:
            raise ValueError(
                f"the attributes are {', '.join(self.attributes)}; give one, or say that groups overlap "
                "(overlapping=True), one for each attribute that holds"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """All that must be there."""
        inputs = (self.filename,) if self.text is None else (self.text, self.pair)
        return tuple(c for c in (self.id, *inputs, self.split, self.label, *self.attributes) if c is not None)

    def spelt(self, column: str, value: object) -> object:
        """What a value of JSON is in a table: an unknown attribute is blank, yes and no are 1 and 0."""
        if value is None and column in self.attributes:
            return ""
        return int(value) if isinstance(value, bool) else value


def load_grouped(path: str | Path, layout: GroupLayout | None = None) -> GroupedSet:
    """The set in a file: CSV with a header, or JSON Lines, each also with `.gz`.

    Args:
        path: The file, UTF-8.
        layout: Where things stand in it; None: id, filename, split, y, a.

    Returns:
        Texts, pairs of texts, or images [size, size, 3]. Splits whose attributes are all unknown have no groups.

    Raises:
        FileNotFoundError: The file or an image is missing.
        ValueError: Another format, an absent column, or a wrong row.
    """
    path, layout = Path(path), layout or GroupLayout()
    rows = _rows(path, layout)
    splits = {name: name for name in SPLITS} | {str(i): name for i, name in enumerate(SPLITS)}
    for row in rows:
        if row.value[layout.split] not in splits:
            raise ValueError(f"{row.place} has the split {row.value[layout.split]!r}; allowed are {', '.join(splits)}")
    classes = layout.classes or _values(row.value[layout.label] for row in rows)
    values = {
        name: ("0", "1") if layout.overlapping else _values(row.value[name] for row in rows)
        for name in layout.attributes
    }
    found = {}
    for split in SPLITS:
        inside = [row for row in rows if splits[row.value[layout.split]] == split]
        if inside:
            found[split] = _split(path, split, inside, layout, classes, values)
    return GroupedSet(path.name.split(".")[0], found, f"split of {path.name}")


# ---------------------------------------------------------------- rows


def _rows(path: Path, layout: GroupLayout) -> list[Row]:
    """Rows whose values are text, by column."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a .csv or .jsonl file with labels and groups")
    if kind(path) == ".csv":
        rows = list(
            table_rows(path, layout.columns, what="rows with groups, whose columns data.options of --config names")
        )
    elif kind(path) == ".jsonl":
        rows = [as_texts(row, layout.columns, layout.spelt) for row in objects(json_rows(path), *layout.columns)]
    else:
        raise ValueError(f"{path} ends in {kind(path) or 'nothing'}; give .csv or .jsonl, also with .gz")
    if not rows:
        raise ValueError(f"{path} holds no row; give a file with some")
    names = (layout.split, layout.label, *layout.attributes)
    if blanks := sum(row.value[name] != row.value[name].strip() for row in rows for name in names):
        warnings.warn(
            f"{path}: {blanks} labels, attributes or splits were read without blanks around them", stacklevel=3
        )
        rows = [row._replace(value={**row.value, **{name: row.value[name].strip() for name in names}}) for row in rows]
    for row in rows:
        require_texts(row, layout.text, layout.pair)
    return rows


def _values(values: Iterable[str]) -> tuple[str, ...]:
    """What there is, without what is not known: numbers by size, words by alphabet."""
    return tuple(by_size(set(values) - set(NOT_KNOWN)))


def _split(
    path: Path,
    split: str,
    rows: Sequence[Row],
    layout: GroupLayout,
    classes: tuple[str, ...],
    values: Mapping[str, tuple[str, ...]],
) -> Grouped:
    labels = torch.tensor([_place(row, layout.label, classes) for row in rows])
    attributes = {
        name: torch.tensor([_place(row, name, values[name], unknown=True) for row in rows])
        for name in layout.attributes
    }
    ids = tuple(row.place.rpartition(", ")[2] if layout.id is None else row.value[layout.id] for row in rows)
    labelled = Labelled(ids, _inputs(path, rows, layout), labels, classes, source=f"{path.name}, {split}")
    groups = None
    if any(bool((a != UNKNOWN).any()) for a in attributes.values()):
        if layout.overlapping:
            groups = Groups.mentioned(labels, classes, attributes)
        else:
            ((name, attribute),) = attributes.items()
            groups = Groups.crossed(labels, classes, attribute, [f"{name} {value}" for value in values[name]])
    return Grouped.of(labelled, attributes, groups)


def _inputs(path: Path, rows: Sequence[Row], layout: GroupLayout) -> Inputs:
    text, pair = layout.text, layout.pair
    if text is None:
        files = existing_images(rows, [path.parent / row.value[layout.filename] for row in rows])
        tell(path, look_at(files), len(files))
        return SquareImages(files, layout.size)
    if pair is None:
        return tuple(row.value[text] for row in rows)
    return tuple((row.value[text], row.value[pair]) for row in rows)


def _place(row: Row, column: str, names: tuple[str, ...], *, unknown: bool = False) -> int:
    value = row.value[column]
    if unknown and value in NOT_KNOWN:
        return UNKNOWN
    if value not in names:
        raise ValueError(f"{row.place} has {value!r} as {column}; allowed are {', '.join(names)}")
    return names.index(value)

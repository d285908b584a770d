"""Sets with groups from local files: Waterbirds and CelebA as they are published, and any other from a table."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.metrics.groups import UNKNOWN, Groups
from offramp.tasks.group_sets import SPLITS, Grouped, GroupedSet
from offramp.tasks.image_files import look_at, read_image, tell
from offramp.tasks.labelled import Inputs, Labelled
from offramp.tasks.rows import Row, as_texts, by_size, json_rows, kind, objects, one_of, require_texts, table_rows

WATERBIRDS = "waterbird_complete95_forest2water2"
BIRDS, LANDS = ("landbird", "waterbird"), ("land", "water")
HAIR, GENDERS = ("not blond", "blond"), ("female", "male")
CELEBA_CROP = 178
"""Pixels: the width of its images."""

_BINARY = {"0": 0, "1": 1}
_SPLIT = {str(number): name for number, name in enumerate(SPLITS)}
NOT_KNOWN = ("", "?", "-1", "null", "None")
"""What stands for an attribute that is not known."""


@dataclass(frozen=True)
class SquareImages:
    """Images that are read, with Pillow, when they are asked for.

    Sagawa et al. (2020), group_DRO: without `crop` (Waterbirds) an image is squeezed to a square of 256/224 of the
    size and its middle cut out; with it (CelebA) the middle is cut out first and then resized. Bilinear, antialiased.

    Attributes:
        paths: N files.
        size: Side of the result in pixels.
        crop: Side of the square that is cut out of the middle first; None: as for Waterbirds.
    """

    paths: tuple[Path, ...]
    size: int = 224
    crop: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.stack([self._read(self.paths[row]) for row in rows.tolist()])

    def _read(self, path: Path) -> NDArray[np.uint8]:
        pixels = read_image(path)
        if self.crop is not None:
            return _resized(_middle(pixels, self.crop), self.size)
        return _middle(_resized(pixels, self.size * 256 // 224), self.size)


def existing_images(rows: Sequence[Row], paths: Sequence[Path]) -> tuple[Path, ...]:
    """The files that rows name; a FileNotFoundError for the first that is missing."""
    for row, path in zip(rows, paths, strict=True):
        if not path.is_file():
            raise FileNotFoundError(f"{row.place} names {path}, which is missing; unpack the images beside the table")
    return tuple(paths)


def _resized(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))


def _middle(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The square in the middle, smaller than asked for if the image is."""
    top, left = ((length - side) // 2 if length > side else 0 for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


# ---------------------------------------------------------------- published sets


def load_waterbirds(folder: str | Path, *, size: int = 224) -> GroupedSet:
    """Waterbirds (Sagawa et al., 2020), as published with group_DRO or by WILDS; group 2y + place.

    Published counts in training: 3498 landbirds on land, 184 on water, 56 waterbirds on land, 1057 on water.

    Args:
        folder: `waterbird_complete95_forest2water2`, or the folder that holds it: metadata.csv with img_id,
            img_filename, y, split, place, and the images.
        size: Side of the images in pixels.

    Returns:
        Images [size, size, 3], with the attribute "place"; the published split.

    Raises:
        FileNotFoundError: metadata.csv or an image is missing.
        ValueError: A column is missing or a row is wrong.
    """
    folder = Path(folder)
    if (folder / WATERBIRDS).is_dir():
        folder = folder / WATERBIRDS
    columns = ("img_id", "img_filename", "y", "split", "place")
    rows = list(table_rows(folder / "metadata.csv", columns, what="the table of Waterbirds"))
    paths = existing_images(rows, [folder / row.value["img_filename"] for row in rows])
    found = (
        (one_of(row, "split", _SPLIT), row.value["img_id"], one_of(row, "y", _BINARY), one_of(row, "place", _BINARY))
        for row in rows
    )  # fmt: skip
    return _images("waterbirds", found, SquareImages(paths, size), BIRDS, "place", LANDS)


def load_celeba(
    folder: str | Path, *, size: int = 224, target: str = "Blond_Hair", spurious: str = "Male"
) -> GroupedSet:
    """CelebA (Liu et al., 2015), hair colour and gender as in group_DRO; group 2y + a.

    Published counts in training: 71,629 / 66,874 / 22,880 / 1,387 for dark female, dark male, blond female, blond male.

    Args:
        folder: Holds list_attr_celeba.csv, list_eval_partition.csv and img_align_celeba/, itself or in `data/`.
        size: Side of the images in pixels; a square of 178 is cut out first.
        target: Name of the attribute that is the label.
        spurious: Name of the attribute of the groups.

    Returns:
        Images [size, size, 3]; the published split.

    Raises:
        FileNotFoundError: A table or an image is missing.
        ValueError: A column is missing, a row is wrong, or the tables name different images.
    """
    folder = Path(folder)
    attributes, partition = "list_attr_celeba.csv", "list_eval_partition.csv"
    if not (folder / attributes).exists() and (folder / "data" / attributes).exists():
        folder = folder / "data"
    rows = list(table_rows(folder / attributes, ("image_id", target, spurious), what="CelebA's table of attributes"))
    parts = list(table_rows(folder / partition, ("image_id", "partition"), what="CelebA's table of splits"))
    for row, part in zip(rows, parts, strict=False):
        if row.value["image_id"] != part.value["image_id"]:
            raise ValueError(
                f"{part.place} is about {part.value['image_id']!r}, but {row.place} about {row.value['image_id']!r}; "
                "give both tables as published"
            )
    if len(rows) != len(parts):
        raise ValueError(f"{folder / partition} has {len(parts)} rows, {folder / attributes} {len(rows)}; fetch again")
    sign = {"-1": 0, "1": 1}
    images = folder / "img_align_celeba"
    if (images / "img_align_celeba").is_dir():  # as some archives unpack
        images = images / "img_align_celeba"
    hair, genders = HAIR, GENDERS
    if (target, spurious) != ("Blond_Hair", "Male"):
        hair, genders = ((f"not {name}", name) for name in (target, spurious))
    paths = existing_images(rows, [images / row.value["image_id"] for row in rows])
    found = (
        (
            one_of(part, "partition", _SPLIT), row.value["image_id"], one_of(row, target, sign),
            one_of(row, spurious, sign),
        )
        for row, part in zip(rows, parts, strict=True)
    )  # fmt: skip
    return _images("celeba", found, SquareImages(paths, size, CELEBA_CROP), hair, spurious, genders)


def _images(
    name: str, rows: Iterable[tuple[str, str, int, int]], images: SquareImages, classes: Sequence[str], attribute: str,
    values: Sequence[str],
) -> GroupedSet:  # fmt: skip
    """The set, of the splits that have rows: split, id, label and value of the attribute of each image."""
    found: dict[str, list[tuple[int, str, int, int]]] = {}
    for place, (split, id, label, value) in enumerate(rows):
        found.setdefault(split, []).append((place, id, label, value))
    made = {}
    for split in (split for split in SPLITS if split in found):
        places, ids, y, a = zip(*found[split], strict=True)
        some = replace(images, paths=tuple(images.paths[place] for place in places))
        labelled = Labelled(ids, some, torch.tensor(y), tuple(classes), source=f"{name}, {split}")
        made[split] = Grouped.crossed(labelled, attribute, torch.tensor(a), values)
    return GroupedSet(name, made, "published split")


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

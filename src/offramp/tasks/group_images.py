"""Waterbirds and CelebA from local folders in the layout they are published in, brought to one size. No downloads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.tasks.group_sets import SPLITS, Grouped, GroupedSet
from offramp.tasks.image_files import read_image
from offramp.tasks.labelled import Labelled
from offramp.tasks.rows import Row, one_of, table_rows

WATERBIRDS = "waterbird_complete95_forest2water2"
BIRDS, LANDS = ("landbird", "waterbird"), ("land", "water")
HAIR, GENDERS = ("not blond", "blond"), ("female", "male")
CELEBA_CROP = 178
"""Pixels: the width of its images."""

_BINARY = {"0": 0, "1": 1}
_SPLIT = {str(number): name for number, name in enumerate(SPLITS)}


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

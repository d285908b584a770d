"""Waterbirds and CelebA from local folders in the layout they are published in. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from offramp.metrics.group_members import Groups
from offramp.tasks.group_images import SquareImages, existing_images
from offramp.tasks.group_sets import SPLITS, Grouped, GroupedSet
from offramp.tasks.group_tables import choice, table_rows
from offramp.tasks.labelled import Labelled
from offramp.tasks.rows import Row

WATERBIRDS = "waterbird_complete95_forest2water2"
BIRDS, LANDS = ("landbird", "waterbird"), ("land", "water")
HAIR, GENDERS = ("not blond", "blond"), ("female", "male")
CELEBA_CROP = 178
"""Pixels: the width of its images."""

_BINARY = {"0": 0, "1": 1}
_SPLIT = {str(number): name for number, name in enumerate(SPLITS)}


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
    return _images(
        "waterbirds",
        rows,
        [row.value["img_id"] for row in rows],
        existing_images(rows, [folder / row.value["img_filename"] for row in rows]),
        [choice(row, "split", _SPLIT) for row in rows],
        [choice(row, "y", _BINARY) for row in rows],
        [choice(row, "place", _BINARY) for row in rows],
        (BIRDS, "place", LANDS), size, None,
    )  # fmt: skip


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
    named = (HAIR, GENDERS) if (target, spurious) == ("Blond_Hair", "Male") else _named(target, spurious)
    return _images(
        "celeba",
        rows,
        [row.value["image_id"] for row in rows],
        existing_images(rows, [images / row.value["image_id"] for row in rows]),
        [choice(part, "partition", _SPLIT) for part in parts],
        [choice(row, target, sign) for row in rows],
        [choice(row, spurious, sign) for row in rows],
        (named[0], spurious, named[1]), size, CELEBA_CROP,
    )  # fmt: skip


def _named(*attributes: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"not {name}", name) for name in attributes)


def _images(
    name: str,
    rows: Sequence[Row],
    ids: Sequence[str],
    paths: tuple[Path, ...],
    splits: Sequence[str],
    labels: Sequence[int],
    values: Sequence[int],
    names: tuple[tuple[str, ...], str, tuple[str, ...]],
    size: int,
    crop: int | None,
) -> GroupedSet:
    """The set, of the splits that have rows."""
    classes, attribute, named = names
    found = {}
    for split in SPLITS:
        at = [i for i in range(len(rows)) if splits[i] == split]
        if not at:
            continue
        y, a = torch.tensor([labels[i] for i in at]), torch.tensor([values[i] for i in at])
        images = SquareImages(tuple(paths[i] for i in at), size, crop)
        labelled = Labelled(tuple(ids[i] for i in at), images, y, classes, source=f"{name}, {split}")
        found[split] = Grouped.of(labelled, {attribute: a}, Groups.crossed(y, classes, a, named))
    return GroupedSet(name, found, "published split")

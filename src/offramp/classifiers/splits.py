"""Labelled data as a user has it: read from files, divided by a seed, and the same again for every later step.

What thresholds and guarantees are fitted on must be no row the network or its temperatures have seen. So the division
is a function of the files and of a seed, its record travels with the model, and later steps read the files again,
divide them again, and refuse rows that are not those of the record.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from offramp.tasks.image_files import read_image_folder
from offramp.tasks.images import read_cifar10, read_cifar100, read_idx
from offramp.tasks.labelled import SHARES, Labelled, split, without
from offramp.tasks.labelled_text import SNLI, SNLI_PUBLISHED, SST2, Column, TextLayout, read_labelled_text
from offramp.values import choice

IMAGES, TEXTS = "image-classification", "text-classification"
TASKS = (IMAGES, TEXTS)
TaskName = Literal["image-classification", "text-classification"]
IMAGE_LAYOUTS = ("idx", "cifar10", "cifar100", "folder")
TEXT_LAYOUTS = {"sst2": SST2, "snli": SNLI, "snli-published": SNLI_PUBLISHED}
COLUMNS = "columns"
"""Layout of texts whose columns are named by the user."""
SCHEMA = "offramp/divided-data/1"


@dataclass(frozen=True)
class DataConfig:
    """How data is read and divided.

    Attributes:
        task: One of `TASKS`.
        layout: For images one of `IMAGE_LAYOUTS`, None: by the names of the files; for texts one of `TEXT_LAYOUTS` or
            "columns", None: that.
        text: Column of the text with "columns": a name in the header, or a place counted from 0 without header.
        label: Column of the label.
        pair: Column of the second text; None: there is one only.
        cluster: Column of what must not be divided between splits, such as a premise; None: nothing.
        classes: Names of the classes in their order: as labels are written ("columns", "folder"), or for numbered ones
            ("idx"). Empty: as the files have them.
        count: Rows that are used, drawn at random; a published test split stays whole. None: all.
        seed: Seed of that draw and of the division into splits.
        image_size: Side that images of a "folder" are brought to; None: they are all of one size.
        longest: Most tokens of a text; None: what its model takes.
    """

    task: str
    layout: str | None = None
    text: Column = "text"
    label: Column = "label"
    pair: Column | None = None
    cluster: Column | None = None
    classes: tuple[str, ...] = ()
    count: int | None = None
    seed: int = 0
    image_size: int | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))  # a list, if it comes from JSON
        choice("task", self.task, TASKS)
        allowed = IMAGE_LAYOUTS if self.task == IMAGES else (*TEXT_LAYOUTS, COLUMNS)
        choice(f"layout for {self.task}", self.layout, (None, *allowed))
        for name in ("count", "image_size", "longest"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it counts from 0")
        if self.classes and len(self.classes) < 2:
            raise ValueError(f"the only class named is {self.classes[0]!r}; name two or more")

    @property
    def pairs(self) -> bool:
        """Whether rows are pairs of texts."""
        return self.task == TEXTS and _text_layout(self).pair is not None


# ---------------------------------------------------------------- reading

NAMED = {
    "fashion-mnist": ("OFFRAMP_FASHION_MNIST", "on Debian and Ubuntu: sudo apt install dataset-fashion-mnist"),
    "mnist": ("OFFRAMP_MNIST", "fetch them where the set is published"),
}
"""Sets that a name alone stands for: the variable that says where theirs is, and how to come by it."""
INSTALLED = Path("/usr/share/datasets")
"""Where Debian's packages dataset-NAME put them."""


def located(data: Path) -> Path:
    """Where data is: the path, or if there is nothing the set of that name in `NAMED`; a FileNotFoundError says how."""
    if data.exists() or str(data) not in NAMED:
        return data
    variable, advice = NAMED[str(data)]
    places = [Path(given).expanduser()] if (given := os.environ.get(variable)) else []
    for place in (*places, INSTALLED / data):
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"there is no {data} here, in ${variable} or in {INSTALLED / data}; give a folder with its four IDX files "
        f"({advice})"
    )


def divide(config: DataConfig, data: Path, test: Path | None = None) -> dict[str, Labelled]:
    """Read and divide.

    Rows of `data` that its own published test split has too, as some published sets of images do, are left out with a
    warning. A test split of its own file must not have any: then the files are not what they seem.

    Args:
        config: How.
        data: A folder of images, or a file of texts; or the name of a set, see `located`.
        test: Such with the published test split; None: that of `data` if it has one, else a share of it.

    Returns:
        The splits of `offramp.tasks.labelled.SHARES` by name.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or of another layout, there are too few rows, or the test split shares rows.
    """
    data = located(data)
    found = _read(config, data)
    published = found.get("test")
    if test is not None:
        if published is not None:
            raise ValueError(f"{data} has a test split of its own; leave out {test}")
        published = _read(config, test)["train"]
        if published.classes != found["train"].classes:
            raise ValueError(
                f"{test} has the classes {', '.join(published.classes)} and {data} {', '.join(found['train'].classes)};"
                " name all of them in the same order"
            )
    rows = found["train"]
    if "test" in found:
        rows = without(rows, found["test"])
        if left_out := len(found["train"]) - len(rows):
            warnings.warn(f"{data}: {left_out} rows that its test split has too were left out", stacklevel=2)
    if config.count is not None and config.count < len(rows):
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))[: config.count]
        rows = rows.take(drawn.sort().values)
    return split(rows, SHARES, config.seed, test=published)


def _read(config: DataConfig, data: Path) -> dict[str, Labelled]:
    """Training rows, and a published test split where the layout has one."""
    if config.task == TEXTS:
        return {"train": read_labelled_text(data, _text_layout(config))}
    layout = layout_of(config.task, config.layout, data)
    if layout == "folder":
        return {"train": read_image_folder(data, size=config.image_size, classes=config.classes or None)}
    if layout == "idx":
        return read_idx(data, config.classes or None)
    return read_cifar10(data) if layout == "cifar10" else read_cifar100(data)


def _text_layout(config: DataConfig) -> TextLayout:
    if config.layout not in (None, COLUMNS):
        return TEXT_LAYOUTS[config.layout]
    return TextLayout(config.text, config.label, config.pair, config.classes or None, cluster=config.cluster)


def layout_of(task: str, layout: str | None, data: Path) -> str:
    """The layout that is named, else that which data has: "columns" of texts, of images by the names of the files."""
    if layout is not None or task == TEXTS:
        return layout or COLUMNS
    signs = {"idx": "*idx3-ubyte*", "cifar10": "data_batch_1.bin", "cifar100": "train.bin"}
    folder = located(data)
    return next((name for name, sign in signs.items() if any(folder.glob(sign))), "folder")


# ---------------------------------------------------------------- the record


def record(config: DataConfig, splits: Mapping[str, Labelled]) -> dict[str, Any]:
    """What later steps need to make the same division, and to see that it is the same; JSON values."""
    return {
        "schema": SCHEMA,
        **asdict(config),
        "classes": list(config.classes),
        "splits": {name: {"rows": len(rows), "digest": rows.digest()} for name, rows in splits.items()},
    }


def config_of(saved: Mapping[str, Any]) -> DataConfig:
    """How data was read and divided, from its record."""
    return DataConfig(**{name: value for name, value in saved.items() if name not in ("schema", "splits")})


def read_again(
    saved: Mapping[str, Any], task: str | None, data: Path, test: Path | None = None
) -> tuple[DataConfig, dict[str, Labelled]]:
    """The division a model was trained with.

    Args:
        saved: Its record, `EarlyExitClassifier.trained_on`.
        task: What the user thinks it is made for; None: nobody said.
        data: What it was trained on.
        test: The published test split it was given, if any.

    Returns:
        How data is read, and the splits by name.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: There is no record, the model is for another task, or this is other data.
    """
    if saved.get("schema") != SCHEMA:
        raise ValueError(
            "the model does not say what it was trained on, so rows it has seen cannot be kept apart; train it with "
            "offramp train"
        )
    config = config_of(saved)
    if task not in (None, config.task):
        raise ValueError(f"the model was trained for {config.task}, not for {task}; give that as task")
    splits = divide(config, data, test)
    for name, rows in splits.items():
        have = saved["splits"][name]
        if (len(rows), rows.digest()) != (have["rows"], have["digest"]):
            what = f"{len(rows)} rows for {have['rows']}" if len(rows) != have["rows"] else "other rows (or file names)"
            source = test if name == "test" and test is not None else data
            raise ValueError(
                f"{source} is not what the model was trained and divided with: its {name} split has {what}; give the "
                "same files, or train again"
            )
    return config, splits

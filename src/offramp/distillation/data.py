"""Sets with groups by a short description: published layouts in local folders, and stand-ins that are generated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.metrics.group_effects import minority_rows
from offramp.tasks.group_sets import Grouped, GroupedSet
from offramp.tasks.labelled import Labelled, split
from offramp.values import choice

STAND_IN = "stand-in:"
STAND_INS = (
    "digits-on-colour", "mnist-on-colour", "spuco-mnist", "coloured-mnist", "template-nli", "template-toxicity",
)  # fmt: skip
TASKS = ("waterbirds", "celeba", "multinli", "snli", "civilcomments", "groups")


@dataclass(frozen=True)
class DataConfig:
    """Which set.

    Attributes:
        path: A local folder or file; or "stand-in:NAME", "stand-in:NAME:PATH" for those made of MNIST's files.
        task: One of `TASKS`; None for stand-ins.
        options: Options of the loader or the generator, such as {"agreement": 0.95}.
        tune: Share of the validation rows that weights may be tuned on, and no epoch is selected by.
    """

    path: str
    task: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    tune: float = 0.25

    @property
    def name(self) -> str:
        """What it is called: a stand-in's name, or that of the file or folder without endings."""
        if self.path.startswith(STAND_IN):
            return self.path.removeprefix(STAND_IN).partition(":")[0]
        return Path(self.path).expanduser().resolve().name.partition(".")[0]

    def __post_init__(self) -> None:
        if self.path.startswith(STAND_IN):
            choice("the stand-in", self.name, STAND_INS)
        elif self.task not in TASKS:
            raise ValueError(f"the task is {self.task!r}; choose one of {', '.join(TASKS)}, or data stand-in:NAME")
        if not 0 < self.tune < 1:
            raise ValueError(f"tune is {self.tune}; it is a share of the validation rows, such as 0.25")


def load_set(config: DataConfig, seed: int) -> GroupedSet:
    """The set; a stand-in is drawn anew for every seed, published splits stay.

    Args:
        config: Which.
        seed: Seed of what is drawn.

    Returns:
        The set, with the splits train, val and test; groups are known of test rows, maybe of no others.

    Raises:
        ValueError: Options that there are not, a split or groups of test rows missing.
        FileNotFoundError: There are no such files.
    """
    made = _loaded(config.path, config.task, json.dumps(dict(config.options), sort_keys=True), seed)
    if missing := [name for name in ("train", "val") if name not in made.splits]:
        raise ValueError(f"{made.name} has no split {missing[0]!r}; it has {', '.join(made.splits)}")
    made.require_groups("test")
    return made


def forget_sets() -> None:
    """Drop the sets that are kept in memory for the next run: files are read again, which may have changed."""
    _loaded.cache_clear()
    _digits.cache_clear()


@lru_cache(maxsize=2)  # several runs in one process share it
def _loaded(path: str, task: str | None, options: str, seed: int) -> GroupedSet:
    given: dict[str, Any] = json.loads(options)
    try:
        if path.startswith(STAND_IN):
            name, _, place = path.removeprefix(STAND_IN).partition(":")
            return _stand_in(name, place, seed, given)
        return _published(task or "", path, seed, given)
    except TypeError as error:
        raise ValueError(f"{path}: {error}; look at the options of the data") from error


def _stand_in(name: str, place: str, seed: int, options: dict[str, Any]) -> GroupedSet:
    from offramp.tasks import stand_in_texts, stand_ins

    makers: dict[str, Callable[..., GroupedSet]] = {
        "digits-on-colour": stand_ins.digits_on_colour, "template-nli": stand_in_texts.template_nli,
        "template-toxicity": stand_in_texts.template_toxicity, "mnist-on-colour": stand_ins.mnist_on_colour,
        "spuco-mnist": stand_ins.spuco_mnist, "coloured-mnist": stand_ins.coloured_mnist,
    }  # fmt: skip
    if "mnist" not in name:
        return makers[name](seed=seed, **options)
    if not place:
        raise ValueError(f"{name} is made of MNIST's or Fashion-MNIST's files; give stand-in:{name}:FOLDER")
    return makers[name](*_digits(place), seed=seed, **options)


@lru_cache(maxsize=1)
def _digits(folder: str) -> tuple[Any, Any]:
    """All images [M, 28, 28] and digits [M] of MNIST's files."""
    from offramp.tasks.images import read_idx

    parts = list(read_idx(folder).values())
    images = np.concatenate([np.asarray(part.inputs)[..., 0] for part in parts])
    return images, np.concatenate([part.labels.numpy() for part in parts])


def _published(task: str, path: str, seed: int, options: dict[str, Any]) -> GroupedSet:
    from offramp.tasks.group_files import GroupLayout, load_celeba, load_grouped, load_waterbirds
    from offramp.tasks.group_texts import load_civilcomments, load_multinli, load_snli

    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"{path} is missing; nothing is downloaded, name a local folder or file")
    if task == "groups":
        return load_grouped(place, GroupLayout(**options) if options else None)
    if task in ("multinli", "snli"):
        return (load_multinli if task == "multinli" else load_snli)(place, seed=seed, **options)
    loaders: dict[str, Callable[..., GroupedSet]] = {
        "waterbirds": load_waterbirds, "celeba": load_celeba, "civilcomments": load_civilcomments
    }  # fmt: skip
    return loaders[task](place, **options)


def split_validation(val: Grouped, share: float, seed: int) -> tuple[Grouped, Grouped]:
    """Validation rows to select by, and this share to tune weights on; two renderings of a thing stay together."""
    clusters = val.rows.clusters or (tuple(map(str, val.pairs.tolist())) if val.pairs is not None else ())
    rows = Labelled(val.rows.ids, val.rows.inputs, val.rows.labels, val.rows.classes, val.rows.groups, clusters)
    place = {id: at for at, id in enumerate(rows.ids)}
    parts = split(rows, {"select": 1 - share, "tune": share}, seed)
    chosen = [val.take([place[id] for id in parts[name].ids]) for name in ("select", "tune")]
    return chosen[0], chosen[1]


def minority_of(grouped: Grouped) -> Tensor | None:
    """Rows for which the shortcut fails, [N], bool; None where attributes are unknown, or several make groups."""
    name = "identity_any" if "identity_any" in grouped.attributes else next(iter(grouped.attributes), None)
    if name is None or (
        len(grouped.attributes) > 1 and name != "identity_any" and "conflict" not in grouped.attributes
    ):
        return None
    if "conflict" in grouped.attributes:
        return grouped.attributes["conflict"] == 1
    values = grouped.attributes[name]
    return None if bool((values < 0).all()) else minority_rows(grouped.rows.labels, values)


def group_counts(grouped: Grouped) -> Tensor:
    """Rows of each group [G], for methods that train by them; a ValueError unless each row is in one of them."""
    if grouped.groups is None or grouped.rows.groups is None:
        raise ValueError(
            f"{grouped.rows.source or 'the training split'} has no groups, or rows in several or none; this method "
            "trains by groups and needs each row in one"
        )
    grouped.groups.require_rows("train")
    return torch.bincount(grouped.rows.groups, minlength=len(grouped.groups.names))

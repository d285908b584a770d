"""Sets of labelled rows with groups: what every loader and every stand-in gives.

An attribute is what a model might use instead of what it should, such as the background of a bird. A group is a class
with a value of an attribute. Both may be unknown, and groups may overlap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from offramp.metrics.groups import UNKNOWN, Groups
from offramp.tasks.labelled import Labelled, require_apart

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Grouped:
    """N labelled rows of one split, and who is in which group.

    Attributes:
        rows: Inputs, labels and ids; their `groups` are numbers where every row is in exactly one group, else None.
        attributes: By name, each [N], int64; -1: unknown.
        groups: Members of each group; None: unknown for all rows.
        pairs: Rows of the same number show the same thing with different attributes, [N], int64; None: there are none.

    Raises:
        ValueError: Numbers of rows that differ.
    """

    rows: Labelled
    attributes: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    groups: Groups | None = field(default=None, repr=False)
    pairs: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        lengths = {f"values of {name!r}": len(values) for name, values in self.attributes.items()}
        if self.groups is not None:
            lengths["rows of groups"] = self.groups.rows
        if self.pairs is not None:
            lengths["numbers of pairs"] = len(self.pairs)
        for what, length in lengths.items():
            if length != len(self.rows):
                raise ValueError(f"{self.rows.source} has {len(self.rows)} rows but {length} {what}; give one per row")

    @classmethod
    def of(
        cls, rows: Labelled, attributes: Mapping[str, Tensor], groups: Groups | None, pairs: Tensor | None = None
    ) -> Grouped:
        """Rows with their groups, also as numbers in `rows` where every row is in exactly one."""
        if groups is not None and bool((groups.members.sum(dim=1) == 1).all()):
            rows = replace(rows, groups=groups.numbers())
        return cls(rows, attributes, groups, pairs)

    @classmethod
    def crossed(
        cls, rows: Labelled, name: str, values: Tensor, words: Sequence[str], pairs: Tensor | None = None
    ) -> Grouped:
        """Rows with one attribute, values [N]: a group is a class with one of its values, called by these words."""
        return cls.of(rows, {name: values}, Groups.crossed(rows.labels, rows.classes, values, words), pairs)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Tensor | Sequence[int]) -> Grouped:
        """The rows at these places, in this order."""
        chosen = torch.as_tensor(places, dtype=torch.long)
        return Grouped(
            self.rows.take(chosen), {name: values[chosen] for name, values in self.attributes.items()},
            None if self.groups is None else self.groups.take(chosen),
            None if self.pairs is None else self.pairs[chosen],
        )  # fmt: skip

    def digest(self) -> str:
        """SHA-256 of the rows, see `Labelled.digest`, and of classes, attributes, groups and pairs."""
        found = hashlib.sha256("\n".join([self.rows.digest(), *self.rows.classes]).encode())
        known = {f"attribute {name}": values for name, values in self.attributes.items()}
        if self.groups is not None:
            known[f"groups {self.groups.names}"] = self.groups.members
        if self.pairs is not None:
            known["pairs"] = self.pairs
        for name, values in sorted(known.items()):
            found.update(name.encode())
            found.update(values.contiguous().numpy().tobytes())
        return found.hexdigest()

    def without_groups(self) -> Grouped:
        """The same rows with every attribute and group unknown, for a method that must not see them."""
        unknown = {name: torch.full_like(values, UNKNOWN) for name, values in self.attributes.items()}
        return Grouped(replace(self.rows, groups=None), unknown, None, self.pairs)


@dataclass(frozen=True)
class GroupedSet:
    """Rows for training, validation and testing, with the same classes and the same groups.

    Attributes:
        name: Of the set, such as "waterbirds".
        splits: "train", "val" and "test", or those that there are.
        source: Where the splits come from, for reports: "published split", "own split, seed 0", …

    Raises:
        ValueError: Splits share a row, or differ in classes or groups.
    """

    name: str
    splits: Mapping[str, Grouped]
    source: str

    def __post_init__(self) -> None:
        require_apart(**{name: split.rows for name, split in self.splits.items()})
        for what, found in (
            ("classes", {name: split.rows.classes for name, split in self.splits.items()}),
            ("groups", {name: split.groups.names for name, split in self.splits.items() if split.groups is not None}),
        ):
            for name, names in found.items():
                first = next(iter(found))
                if names != found[first]:
                    raise ValueError(f"{self.name}: the {what} of {name} are {names}, those of {first} {found[first]}")

    @property
    def train(self) -> Grouped:
        """The training rows."""
        return self.splits["train"]

    @property
    def val(self) -> Grouped:
        """The validation rows."""
        return self.splits["val"]

    @property
    def test(self) -> Grouped:
        """The test rows."""
        return self.splits["test"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the C classes."""
        return next(iter(self.splits.values())).rows.classes

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of each split, see `Grouped.digest`."""
        return {name: split.digest() for name, split in self.splits.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """Rows of each group by split; splits without groups are left out."""
        return {
            name: dict(zip(split.groups.names, split.groups.counts.tolist(), strict=True))
            for name, split in self.splits.items()
            if split.groups is not None
        }

    def require_groups(self, *splits: str) -> None:
        """Raise a ValueError if, in one of these splits, groups are unknown or one of them has no row."""
        for name in splits:
            if name not in self.splits:
                raise ValueError(f"{self.name} has no split {name!r}; it has {', '.join(self.splits)}")
            groups = self.splits[name].groups
            if groups is None:
                raise ValueError(
                    f"{self.name} has no groups in split {name!r}; give them"
                    + ("" if name == "test" else ", or use a method that needs none there")
                )
            groups.require_rows(f"{name} of {self.name}")

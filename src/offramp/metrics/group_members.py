"""Groups of rows: who belongs to which. Groups may overlap, and a row may belong to none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN = -1
"""Stands for an attribute or a group that is not known."""


@dataclass(frozen=True)
class Groups:
    """G groups of N rows.

    Attributes:
        names: Of the groups, G.
        members: Whether a row belongs to a group, [N, G], bool.
    """

    names: tuple[str, ...]
    members: Tensor

    def __post_init__(self) -> None:
        if self.members.ndim != 2 or self.members.dtype != torch.bool:
            raise ValueError(
                f"members have shape {list(self.members.shape)} and type {self.members.dtype}; [rows, groups] of bool "
                "is needed"
            )
        if self.members.shape[1] != len(self.names) or not self.names:
            raise ValueError(f"there are {len(self.names)} names for {self.members.shape[1]} groups; give one each")
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"two groups are named {twice!r}; give each its own name")

    @classmethod
    def by_number(cls, numbers: Tensor, names: Sequence[str]) -> Groups:
        """Groups that do not overlap, from the number of each row's, [N], -1 for none; a ValueError for any other."""
        wrong = (numbers < UNKNOWN) | (numbers >= len(names))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"the group of row {row} is {int(numbers[row])}; allowed are 0..{len(names) - 1}, and -1 for none"
            )
        return cls(tuple(names), numbers[:, None] == torch.arange(len(names)))

    @classmethod
    def crossed(cls, labels: Tensor, classes: Sequence[str], attribute: Tensor, values: Sequence[str]) -> Groups:
        """One group for each class and value of an attribute, number = class x A + value, as group_DRO counts.

        Args:
            labels: [N], in 0..C-1.
            classes: Names of the C classes.
            attribute: [N], in 0..A-1; -1: unknown, such a row is in no group.
            values: Names of the A values.

        Returns:
            C x A groups, named "class, value".

        Raises:
            ValueError: A label or a value is out of range.
        """
        for what, numbers, allowed, lowest in (
            ("label", labels, classes, 0), ("attribute", attribute, values, UNKNOWN)
        ):  # fmt: skip
            wrong = (numbers < lowest) | (numbers >= len(allowed))
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise ValueError(
                    f"the {what} of row {row} is {int(numbers[row])}; allowed are {lowest}..{len(allowed) - 1}"
                )
        numbers = torch.where(attribute == UNKNOWN, UNKNOWN, labels * len(values) + attribute)
        return cls.by_number(numbers, [f"{name}, {value}" for name in classes for value in values])

    @classmethod
    def mentioned(cls, labels: Tensor, classes: Sequence[str], attributes: Mapping[str, Tensor]) -> Groups:
        """One group for each attribute that is 1 and each class; a row with several attributes is in several groups.

        The evaluation of CivilComments in WILDS (Koh et al., 2021): rows without any of the attributes are in none.

        Returns:
            A x C groups of labels [N] in 0..C-1 and attributes [N] by name, named "attribute, class".
        """
        names = tuple(f"{attribute}, {name}" for attribute in attributes for name in classes)
        members = [(value == 1) & (labels == c) for value in attributes.values() for c in range(len(classes))]
        return cls(names, torch.stack(members, dim=1))

    @property
    def rows(self) -> int:
        """N."""
        return len(self.members)

    @property
    def counts(self) -> Tensor:
        """Rows of each group, [G], int64."""
        return self.members.sum(dim=0)

    @property
    def overlap(self) -> bool:
        """Whether some row is in several groups."""
        return bool((self.members.sum(dim=1) > 1).any())

    def numbers(self) -> Tensor:
        """The group of each row, [N], int64; -1 for a row without one; a ValueError if groups overlap."""
        if self.overlap:
            row = int((self.members.sum(dim=1) > 1).nonzero()[0])
            several = " and ".join(repr(self.names[int(g)]) for g in self.members[row].nonzero().flatten())
            raise ValueError(f"row {row} is in the groups {several}; what was asked for needs groups without overlap")
        return torch.where(self.members.any(dim=1), self.members.long().argmax(dim=1), UNKNOWN)

    def take(self, rows: Tensor) -> Groups:
        """The same groups of the rows at these places, [n], int64."""
        return Groups(self.names, self.members[rows])

    def require_rows(self, split: str) -> None:
        """Raise a ValueError if a group has no row; `split` is the name of the split, for the message."""
        for name, count in zip(self.names, self.counts.tolist(), strict=True):
            if not count:
                raise ValueError(
                    f"group {name!r} has no row in split {split!r}; use another split, or leave this group out"
                )

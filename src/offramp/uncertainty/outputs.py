"""What all exits say about the rows of a split, from one pass over it: what every fit, grid and metric reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.runs import digests


@dataclass(frozen=True)
class ExitOutputs:
    """Features, logits and labels of N rows at E exits, shallow to deep; the last exit is the full model.

    Attributes:
        features: Inputs of each exit's last linear layer, E tensors [N, D_e], without the bias's one; float32, maybe
            memory-mapped.
        logits: Of each exit, [E, N, C], float32.
        labels: Of each row, in 0..C-1, [N], int64.
        costs: FLOPs of one row up to and including each exit, all earlier exits' heads counted too, [E], float64,
            ascending.
        ids: Of the rows, to see that splits do not overlap; empty: unknown.
        groups: A number per row, [N], int64, such as (label, attribute); None: unknown.
        cut: FLOPs of one row in the plain network cut after each exit, without the heads of earlier exits, [E],
            float64; the last is what would run without early exits. None: heads cost nothing, or it is unknown.
    """

    features: Sequence[Tensor]
    logits: Tensor
    labels: Tensor
    costs: Tensor
    ids: tuple[str, ...] = field(default=(), repr=False)
    groups: Tensor | None = None
    cut: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logits.ndim != 3:
            raise ValueError(f"logits have shape {list(self.logits.shape)}; exits x rows x classes are needed")
        exits, rows, classes = self.logits.shape
        shapes = [list(f.shape[:1]) for f in self.features]
        if len(self.features) != exits or any(shape != [rows] for shape in shapes):
            raise ValueError(f"features of {exits} exits with {rows} rows each are needed, but rows are {shapes}")
        if self.labels.shape != (rows,):
            raise ValueError(f"labels have shape {list(self.labels.shape)}; there are {rows} rows")
        wrong = (self.labels < 0) | (self.labels >= classes)
        if rows and bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(f"the label of row {row} is {int(self.labels[row])}; allowed are 0..{classes - 1}")
        if self.costs.shape != (exits,) or bool((self.costs.diff() < 0).any()):
            raise ValueError(f"costs are {self.costs.tolist()}; one per exit is needed, {exits} ascending numbers")
        if self.cut is not None and (self.cut.shape != (exits,) or bool((self.cut > self.costs * (1 + 1e-9)).any())):
            raise ValueError(
                f"costs without earlier heads are {self.cut.tolist()}, with them {self.costs.tolist()}; one per exit "
                "is needed, none above the other"
            )
        if self.ids and len(self.ids) != rows:
            raise ValueError(f"there are {len(self.ids)} ids for {rows} rows")

    @property
    def exits(self) -> int:
        """E."""
        return len(self.logits)

    @property
    def rows(self) -> int:
        """N."""
        return self.logits.shape[1]

    @property
    def classes(self) -> int:
        """C."""
        return self.logits.shape[2]

    @property
    def full_cost(self) -> float:
        """FLOPs of one row in the plain full network, the backbone and the last exit's head: what savings are of."""
        return float((self.costs if self.cut is None else self.cut)[-1])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that exits say about the split, to see later that a chain of fits belongs together."""
        groups = () if self.groups is None else (self.groups,)
        return digests.of(list(self.ids), (*self.features, *self.logits, self.labels, self.costs, *groups))

    def take(self, rows: Tensor) -> ExitOutputs:
        """The rows at these places, [n], int64, in this order."""
        return ExitOutputs(
            [f[rows] for f in self.features], self.logits[:, rows], self.labels[rows], self.costs,
            tuple(self.ids[i] for i in rows.tolist()) if self.ids else (),
            None if self.groups is None else self.groups[rows], self.cut,
        )  # fmt: skip


def require_disjoint(**splits: ExitOutputs) -> None:
    """Raise a ValueError if two splits, by name, share a row id; splits without ids are not looked at."""
    names = list(splits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if shared := set(splits[first].ids) & set(splits[second].ids):
                raise ValueError(
                    f"splits {first} and {second} share {len(shared)} rows, such as {min(shared)!r}; a row may be in "
                    "one of them only"
                )


def augmented(features: Tensor) -> Tensor:
    """Features [..., D] with a one behind them, [..., D + 1], float64: the bias as one more weight."""
    features = features.double()
    return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], dim=-1)


# ---------------------------------------------------------------- what is asked of rows before a fit

CHUNK = 4096
"""Rows looked at together."""


def require_finite(name: str, values: Tensor, first: int = 0) -> None:
    """Raise a ValueError that names the first row of `values` [N, ...] that is not finite; rows count from `first`."""
    for start in range(0, len(values), CHUNK):
        good = values[start : start + CHUNK].isfinite().flatten(1).all(dim=1)
        if not bool(good.all()):
            row = start + int((~good).nonzero()[0])
            bad = values[row].flatten()
            bad = bad[~bad.isfinite()]
            raise ValueError(
                f"row {first + row} of {name} holds {float(bad[0])}; leave the row out, or look at the "
                "model that made it"
            )


def require_fit(split: str, outputs: ExitOutputs) -> None:
    """Raise a ValueError if nothing can be fitted on a split: no rows, one class, or numbers that are not finite."""
    if not outputs.rows:
        raise ValueError(f"the {split} split has no rows; give some")
    if outputs.classes < 2 or not bool((outputs.labels != outputs.labels[0]).any()):
        raise ValueError(
            f"all {outputs.rows} rows of the {split} split have the class {int(outputs.labels[0])}; probabilities can "
            "be calibrated only where there are at least two classes"
        )
    for exit in range(outputs.exits):
        require_finite(f"the features of exit {exit + 1} in the {split} split", outputs.features[exit])
        require_finite(f"the logits of exit {exit + 1} in the {split} split", outputs.logits[exit])


def missing_classes(split: str, outputs: ExitOutputs) -> str | None:
    """Which classes have no row, in words; None if all have."""
    there = torch.bincount(outputs.labels, minlength=outputs.classes) > 0
    if bool(there.all()):
        return None
    missing = (~there).nonzero().flatten().tolist()
    names = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
    return f"{len(missing)} of {outputs.classes} classes have no row in the {split} split: {names}"

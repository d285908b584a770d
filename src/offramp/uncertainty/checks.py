"""What is asked of rows before anything is fitted on them."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.uncertainty.outputs import ExitOutputs

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
            "be made honest only where there are at least two classes"
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

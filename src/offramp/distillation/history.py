"""What a run knows after each epoch, and the weights of the epochs that some selection rule would choose.

Only validation rows are looked at here; test rows are judged once, when training is over, at the epochs chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from offramp.metrics.selection import Epoch, Judged, choices
from offramp.runs.bounded import read_json
from offramp.runs.digests import sealed, unsealed
from offramp.runs.files import write_json
from offramp.runs.tensor_files import read_tensors, write_tensors

AGAIN = "remove the run's folder to train it again"


class History:
    """The epochs of a run, in a folder.

    Args:
        folder: Holds history.json, and N.safetensors for each epoch N that a rule would choose so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "history.json"
        self.rows = _rows(self.file) if self.file.is_file() else []

    def add(self, epoch: int, val: Judged, more: Mapping[str, Any], model: nn.Module) -> None:
        """Record an epoch, counted from 1: its validation, and JSON values besides.

        One that is repeated after an interruption replaces what was recorded of it and later.
        """
        self.rows = [row for row in self.rows if row["epoch"] < epoch]
        self.rows.append({"epoch": epoch, "val": asdict(val), **more})
        chosen = {found.number for found in choices(self.epochs()).values()}
        if epoch in chosen:
            write_tensors(self.folder / f"{epoch}.safetensors", model.state_dict())
        write_json(self.file, sealed({"epochs": self.rows}))
        self._forget_but(chosen)

    def epochs(self) -> list[Epoch]:
        """As selection rules take them."""
        return [Epoch(row["epoch"], Judged(**row["val"])) for row in self.rows]

    def choices(self) -> dict[str, int]:
        """The epoch that each rule chooses."""
        return {rule: epoch.number for rule, epoch in choices(self.epochs()).items()}

    def weights(self, epoch: int) -> dict[str, Tensor]:
        """The state of the model after an epoch that a rule chooses."""
        return read_tensors(self.folder / f"{epoch}.safetensors", AGAIN)[1]

    def forget_weights(self) -> None:
        """Drop the weights: a finished run has been judged at all epochs that a rule chooses."""
        self._forget_but(set())

    def _forget_but(self, epochs: set[int]) -> None:
        for path in self.folder.glob("*.safetensors"):
            if path.stem.isdecimal() and int(path.stem) not in epochs:
                path.unlink()


def _rows(file: Path) -> list[dict[str, Any]]:
    """What is known after each epoch; earlier versions kept nothing but the list."""
    values = read_json(file, AGAIN)
    values = {"epochs": values} if isinstance(values, list) else values
    rows = unsealed(values, file, AGAIN).get("epochs") if isinstance(values, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"epoch", "val"} <= set(row) for row in rows):
        raise ValueError(f"{file} is damaged: it holds no epochs; {AGAIN}")
    return rows

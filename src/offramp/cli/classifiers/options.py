"""Options that several commands for classifiers share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from offramp.cli import options as o

Task = Annotated[str, typer.Option(help="image-classification or text-classification.")]
Data = Annotated[
    Path,
    typer.Option(
        metavar="PATH",
        help="Images: the folder of IDX or CIFAR files, or of one folder per class. Texts: a .tsv, .csv or .jsonl "
        "file, also with .gz.",
    ),
]
TestData = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH", help="A published test split in the same layout; default: that of --data, or a tenth of it."
    ),
]
DataAgain = Annotated[
    Path, typer.Option(metavar="PATH", help="What the model was trained on; it is divided again as it was then.")
]
TestDataAgain = Annotated[
    Path | None, typer.Option("--test-data", metavar="PATH", help="The published test split it was given, if any.")
]
Cache = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where outputs of exits are kept for later steps; default: beside the model."),
]
BatchSize = Annotated[int, typer.Option(help="Rows at once.")]
Draws = Annotated[int, typer.Option(help="Draws of the logits, with Laplace.")]
Grid = Annotated[
    str | None,
    typer.Option(help="meronen: the published grid of temperatures and prior variances; default: a wider one."),
]
FitOn = Annotated[
    str,
    typer.Option(
        help="Rows for Laplace's factors. train: those of the network, as published; tune: rows it has not seen, which "
        "then also tune it."
    ),
]
Bins = Annotated[int, typer.Option(help="Bins of the calibration error; 10 in the published tables.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder model/ of a run of offramp train.")]


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Within, warnings become notes, each once."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for text in dict.fromkeys(str(w.message) for w in found if issubclass(w.category, UserWarning)):
                o.note(f"note: {text}")

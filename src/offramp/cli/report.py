"""`offramp report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.cli import options as o


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of train, evaluate, calibrate, probe and distill (the grid, one of its runs, or a language "
            "model's); probe's JSON files.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The HTML file; default: report.html in the first folder.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Examples to show of each evaluation, token by token.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the choice of examples.")] = 0,
) -> None:
    """One HTML file about one or several runs: tables, pictures, examples, the certificate, how to repeat them.

    It needs no other file and no network, and may be sent around.
    """
    from offramp.report.html import report as write

    first = runs[0] if runs[0].is_dir() else runs[0].parent
    path = write(runs, out or first / "report.html", examples=examples, seed=seed)
    o.note(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")

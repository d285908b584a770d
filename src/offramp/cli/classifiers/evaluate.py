"""`offramp evaluate MODEL... --task image-classification`, or text-classification."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.cli import options as o
from offramp.cli.classifiers import options as c


def evaluate_classifier(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...",
            help="Folders model/ of runs of offramp train; several that differ in the seed only are averaged over.",
        ),
    ],
    task: c.Task,
    data: c.DataAgain,
    test_data: c.TestDataAgain = None,
    methods: Annotated[
        str,
        typer.Option(help="all, or some of vanilla,temperature,mie,mie+temperature,laplace,mie+laplace, with commas."),
    ] = "all",
    corruption: Annotated[
        str | None, typer.Option(help="Test on corrupted images too: noise, blur, contrast, or several with commas.")
    ] = None,
    severity: Annotated[int, typer.Option(help="Severity of the corruptions, 1 to 5.")] = 3,
    draws: c.Draws = 50,
    grid: c.Grid = None,
    fit_on: c.FitOn = "train",
    bins: c.Bins = 15,
    limit: Annotated[int | None, typer.Option(help="Use only so many test rows, drawn at random.")] = None,
    resamples: Annotated[int, typer.Option(help="Draws of the bootstrap behind the intervals of one model.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of Laplace's draws, bootstrap and test rows drawn.")] = 0,
    batch_size: c.BatchSize = 64,
    cache: c.Cache = None,
    device: o.Device = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the run is written; default: runs/evaluate-NAME.")
    ] = None,
    json: o.JsonPath = None,
) -> None:
    """Every calibration method at 39 budgets, beside static exits and the full model, with intervals.

    All exits are computed and chosen afterwards; what is compared is quality and FLOPs. What exits say about a split,
    and fitted posteriors, are kept beside the model: an interrupted evaluation goes on.
    """
    import offramp
    from offramp.classifiers.loading import run_folder

    folder = out or run_folder("evaluate", models[0])
    chosen: Any = {
        "task": task, "methods": None if methods == "all" else o.names(methods), "grid": grid, "fit_on": fit_on,
        "corruptions": () if corruption is None else o.names(corruption),
    }  # fmt: skip
    with c.noted(), o.progress("evaluating") as progress:
        result = offramp.evaluate_classifier(
            models, data, **chosen, test_data=test_data, severity=severity, draws=draws, bins=bins, limit=limit,
            resamples=resamples, seed=seed, batch_size=batch_size, cache=cache, device=device,
            about={"command": o.command_line()}, out=folder, progress=progress,
        )  # fmt: skip
    for test in result.tests:
        o.say(f"## {test}, mean over the budgets\n\n{result.mean_table(test)}\n", json)
    o.say(f"## Temperatures T and prior variances ω of the exits\n\n{result.fitted_table()}\n", json)
    o.say("\n\n".join(result.notes()), json)
    o.note(f"wrote {folder}: results.json, records, pictures and, with more tables, table.md")
    o.note(f"read it with: offramp report {folder}")
    o.write_result(result.to_dict(), json)

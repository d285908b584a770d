"""`offramp evaluate MODEL... --task image-classification`, or text-classification."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

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
    severity: Annotated[int, typer.Option(help="Of the corruptions, 1 to 5.")] = 3,
    draws: c.Draws = 50,
    grid: c.Grid = None,
    fit_on: c.FitOn = "train",
    bins: c.Bins = 15,
    limit: Annotated[int | None, typer.Option(help="Use only so many test rows, drawn at random.")] = None,
    resamples: Annotated[int, typer.Option(help="Draws of the bootstrap behind the intervals of one model.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of Laplace's draws, of the bootstrap and of that choice.")] = 0,
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
    from offramp.classifiers.compare import ComparisonConfig, compare
    from offramp.classifiers.evaluate import Settings
    from offramp.classifiers.passes import Passes
    from offramp.runs.machine import describe
    from offramp.uncertainty.posterior import METHODS, PosteriorConfig

    config = ComparisonConfig(
        METHODS if methods == "all" else _names(methods), PosteriorConfig(n_mc=draws, grid=grid, seed=seed), fit_on,
        () if corruption is None else _names(corruption), severity, limit, Settings(bins, resamples, seed),
    )  # fmt: skip
    folder = out or Path("runs") / f"evaluate-{c.title(models[0])}"
    with c.noted(), o.progress("evaluating") as progress:
        networks = [
            Passes.of(
                model, task, data, test_data, folder=_cache(cache, model, len(models)), device=device,
                batch_size=batch_size, progress=progress,
            )
            for model in models
        ]  # fmt: skip
        rows = {name: len(part) for name, part in networks[0].splits.items()}
        conditions = {
            "model": c.title(models[0]), "data": str(data), "rows": ", ".join(f"{n} {k}" for n, k in rows.items()),
            "draws": draws, "grid": grid or "wide", "factors_from": fit_on, "bins": bins, "seed": seed,
            "command": o.command_line(), **describe(networks[0].classifier.device),
        }  # fmt: skip
        result = compare(networks, config, folder, conditions=conditions, progress=progress)
    if str(json) != "-":
        for test in result.tests:
            o.say(f"## {test}, mean over the budgets\n\n{result.mean_table(test)}\n")
        o.say(f"## Temperatures T and prior variances ω of the exits\n\n{result.fitted_table()}\n")
        o.say("\n\n".join(result.notes()))
    o.note(f"wrote {folder}: results.json, records, pictures and, with more tables, table.md")
    o.note(f"read it with: offramp report {folder}")
    o.write_result(result.to_dict(), json)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def _cache(cache: Path | None, model: Path, models: int) -> Path | None:
    """A folder per model: outputs of two would replace each other."""
    if cache is None or models == 1:
        return cache
    return cache / hashlib.sha256(str(model.expanduser().resolve()).encode()).hexdigest()[:8]

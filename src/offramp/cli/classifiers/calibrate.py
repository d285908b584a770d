"""`offramp calibrate MODEL --task image-classification`, or text-classification."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.cli import options as o
from offramp.cli.classifiers import options as c


def calibrate_classifier(
    model: c.Model,
    task: c.Task,
    data: c.DataAgain,
    test_data: c.TestDataAgain = None,
    posterior: Annotated[
        str,
        typer.Option(
            help="What calibrates probabilities: vanilla (nothing), temperature, mie (model-internal ensemble of the "
            "exits), mie+temperature, laplace (last layer, with temperature), mie+laplace; or auto: of the first four "
            "the one that held-out rows of the tune split say helps, which may be none."
        ),
    ] = "auto",
    draws: c.Draws = 50,
    grid: c.Grid = None,
    predictive: Annotated[str, typer.Option(help="With Laplace: mc, means over draws, or probit, without any.")] = "mc",
    damping: Annotated[str, typer.Option(help="Damping of Laplace: factored, as published, or exact.")] = "factored",
    fit_on: c.FitOn = "train",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Certify a threshold: what the mean loss of new rows is to stay below; default: none."),
    ] = None,
    failure: Annotated[float, typer.Option(help="Probability with which that may fail.")] = 0.05,
    loss: Annotated[
        str,
        typer.Option(
            help="Loss of a row that leaves early. consistency: its class is not the reference's; gap: it is wrong "
            "where the reference is right (less where it is the other way round); brier: half the difference of Brier "
            "scores; brier-consistency: the same against the reference's class, without labels."
        ),
    ] = "consistency",
    reference: Annotated[
        str,
        typer.Option(
            help="What the promise is against. last-exit: the network's own last exit as it is, the plain full "
            "network; posterior: the last exit with the posterior, of mie the ensemble of all exits."
        ),
    ] = "last-exit",
    bound: Annotated[
        str | None,
        typer.Option(
            help="wsr (betting), hoeffding-bentkus, binomial (losses of 0 or 1), or crc (a guarantee on the mean, "
            "without failure probability); default: binomial for consistency, else wsr."
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Calibrate nested sets of classes: the right one is in those of all exits with probability 1 - alpha; "
            "default: none."
        ),
    ] = None,
    bins: c.Bins = 15,
    seed: Annotated[int, typer.Option(help="Seed of Laplace's draws and of the order of rows.")] = 0,
    batch_size: c.BatchSize = 64,
    cache: c.Cache = None,
    device: o.Device = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the result is written; default: runs/calibrate-NAME-POSTERIOR."),
    ] = None,
    json: o.JsonPath = None,
) -> None:
    """Calibrate the exits of a classifier, for `offramp classify`; certify a threshold, calibrate sets.

    Each step has rows of its own, see `offramp train --task image-classification --help`. What exits say about a split
    is computed once and kept.
    """
    import offramp
    from offramp.classifiers.loading import run_folder

    folder = out or run_folder("calibrate", model, posterior)
    chosen: Any = {
        "task": task, "posterior": posterior, "grid": grid, "predictive": predictive, "damping": damping,
        "fit_on": fit_on, "loss": loss, "reference": reference, "bound": bound,
    }  # fmt: skip
    with c.noted(), o.progress("calibrating") as progress:
        result = offramp.calibrate_classifier(
            model, data, **chosen, test_data=test_data, draws=draws, tolerance=tolerance, failure=failure, alpha=alpha,
            bins=bins, seed=seed, batch_size=batch_size, cache=cache, device=device,
            about={"command": o.command_line()}, out=folder, progress=progress,
        )  # fmt: skip
    o.say(result.table(), json)
    o.note(f"wrote {folder}; use it with: offramp classify {model} INPUT --posterior {folder} --budget 0.5")
    o.write_result(result.to_dict(), json)

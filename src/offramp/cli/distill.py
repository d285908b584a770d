"""`offramp distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.cli import options as o


def distill(
    student: Annotated[
        str | None,
        typer.Argument(
            metavar="STUDENT",
            help="What is trained: small-cnn:WIDTH (small images), text:LAYERSxWIDTH (new, with the words of the "
            "data), or a pretrained encoder by packaged name, folder or hub id, maybe with :N for its first N layers. "
            "May stand in --config.",
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NETWORK|FOLDER|logits:FILE",
            help="A network, described as STUDENT, that is trained here first; a folder with a classifier that was "
            "saved; or logits on disk. May be given several times, but only one network.",
        ),
    ] = None,
    teacher_method: Annotated[
        str, typer.Option(help="How a teacher that is trained here learns: erm, group_dro, group_balanced, jtt, dfr.")
    ] = "erm,group_dro",
    task: Annotated[
        str | None,
        typer.Option(help="Layout of --data: waterbirds, celeba, multinli, snli, civilcomments, groups (CSV, JSONL)."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|stand-in:NAME",
            help="A local folder or file as it is published, or a set that is generated: stand-in:digits-on-colour, "
            "stand-in:template-nli, stand-in:template-toxicity, stand-in:mnist-on-colour:FOLDER, …",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Methods with commas between them: erm, jtt, group_balanced, group_dro, lff, dfr, kd, simkd, dett, "
            "dedier, dedier_code, laplace, laplace_entropy, laplace_variance, avcs, avcs_size, nested, nested_size; "
            "controls dedier_permuted, dedier_mean, dedier_gate, dedier_oracle. Switches behind a name: "
            "dedier+alpha=1+fraction=0.5."
        ),
    ] = "erm,kd,dedier",
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="Settings as JSON; waterbirds, celeba, multinli and civilcomments come with the published ones, "
            "stand-ins with ours, which are used without asking.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 5,
    first_seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of students and teachers that are trained.")] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help="How a run's epoch is chosen: last, val_average, val_worst_class, val_loss (no group labels), "
            "val_group_mean, val_worst_group. One without group labels also chooses teachers' epochs."
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    backend: Annotated[str, typer.Option(help="processes, or ray for the machines of a Ray cluster.")] = "processes",
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process.")] = 1,
    device: o.Device = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the grid is written; default: runs/distill-DATA.")
    ] = None,
    json: o.JsonPath = None,
) -> None:
    """Distil students by several methods and judge them group by group.

    Each method runs with each teacher and seed; a run is one folder, and an interrupted grid goes on when it is started
    again. Printed are, for each teacher: the worst group by method with paired differences to plain distillation, every
    group with its interval, what distillation cost it, exits by group, how well weights find the minority, what other
    selection rules would have chosen, and where group labels were used. `offramp report` shows the same with pictures.
    """
    import offramp

    chosen: Any = {"task": task, "select": select, "backend": backend}
    with o.progress("distilling") as progress:
        grid = offramp.distill_grid(
            student, data, **chosen, teachers=teacher or [], teacher_methods=o.names(teacher_method),
            methods=o.names(method), settings=config, seeds=range(first_seed, first_seed + seeds), epochs=epochs,
            processes=processes, threads=threads, device=device, out=out, progress=progress,
        )  # fmt: skip
    o.say(grid.table(), json)
    o.note(f"wrote {grid.folder / 'report.md'} and groups.csv; pictures: offramp report {grid.folder}")
    o.write_result(grid.to_dict(), json)

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
    epochs: Annotated[int | None, typer.Option(min=1, help="Of students and teachers that are trained.")] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help="How a run's epoch is chosen: last, val_average, val_worst_class, val_loss (no group labels), "
            "val_group_mean, val_worst_group. One without group labels also chooses teachers' epochs."
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    backend: Annotated[str, typer.Option(help="processes, or ray for the machines of a Ray cluster.")] = "processes",
    threads: Annotated[int, typer.Option(min=1, help="Of each process.")] = 1,
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
    from offramp.distillation.config import runs
    from offramp.distillation.grid import run_grid
    from offramp.hub.devices import named_device
    from offramp.report.grids import FEW, summary, tables, write_groups
    from offramp.runs.files import write_text

    values = settings_from(config, data)
    study, given = study_of(values, student, teacher or [], data, task, epochs, select)
    names = [name.strip() for name in method.split(",") if name.strip()]
    taught = given or [name.strip() for name in teacher_method.split(",") if name.strip()]
    asked = runs(study, names, taught, list(range(first_seed, first_seed + seeds)), values.get("methods"))
    folder = out or Path("runs") / f"distill-{study.data.name}"
    with o.progress("distilling") as progress:
        results = run_grid(
            asked, folder, processes=processes, engine=backend, threads=threads, device=str(named_device(device)),
            progress=progress,
        )  # fmt: skip
    write_text(folder / "report.md", tables(results, study.select))
    write_groups(results, folder / "groups.csv")
    if str(json) != "-":
        o.say(tables(results, study.select, FEW))
    o.note(f"wrote {folder / 'report.md'} and groups.csv; pictures: offramp report {folder}")
    o.write_result(summary(results, study.select), json)


def settings_from(config: str | None, data: str | None) -> dict[str, Any]:
    """The settings of a file, or of a set that come with the library; those of a stand-in need not be asked for."""
    from offramp.distillation.config import BUNDLED, bundled
    from offramp.runs.bounded import read_object

    if config is None:
        name = (data or "").removeprefix("stand-in:").partition(":")[0]
        return bundled(name) if name != data and name in BUNDLED else {}
    if config in BUNDLED:
        return bundled(config)
    path = Path(config).expanduser()
    if not path.is_file():
        raise typer.BadParameter(f"--config {config}: no such file; those that come along are {', '.join(BUNDLED)}")
    return read_object(path, "give a JSON file with an object")


def study_of(
    values: dict[str, Any],
    student: str | None,
    teacher: list[str],
    data: str | None,
    task: str | None,
    epochs: int | None,
    select: str | None,
) -> tuple[Any, list[str]]:
    """The study of file and options, which go first; and teachers that are given."""
    from dataclasses import replace

    from offramp.distillation.config import Study, study_from
    from offramp.distillation.data import DataConfig
    from offramp.distillation.networks import Network, is_classifier
    from offramp.metrics.selection import WITH_GROUPS

    given = [
        t if t.startswith("logits:") else f"folder:{t}" for t in teacher if t.startswith("logits:") or is_classifier(t)
    ]
    networks = [t for t in teacher if not t.startswith("logits:") and not is_classifier(t)]
    if len(networks) > 1 or (networks and given):
        raise typer.BadParameter("--teacher: give one network to be trained, or teachers that are ready, not both")
    own = {key: dict(values.get(key, {})) for key in ("data", "student", "teacher")}
    path, source = data or own["data"].get("path"), student or own["student"].get("source")
    if path is None:
        raise typer.BadParameter("--data is missing; give a local folder, or stand-in:digits-on-colour")
    if source is None:
        raise typer.BadParameter("STUDENT is missing; give a network such as small-cnn:8")
    of_teacher = networks[0] if networks else own["teacher"].get("source")
    kind = task if task is not None or path.startswith("stand-in:") else own["data"].get("task")
    base = Study(DataConfig(path, kind), Network(source), Network(of_teacher or source))
    for key, name in (("data", "path"), ("data", "task"), ("student", "source"), ("teacher", "source")):
        own[key].pop(name, None)
    study: Study = study_from({**values, **own}, base)
    if epochs is not None:
        study = replace(
            study, training=replace(study.training, epochs=epochs),
            teacher_training=replace(study.teacher_training, epochs=epochs),
        )  # fmt: skip
    if select is not None:
        study = replace(study, select=select)
        if select not in WITH_GROUPS and "teacher_select" not in values:
            study = replace(study, teacher_select=select)  # whoever has no groups for students has none for teachers
    return study, given

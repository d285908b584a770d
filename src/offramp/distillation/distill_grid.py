"""`offramp.distill_grid`: students by several methods, teachers and seeds, judged group by group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from offramp.distillation.config import BUNDLED, Study, bundled, runs, study_from
from offramp.distillation.data import STAND_IN, DataConfig
from offramp.distillation.grid import run_grid
from offramp.distillation.networks import Network, is_classifier
from offramp.distillation.results import Result
from offramp.hub.pretrained import named_device
from offramp.metrics.selection import WITH_GROUPS
from offramp.report.grids import FEW, summary, tables, write_groups
from offramp.runs.bounded import read_object
from offramp.runs.files import write_text
from offramp.runs.progress import shown
from offramp.runs.results import Shown
from offramp.values import ArgumentError, idle

File = str | os.PathLike[str]
Layout = Literal["waterbirds", "celeba", "multinli", "snli", "civilcomments", "groups"]
Rule = Literal[
    "last", "val_average", "val_worst_class", "val_loss", "val_group_mean", "val_worst_group",
]  # fmt: skip
TEACHER_METHODS = ("erm", "group_dro")
"""How teachers that are trained here learn unless told otherwise."""


@dataclass(frozen=True)
class StudentGrid(Shown):
    """What a grid found.

    Attributes:
        results: What stands in the result.json of each run, in the order of the runs.
        select: The rule that chose epochs.
        folder: Folder of the grid, with report.md and groups.csv.
    """

    results: Sequence[Result]
    select: str
    folder: Path

    def __repr__(self) -> str:
        methods = dict.fromkeys(result["name"] for result in self.results)
        return f"StudentGrid({len(self.results)} runs of {', '.join(methods)} in {str(self.folder)!r})"

    def _rows(self) -> Iterable[Any]:
        """A row per run: method, teacher, seed, epoch, and on the test rows average and worst group."""
        for result in self.results:
            found = result["rules"][self.select]
            named = {"method": result["name"], "teacher": result["teacher"], "seed": result["seed"]}
            yield {**named, "epoch": found["epoch"], **found["test"]}

    def table(self) -> str:
        """All tables, a section for each teacher; those with a row per group of the first few methods."""
        return tables(self.results, self.select, FEW)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: by teacher and method the worst groups of all runs, and their differences."""
        return summary(self.results, self.select)


def distill_grid(
    student: str | None = None,
    data: str | None = None,
    *,
    teachers: Sequence[str] = (),
    teacher_methods: Sequence[str] = TEACHER_METHODS,
    task: Layout | None = None,
    methods: Sequence[str] = ("erm", "kd", "dedier"),
    settings: File | Mapping[str, Any] | None = None,
    seeds: Sequence[int] = range(5),
    epochs: int | None = None,
    select: Rule | None = None,
    processes: int = 1,
    backend: Literal["processes", "ray"] = "processes",
    threads: int = 1,
    device: str | None = None,
    out: File | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> StudentGrid:
    """Distil students by several methods and judge them group by group.

    Each method runs with each teacher and seed; a run is one folder, and an interrupted grid goes on when it is started
    again in the same one:

        grid = offramp.distill_grid("small-cnn:8", "stand-in:digits-on-colour", methods=["erm", "kd", "dedier"])
        print(grid.table())

    Args:
        student: What is trained: "small-cnn:WIDTH" (small images), "text:LAYERSxWIDTH" (new, with the words of the
            data), or a pretrained encoder by packaged name, folder or hub id, maybe with ":N" for its first N layers.
            None: as the settings say.
        data: A local folder or file as it is published, or a set that is generated, "stand-in:NAME". None: as the
            settings say.
        teachers: One network, described as the student, that is trained here first; or folders with classifiers that
            were saved, and logits on disk ("logits:FILE"). Empty: the settings' network, or the student's.
        teacher_methods: How a teacher that is trained here learns: some of
            `offramp.distillation.config.TRAINED_TEACHERS`.
        task: Layout of the data; None: a stand-in's, or as the settings say.
        methods: Names in `offramp.distillation.methods.METHODS`, maybe with switches: "dedier+alpha=1+fraction=0.5".
        settings: A JSON file, its values, or the name of a set whose published ones come along; None: those of a
            stand-in, which are used without asking.
        seeds: Seeds of the runs.
        epochs: Epochs of students and teachers that are trained; None: as the settings say.
        select: How a run's epoch is chosen. One without group labels also chooses teachers' epochs. None: as the
            settings say, else "val_worst_group".
        processes: Runs at a time.
        backend: Where they are done; "ray": on the machines of a Ray cluster.
        threads: Threads of each process.
        device: Where networks are; None: the first CUDA GPU if there is one, else the CPU.
        out: The grid's folder; None: runs/distill-DATA.
        progress: Called with runs done, runs to do and the last one's name.
            None: a bar in a terminal or a notebook, unless TQDM_DISABLE is set.

    Returns:
        The results, also written to the folder as report.md and groups.csv.

    Raises:
        ArgumentError: Arguments that are missing or do not go together, a ValueError.
        ValueError: There is no such method, set or network, the data cannot be read, or the folder holds other runs.
        FileNotFoundError: The data are missing.
        RuntimeError: Runs failed; the others are finished.
    """
    progress = shown(progress, "distilling")
    if backend == "ray":
        idle({"processes": (processes, 1)}, "of `backend` processes, since a cluster has its own; give that")
    values = settings_of(settings, data)
    study, given = study_of(values, student, teachers, data, task, epochs, select)
    asked = runs(study, list(methods), given or list(teacher_methods), list(seeds), values.get("methods"))
    learnt = {"teacher_methods": (tuple(teacher_methods), TEACHER_METHODS)}
    if given:
        idle(learnt, "of teachers that are trained here, and those given are ready; give a network as `teachers`")
    if all(run.teacher is None for run in asked):
        idle({"teachers": (tuple(given), ()), **learnt}, "of methods that have a teacher, as kd; name one")
    folder = Path("runs") / f"distill-{study.data.name}" if out is None else Path(out)
    place = device if device is not None and backend == "ray" else str(named_device(device))  # of the cluster, or here
    results = run_grid(
        asked, folder, processes=processes, engine=backend, threads=threads, device=place, progress=progress
    )
    write_text(folder / "report.md", tables(results, study.select))
    write_groups(results, folder / "groups.csv")
    return StudentGrid(results, study.select, folder)


def settings_of(given: File | Mapping[str, Any] | None, data: str | None) -> Mapping[str, Any]:
    """The settings of a file, or of a set that come with the library; those of a stand-in need not be asked for."""
    if isinstance(given, Mapping):
        return given
    if given is None:
        name = (data or "").removeprefix(STAND_IN).partition(":")[0]
        return bundled(name) if name != data and name in BUNDLED else {}
    if given in BUNDLED:
        return bundled(str(given))
    path = Path(given).expanduser()
    if not path.is_file():
        raise ArgumentError(f"`settings` {given}: no such file; those that come along are {', '.join(BUNDLED)}")
    return read_object(path, "give a JSON file with an object")


def study_of(
    values: Mapping[str, Any],
    student: str | None,
    teachers: Sequence[str],
    data: str | None,
    task: str | None,
    epochs: int | None,
    select: str | None,
) -> tuple[Study, list[str]]:
    """The study of settings and arguments, which go first; and teachers that are given."""
    saved = [t for t in teachers if t.startswith("logits:") or is_classifier(t)]
    networks = [t for t in teachers if t not in saved]
    if len(networks) > 1 or (networks and saved):
        raise ArgumentError("`teachers`: give one network to be trained, or teachers that are ready, not both")
    own = {key: dict(values.get(key, {})) for key in ("data", "student", "teacher")}
    path, source = data or own["data"].get("path"), student or own["student"].get("source")
    if path is None:
        raise ArgumentError("`data` is missing; give a local folder, or stand-in:digits-on-colour")
    if source is None:
        raise ArgumentError("`student` is missing; give a network such as small-cnn:8")
    of_teacher = networks[0] if networks else own["teacher"].get("source")
    if path.startswith(STAND_IN):
        idle({"task": (task, None)}, "of files, and a stand-in has a layout of its own; give `data` that are files")
    kind = task if task is not None or path.startswith(STAND_IN) else own["data"].get("task")
    base = Study(DataConfig(path, kind), Network(source), Network(of_teacher or source))
    for key, name in (("data", "path"), ("data", "task"), ("student", "source"), ("teacher", "source")):
        own[key].pop(name, None)
    study = study_from({**values, **own}, base)
    if epochs is not None:
        study = replace(
            study, training=replace(study.training, epochs=epochs),
            teacher_training=replace(study.teacher_training, epochs=epochs),
        )  # fmt: skip
    if select is not None:
        study = replace(study, select=select)
        if select not in WITH_GROUPS and "teacher_select" not in values:
            study = replace(study, teacher_select=select)  # whoever has no groups for students has none for teachers
    return study, [t if t.startswith("logits:") else f"folder:{t}" for t in saved]

"""Many runs: method x teacher x seed, one folder each, over processes; what is finished is not done again.

Started again after an interruption, a grid goes on with the runs that have no result yet, each from its last epoch.
Several grids may work in one folder, also from several machines that share it: a run belongs to whoever has its lock.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

from offramp.classifiers.saving import WEIGHTS
from offramp.distillation.config import Run
from offramp.distillation.data import forget_sets, load_set
from offramp.distillation.networks import begun_from
from offramp.distillation.results import AGAIN, read_result
from offramp.distillation.teacher import require_unseen
from offramp.hub.pretrained import named_device
from offramp.runs.bounded import read_object
from offramp.runs.digests import of_file
from offramp.runs.resume import as_json, differences, read_asked, require_same, write_asked

Progress = Callable[[int, int, str], None]


def ensure(run: Run, root: Path, *, place: str = "runs", device: str = "cpu") -> Path:
    """The folder of a run, which is trained now unless it was; waits for another process that does it.

    Args:
        run: What.
        root: The grid's folder.
        place: "runs", or "shared" for teachers and first students.
        device: Where it is trained.

    Returns:
        `root`/`place`/name, with result.json.

    Raises:
        ValueError: The folder holds another run, or one of other data.
    """
    from filelock import FileLock

    from offramp.distillation.run import RESULT, train_run

    folder = root / place / (run.key if place == "runs" else f"{run.key}--{run.digest}")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        _same(run, folder)
        if not (folder / RESULT).is_file():
            train_run(run, folder, lambda other: ensure(other, root, place="shared", device=device), device)
    return folder


def _same(run: Run, folder: Path) -> None:
    asked, path = as_json(run.to_dict()), folder / "config.json"
    if not path.is_file():
        write_asked(path, asked, digests=digests(run))
        return
    have, beside = read_asked(path, AGAIN, "digests")
    require_same(have, asked, folder)
    if "digests" in beside and (differing := differences(beside["digests"], digests(run))):
        changed = ", ".join(each.partition(" was ")[0] for each in differing)
        raise ValueError(
            f"{folder} holds a run of other data: what changed since, under the same name, is {changed}; give the same "
            "files, or another folder"
        )


def _check(run: Run, folder: Path) -> None:
    """Refuse a run that the folder does not fit, or that cannot be: its data, or saved classifiers that it is given."""
    if (folder / "config.json").is_file():
        _same(run, folder)
    if not (folder / "result.json").is_file():
        data = load_set(run.study.data, run.seed)
        networks = [run.study.student, *([run.study.teacher] if run.teacher_run() is not None else [])]
        begun = [f"folder:{start}" for network in networks if (start := begun_from(network)) is not None]
        for source in (*begun, run.teacher or ""):
            if source.startswith("folder:"):
                require_unseen(source, data)


def _require_one_study(runs: Sequence[Run], root: Path) -> None:
    """Refuse a folder with runs of another study: tables compare all that is in one."""
    asked = as_json(runs[0].to_dict()["study"]) if runs else None
    for path in sorted((root / "runs").glob("*/config.json")):
        have = read_object(path, AGAIN).get("study")
        if have is not None and asked is not None:
            require_same(have, asked, root, f"runs of another study, such as {path.parent.name}: {{}}")


def digests(run: Run) -> dict[str, str]:
    """SHA-256 of each split, and of a given teacher's weights or logits: what the options of a run do not say."""
    found = {f"{name} rows": digest for name, digest in load_set(run.study.data, run.seed).digests.items()}
    kind, _, path = (run.teacher or "").partition(":")
    file = Path(path).expanduser() / (WEIGHTS if kind == "folder" else "")
    if path and file.is_file():  # if there is none, whoever needs it says so
        found["teacher"] = of_file(file)
    return found


def execute(values: dict[str, Any], root: str, threads: int = 1, device: str = "cpu") -> dict[str, Any]:
    """One run, from JSON values to its outcome: {"key", "error"}, the error in words or None."""
    import torch

    torch.set_num_threads(threads)
    run = Run.from_dict(values)
    error = Path(root) / "runs" / run.key / "error.txt"
    try:
        ensure(run, Path(root), device=device)
    except Exception as problem:  # noqa: BLE001 - the other runs go on
        error.parent.mkdir(parents=True, exist_ok=True)
        error.write_text(traceback.format_exc(), encoding="utf-8")
        return {"key": run.key, "error": " ".join(str(problem).split()) or type(problem).__name__}
    error.unlink(missing_ok=True)
    return {"key": run.key, "error": None}


def run_grid(
    runs: Sequence[Run],
    root: Path,
    *,
    processes: int = 1,
    engine: str = "processes",
    threads: int = 1,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """All runs.

    Args:
        runs: What.
        root: The grid's folder, on a disk that all machines see.
        processes: How many at a time, 1: in this process; others are ended where this one is.
        engine: "processes", or "ray" for machines of a Ray cluster.
        threads: Threads of each process.
        device: Where all runs are trained; it is no part of a run, so a grid may go on on another one.
        progress: Called with runs done, runs to do and the last one's name.

    Returns:
        The results, in the order of the runs.

    Raises:
        ValueError: Two runs have the same name, there is no such engine or device, the data cannot be read, or the
            folder holds other runs, or runs of other data, or a given teacher was trained on test rows.
        RuntimeError: Runs failed; the others are finished.
    """
    if engine not in ("processes", "ray"):
        raise ValueError(f"engine is {engine!r}; choose processes or ray")
    if engine == "processes":  # with Ray it is the other machines that need it
        named_device(device)
    keys = [run.key for run in runs]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        of = list(dict.fromkeys(run.teacher for run in runs if run.key == twice))
        way = "give each method and seed once" if len(of) == 1 else f"rename the file of {of[0]} or that of {of[1]}"
        raise ValueError(f"two runs are named {twice}; {way}")
    forget_sets()
    for run in runs:  # before anything is trained
        _check(run, root / "runs" / run.key)
    _require_one_study(runs, root)
    waiting = [run.to_dict() for run in runs if not (root / "runs" / run.key / "result.json").is_file()]
    done, failed = len(runs) - len(waiting), []
    with closing(_outcomes(waiting, root, processes, engine, threads, device)) as outcomes:
        for outcome in outcomes:
            done += 1
            if progress is not None:
                progress(done, len(runs), outcome["key"])
            if outcome["error"] is not None:
                failed.append(outcome)
    if failed:
        first = failed[0]
        raise RuntimeError(
            f"{len(failed)} of {len(runs)} runs failed, the first is {first['key']}: {first['error']} (error.txt in "
            "its folder shows where); the others are finished, start again to go on"
        )
    return [dict(read_result(root / "runs" / key / "result.json")) for key in keys]


def _outcomes(
    waiting: list[dict[str, Any]], root: Path, processes: int, engine: str, threads: int, device: str
) -> Generator[dict[str, Any]]:
    if engine == "ray":
        yield from _on_ray(waiting, root, threads, device)
    elif processes == 1:
        for values in waiting:
            yield execute(values, str(root), threads, device)
    else:
        yield from _in_processes(waiting, root, processes, threads, device)


# ---------------------------------------------------------------- in processes of this machine, or on a Ray cluster


def _in_processes(
    waiting: list[dict[str, Any]], root: Path, processes: int, threads: int, device: str
) -> Generator[dict[str, Any]]:
    """Outcomes of runs as they end, so many at a time, in processes that end with this one, however it ends."""
    # closed before, or interrupted, runs under way are killed: started again, each goes on from its last epoch
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        futures = [pool.submit(execute, values, str(root), threads, device) for values in waiting]
        for future in as_completed(futures):
            yield future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown()


def _end_with_parent() -> None:
    """Interruptions are for the parent to act on; and without a parent nobody waits for what is done here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(waiting: list[dict[str, Any]], root: Path, threads: int, device: str) -> Generator[dict[str, Any]]:
    """The same as tasks of the cluster here, or that `RAY_ADDRESS` names: CPUs as threads; a GPU but for "cpu"."""
    try:
        ray = import_module("ray")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the engine ray needs Ray; install it with: pip install 'offramp[ray]', or use the engine processes"
        ) from error
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        task = ray.remote(num_cpus=threads, num_gpus=0 if device == "cpu" else 1)(execute)
        left = [task.remote(values, str(root.resolve()), threads, device) for values in waiting]
        while left:
            ended, left = ray.wait(left)
            yield from ray.get(ended)
    finally:
        if started:
            ray.shutdown()

"""Where the runs of a grid are done: in processes of this machine, or as tasks of a Ray cluster.

Processes end with the one that started them, however it ends. The cluster is the machine here, or what `RAY_ADDRESS`
names.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

Execute = Callable[..., dict[str, Any]]
"""Does one run, given its JSON values, the folder, threads and device; found by its name there."""


def in_processes(
    execute: Execute, waiting: list[dict[str, Any]], root: Path, processes: int, threads: int, device: str
) -> Generator[dict[str, Any]]:
    """What becomes of each of the waiting runs, as they end, so many at a time with so many threads each.

    Where it is closed before, or interrupted, runs under way are killed: each goes on from its last epoch when the grid
    is started again.

    Yields:
        What `execute` returns.
    """
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


def on_ray(
    execute: Execute, waiting: list[dict[str, Any]], root: Path, threads: int, device: str = "cpu"
) -> Generator[dict[str, Any]]:
    """The same on Ray; a task asks for as many CPUs as threads, and for a GPU unless the device is the CPU.

    Yields:
        What `execute` returns.

    Raises:
        ModuleNotFoundError: Ray is not installed.
    """
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

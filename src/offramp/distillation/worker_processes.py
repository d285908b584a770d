"""The runs of a grid in processes of this machine, which end with the one that started them, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any


def outcomes(
    execute: Callable[..., dict[str, Any]],
    waiting: list[dict[str, Any]],
    root: Path,
    processes: int,
    threads: int,
    device: str,
) -> Generator[dict[str, Any]]:
    """What becomes of each run, as they end.

    Where it is closed before, or interrupted, runs under way are killed: each goes on from its last epoch when the grid
    is started again.

    Args:
        execute: Does one run, given its JSON values, the folder, threads and device; found by its name there.
        waiting: Runs as JSON values.
        root: The grid's folder.
        processes: How many at a time.
        threads: Of each.
        device: Where they are trained.

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

"""The runs of a grid as tasks of a Ray cluster: the machine here, or those that `RAY_ADDRESS` names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any


def outcomes(
    execute: Callable[..., dict[str, Any]], waiting: list[dict[str, Any]], root: Path, threads: int, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """What becomes of each run, as they end.

    Args:
        execute: Does one run, given its JSON values, the folder, threads and device.
        waiting: Runs as JSON values.
        root: The grid's folder, on a disk that all machines see.
        threads: Of each task, which asks for as many CPUs.
        device: Of each task, which asks for one GPU unless it is the CPU.

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

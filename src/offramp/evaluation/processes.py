"""Several processes answer examples into one folder, which all of them see: each its batches, in a file of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from offramp.evaluation.record_file import Item, Record, digest, read_records, write_records
from offramp.files import locked

Run = Callable[..., list[Record]]
"""(examples, path=…) -> records, one per example: those of the file, after what is missing has been made."""


def state_of(device_type: str) -> Any:
    """`accelerate`'s state of the processes; without `accelerate launch` or `torchrun`, of this one alone."""
    from accelerate import PartialState

    return PartialState(cpu=device_type == "cpu")


@contextlib.contextmanager
def locked_by_first(state: Any, folder: Path, busy: str) -> Iterator[None]:
    """A run folder for these processes alone; the first of them holds the lock (`offramp.files.locked`).

    Args:
        state: `accelerate`'s.
        folder: The folder, made if missing.
        busy: What to say if others have it.

    Yields:
        Nothing.
    """
    with locked(folder, busy) if state.is_main_process else contextlib.nullcontext():
        state.wait_for_everyone()
        yield


def shared(state: Any, stem: Path, examples: Sequence[Item], batch_size: int, run: Run) -> list[Record]:
    """The records of all examples, each process having answered every so manieth batch.

    The batches are those of a single process, so are the records.

    Args:
        state: `accelerate`'s.
        stem: Of the file, without its ending.
        examples: All of them.
        batch_size: Examples answered together.
        run: Makes the records of some examples in the file `path`, or takes them from there.

    Returns:
        One record per example, in their order.
    """
    whole = stem.with_name(f"{stem.name}.jsonl")
    rank, processes = state.process_index, state.num_processes
    if processes > 1 and not whole.exists():
        batches = [examples[at : at + batch_size] for at in range(0, len(examples), max(batch_size, 1))]
        parts = [stem.with_name(f"{stem.name}.{r}-of-{processes}.jsonl") for r in range(min(processes, len(batches)))]
        if rank < len(parts):
            run([example for batch in batches[rank::processes] for example in batch], path=parts[rank])
        state.wait_for_everyone()
        if state.is_main_process:
            _join(whole, parts, examples)
    # What is there is compared with what was asked for; the first alone goes on where a single process was interrupted.
    records = run(examples, path=whole) if state.is_main_process else []
    state.wait_for_everyone()
    return records or run(examples, path=whole)


def _join(whole: Path, parts: Sequence[Path], examples: Sequence[Item]) -> None:
    """Put the records of all processes into one file, in the order of the examples."""
    header, _ = read_records(parts[0])
    records = {record.id: record for part in parts for record in read_records(part)[1]}
    write_records(whole, {**header, "examples": digest(examples)}, [records[example.id] for example in examples])
    for part in parts:
        part.unlink()

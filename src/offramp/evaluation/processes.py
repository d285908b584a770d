"""Several processes answer examples into one folder, which all of them see: each its batches, in a file of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp.evaluation.record_file import Item, Record, digest, read_records, write_records
from offramp.runs.asked import locked

Run = Callable[..., dict[str, list[Record]]]
"""(examples, paths={arm: …}) -> records by arm, those of its file, after what is missing has been made."""


def state_of(device_type: str) -> Any:
    """`accelerate`'s state of the processes; without `accelerate launch` or `torchrun`, of this one alone."""
    from accelerate import PartialState

    return PartialState(cpu=device_type == "cpu")


@contextlib.contextmanager
def locked_by_first(state: Any, folder: Path, busy: str) -> Iterator[None]:
    """A run folder for these processes alone; the first of them holds the lock (`offramp.runs.asked.locked`)."""
    with locked(folder, busy) if state.is_main_process else contextlib.nullcontext():
        state.wait_for_everyone()
        yield


def shared(
    state: Any, stems: Mapping[str, Path], examples: Sequence[Item], batch_size: int, run: Run
) -> dict[str, list[Record]]:  # fmt: skip
    """All examples' records by arm, each process answering its own batches; `stems`: the full model's file first."""
    whole = {arm: stem.with_name(f"{stem.name}.jsonl") for arm, stem in stems.items()}
    begun = {arm: path for arm, path in whole.items() if state.num_processes == 1 or path.exists()}
    new = {arm: stem for arm, stem in stems.items() if arm not in begun}
    state.wait_for_everyone()  # all have seen what there was before one of them writes
    if next(iter(stems)) in new:  # it may be what the others are compared with
        _each_its_batches(state, new, examples, batch_size, run)
    # What is there is compared with what was asked for; the first alone goes on where a single process was interrupted.
    records = run(examples, paths=begun) if state.is_main_process and begun else {}
    state.wait_for_everyone()
    if new and next(iter(stems)) not in new:
        _each_its_batches(state, new, examples, batch_size, run)
    return records if records.keys() == whole.keys() else run(examples, paths=whole)


def _each_its_batches(
    state: Any, stems: Mapping[str, Path], examples: Sequence[Item], batch_size: int, run: Run
) -> None:  # fmt: skip
    """Each process its batches in files of its own, which the first then puts together."""
    rank, processes = state.process_index, state.num_processes
    batches = [examples[at : at + batch_size] for at in range(0, len(examples), max(batch_size, 1))]
    parts = {
        arm: [stem.with_name(f"{stem.name}.{r}-of-{processes}.jsonl") for r in range(min(processes, len(batches)))]
        for arm, stem in stems.items()
    }
    if rank < len(batches):
        mine = [example for batch in batches[rank::processes] for example in batch]
        run(mine, paths={arm: files[rank] for arm, files in parts.items()})
    state.wait_for_everyone()
    if state.is_main_process:
        for arm, stem in stems.items():
            _join(stem.with_name(f"{stem.name}.jsonl"), parts[arm], examples)
    state.wait_for_everyone()


def _join(whole: Path, parts: Sequence[Path], examples: Sequence[Item]) -> None:
    """Put the records of all processes into one file, in the order of the examples."""
    header, _ = read_records(parts[0])
    records = {record.id: record for part in parts for record in read_records(part)[1]}
    write_records(whole, {**header, "examples": digest(examples)}, [records[example.id] for example in examples])
    for part in parts:
        part.unlink()

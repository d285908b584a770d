"""What one arm made of each example, as lines of a file from which an interrupted evaluation goes on.

The first line of a file says how its records came about; a file that came about otherwise is refused. Several processes
answer examples into one folder, which all of them see: each its batches, in a file of its own (`shared`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from offramp.runs.digests import fingerprint
from offramp.runs.resume import REMOVE, append_lines, locked, open_lines, read_lines, require_schema, write_lines

if TYPE_CHECKING:
    from offramp.core.adaptive_threshold import AdaptiveThreshold
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy

SCHEMA = "offramp/records/1"
Progress = Callable[..., None]
"""(done, total[, what is next])."""


class Item(Protocol):
    """What is answered: an `offramp.tasks.Example`, or a passage of a text. A dataclass of JSON values."""

    @property
    def id(self) -> str:
        """Its own."""
        ...


@dataclass(frozen=True)
class Record:
    """One example under one arm.

    Attributes:
        id: Of the example.
        group: Of the example: what examples share that are not independent of each other.
        arm: Name of the arm.
        text: The answer.
        tokens: Its token ids.
        exit_layers: Layer after which each token left, 1..L.
        scores: Metrics of this one answer, in [0, 1].
        agreement: Share of positions, up to the longer answer's length, with the token of the full model's answer.
            After a first difference the two continue different texts: a lower bound of how often the arm would have
            followed the full model.
        same: Whether it is the full model's answer, token for token.
        flops: FLOPs of all parts.
        bytes: Bytes read.
        seconds: Wall-clock time, preparation included.
        parts: FLOPs by part (`offramp.core.costs.PARTS`), the pass over a decoder-only model's prompt and the token
            read off it apart from them as "prefill"; they add up to `flops`. Of examples answered together, each bears
            an equal share of the costs.
        sums: Further quantities that add up over examples: for perplexity, see `offramp.evaluation.perplexity`.
        pieces: What each token adds to the text, perhaps nothing; together they are the text.
        confidences: Of the last test of each token, to four places; None where none was made.
        learnt: In the last record of a batch under an adaptive policy, what its threshold had learnt behind that batch;
            else empty, and left out of the file.
        prompt_seconds: Of `seconds`, those of preparation, encoder and the pass over the prompt. None: made by an
            earlier version.
        round: When the batch's round began in which the arms took turns at it, in seconds since 1970: only of arms with
            the same round can seconds be compared. None: made by an earlier version, one arm after the other.
    """

    id: str
    group: str
    arm: str
    text: str
    tokens: list[int]
    exit_layers: list[int]
    scores: dict[str, float]
    agreement: float
    same: bool
    flops: int
    bytes: int
    seconds: float
    parts: dict[str, int]
    sums: dict[str, float] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    confidences: list[float | None] = field(default_factory=list)
    learnt: dict[str, Any] = field(default_factory=dict)
    prompt_seconds: float | None = None
    round: float | None = None


# ---------------------------------------------------------------- the file


def header_of(
    lm: LanguageModel,
    task: Mapping[str, Any],
    examples: Sequence[Item],
    policy: ExitPolicy | None,
    settings: Mapping[str, Any],
    batch_size: int,
) -> dict[str, Any]:
    """How records come about, as JSON values: what must not change in the middle of a file."""
    return {
        "schema": SCHEMA,
        **conditions_of(lm, task, examples, settings, batch_size),
        "policy": None if policy is None else policy.to_dict(),
    }


def conditions_of(
    lm: LanguageModel, task: Mapping[str, Any], examples: Sequence[Item], settings: Mapping[str, Any], batch_size: int
) -> dict[str, Any]:
    """What the arms of an evaluation have in common, as JSON values."""
    return {
        "model": fingerprint(lm.model),
        "dtype": lm.number_format,
        "exits": None if lm.exits is None else fingerprint(lm.exits),
        "task": dict(task),
        "examples": digest(examples),
        "settings": dict(settings),
        "batch_size": batch_size,
    }


def digest(examples: Sequence[Item]) -> str:
    """SHA-256 of examples, in their order."""
    content: list[Any] = list(examples)
    return hashlib.sha256(json.dumps([asdict(example) for example in content]).encode()).hexdigest()


class RecordFile:
    """The records of one arm in a file, to which batches are appended.

    Batches are always the same, and an adaptive threshold goes on from what it had learnt behind the last of them, so
    nothing but times depends on where an earlier call was interrupted.

    Args:
        path: JSON Lines file; made if missing.
        header: How the records come about, as JSON values: the first line.
        examples: With ids of their own.
        batch_size: Examples answered together.
        learner: The adaptive threshold that the arm works with; what it knows by now counts for nothing. An unfinished
            file that does not say what was learnt, of an earlier version, is begun anew. None: nothing is learnt.

    Attributes:
        records: Of the finished batches.

    Raises:
        ValueError: No or repeated examples, a batch size below 1, or `path` holds other records.
    """

    def __init__(
        self, path: Path, header: Mapping[str, Any], examples: Sequence[Item], batch_size: int,
        learner: AdaptiveThreshold | None = None,
    ) -> None:  # fmt: skip
        if not examples:
            raise ValueError("there are no examples; give at least one")
        if len({example.id for example in examples}) < len(examples):
            raise ValueError("two examples have the same id; give each one of its own")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.path, self.learner = path, learner
        self.records = _open(path, header, examples, batch_size, learns=learner is not None)
        self.recall()

    def recall(self) -> None:
        """Let the threshold know what it knew behind the last batch here; another arm may have the same one."""
        if self.learner is not None:
            self.learner.reset()
            if self.records and self.records[-1].learnt:
                self.learner.recall(self.records[-1].learnt)

    def append(self, batch: Sequence[Record]) -> None:
        """Write the records of the next batch."""
        append_lines(self.path, map(_line, batch))
        self.records += batch


def read_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Header (empty if there is not even a first line) and records of a file; half a line at its end is left out."""
    lines = read_lines(path, "records")
    if not lines:
        return {}, []
    header, *rows = lines
    require_schema(path, header, SCHEMA, "records")
    return header, _records(path, rows)


def _records(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[Record]:
    try:
        return [Record(**row) for row in rows]
    except TypeError as error:
        raise ValueError(f"{path} does not hold records ({error}); {REMOVE}") from None


def write_records(path: Path, header: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Write a whole file at once: it appears complete, or stays what it was."""
    write_lines(path, [dict(header), *map(_line, records)])


def _line(record: Record) -> dict[str, Any]:
    """A record as JSON values."""
    values = asdict(record)
    return values if record.learnt else {name: value for name, value in values.items() if name != "learnt"}


def _open(
    path: Path, header: Mapping[str, Any], examples: Sequence[Item], batch_size: int, *, learns: bool
) -> list[Record]:
    """The records of finished batches; whatever an interruption left behind them is cut off."""

    def finished(rows: Sequence[Mapping[str, Any]]) -> int:
        done = len(rows)
        if done < len(examples):
            done -= done % batch_size
            done = 0 if learns and done and not rows[done - 1].get("learnt") else done
        if [row.get("id") for row in rows[:done]] != [example.id for example in examples[:done]]:
            raise ValueError(f"{path} holds records of other examples; {REMOVE}")
        return done

    return _records(path, open_lines(path, header, "records", finished))


Run = Callable[..., dict[str, list[Record]]]
"""(examples, paths={arm: …}) -> records by arm, those of its file, after what is missing has been made."""


def state_of(device_type: str) -> Any:
    """`accelerate`'s state of the processes; without `accelerate launch` or `torchrun`, of this one alone."""
    from accelerate import PartialState

    return PartialState(cpu=device_type == "cpu")


@contextlib.contextmanager
def locked_by_first(state: Any, folder: Path, busy: str) -> Iterator[None]:
    """A run folder for these processes alone; the first of them holds the lock (`offramp.runs.resume.locked`)."""
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

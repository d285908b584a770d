"""What one arm made of each example, as lines of a file from which an interrupted evaluation goes on.

An *arm* is a policy, a static exit or the full model. The first line of its file says how its records came about; a
file that came about otherwise is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offramp.costs import Costs
from offramp.exits import fingerprint
from offramp.metrics.text import METRICS
from offramp.training.data import differences

if TYPE_CHECKING:
    from offramp.language_model import LanguageModel
    from offramp.policy import ExitPolicy
    from offramp.tasks import Example, Task

SCHEMA = "offramp/records/1"
PREFILL = "prefill"
"""The part of `Record.parts` that the prompt's own pass takes out of the others; see there."""
Progress = Callable[..., None]
"""(done, total[, what is next])."""
Answer = Callable[[Sequence["Example"]], "list[Record]"]
"""What an arm makes of a batch of examples."""


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
        parts: FLOPs by part (`offramp.costs.PARTS`), the pass over a decoder-only model's prompt and the token read off
            it apart from them as "prefill"; they add up to `flops`. Of examples answered together, each bears an equal
            share of the costs.
        sums: Further quantities that add up over examples: for perplexity, see `offramp.evaluation.perplexity`.
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


def decode_records(
    lm: LanguageModel,
    task: Task,
    examples: Sequence[Example],
    arm: str,
    policy: ExitPolicy | None,
    path: Path,
    *,
    full: Mapping[str, Record] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Answer examples under one policy; every finished batch is appended to `path`, from which a repeated call goes on.

    Args:
        lm: The model.
        task: How to ask and how to judge.
        examples: With ids of their own.
        arm: What the records call the policy.
        policy: The exit policy; None: the full model.
        path: JSON Lines file of these records and no others.
        full: Records of the full model by example id, to compare with; needed unless `policy` is None.
        max_new_tokens: Longest answer; None: the task's.
        batch_size: Examples answered together.
        settings: Further options of `LanguageModel.stream`, as JSON values.
        progress: Called with the examples done and asked for.

    Returns:
        One record per example, in their order.

    Raises:
        ValueError: No or repeated examples, a prompt that does not fit the context, a policy that does not fit the
            model, no `full` record of an example, or `path` holds other records.
    """
    limit = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    options = {"max_new_tokens": limit, **(settings or {})}
    if policy is not None:
        policy.resolve(lm.num_layers, lm.vocabulary, lm.split.exit_layers)
        require_full(examples, full)

    def answer(batch: Sequence[Example]) -> list[Record]:
        tokens, layers, bills = _generate(lm, task.prompts(lm, batch), policy, options)
        texts = lm.decode(tokens)
        records = []
        for row, example in enumerate(batch):
            theirs = tokens[row] if policy is None or full is None else full[example.id].tokens
            scores = {name: METRICS[name](texts[row], example.references) for name in task.metrics}
            records.append(
                Record(
                    example.id,
                    example.group,
                    arm,
                    texts[row],
                    tokens[row],
                    layers[row],
                    scores,
                    agreement(tokens[row], theirs),
                    tokens[row] == theirs,
                    **bills[row],
                )  # fmt: skip
            )
        return records

    header = header_of(lm, task.name, examples, policy, {**options, "metrics": list(task.metrics)}, batch_size)
    return kept(path, header, examples, batch_size, answer, progress, arm)


def agreement(mine: Sequence[int], theirs: Sequence[int]) -> float:
    """Share of positions, up to the longer one's length, with equal tokens; 1 of two empty answers."""
    longest = max(len(mine), len(theirs))
    return sum(a == b for a, b in zip(mine, theirs, strict=False)) / longest if longest else 1.0


# ---------------------------------------------------------------- one batch


def _generate(
    lm: LanguageModel, prompts: Any, policy: ExitPolicy | None, options: Mapping[str, Any]
) -> tuple[list[list[int]], list[list[int]], list[dict[str, Any]]]:
    """Tokens, exit layers and costs of each row."""
    began = time.perf_counter()
    stream = lm.stream(prompts, policy=policy, **options)
    tokens: list[list[int]] = []
    layers: list[list[int]] = []
    first: dict[str, int] = {}
    for step in stream:
        if not tokens:
            tokens, layers = [[] for _ in step.token], [[] for _ in step.token]
            first = prefill_parts(stream.costs) if step.prefill else {}
        columns = zip(step.active.tolist(), step.token.tolist(), step.exit_layer.tolist(), strict=True)
        for row, (active, token, layer) in enumerate(columns):
            if active:
                tokens[row].append(token)
                layers[row].append(layer)
    if lm.split.device.type == "cuda":
        torch.cuda.synchronize()
    return tokens, layers, shares(stream.costs, first, time.perf_counter() - began, len(tokens))


def prefill_parts(costs: Costs) -> dict[str, int]:
    """FLOPs by part after the prompt's own pass; the encoder's are no part of it."""
    return {name: part.flops for name, part in costs.parts.items() if name != "encoder"}


def shares(costs: Costs, first: Mapping[str, int], seconds: float, rows: int) -> list[dict[str, Any]]:
    """What each of the rows that were answered together bears: `flops`, `bytes`, `seconds` and `parts` of a record.

    Args:
        costs: Of all rows.
        first: What of it `prefill_parts` found after the prompt; empty without a pass of its own.
        seconds: Wall-clock time.
        rows: How many there were.

    Returns:
        One per row; whole numbers that add up to the whole.
    """
    parts = {name: part.flops - first.get(name, 0) for name, part in costs.parts.items()}
    parts[PREFILL] = sum(first.values())
    split = {name: _divided(value, rows) for name, value in parts.items()}
    read = _divided(costs.bytes, rows)
    return [
        {
            "flops": sum(values[row] for values in split.values()),
            "bytes": read[row],
            "seconds": seconds / rows,
            "parts": {name: values[row] for name, values in split.items()},
        }
        for row in range(rows)
    ]


def _divided(whole: int, rows: int) -> list[int]:
    """Equal whole shares, the first ones larger by one where it does not come out even."""
    return [whole // rows + (row < whole % rows) for row in range(rows)]


# ---------------------------------------------------------------- the file


def header_of(
    lm: LanguageModel,
    task: str,
    examples: Sequence[Example],
    policy: ExitPolicy | None,
    settings: Mapping[str, Any],
    batch_size: int,
) -> dict[str, Any]:
    """How records come about, as JSON values: what must not change in the middle of a file."""
    content = [[e.id, e.group, e.source, e.question, list(e.references)] for e in examples]
    return {
        "schema": SCHEMA,
        "model": fingerprint(lm.model),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "exits": None if lm.exits is None else fingerprint(lm.exits),
        "task": task,
        "examples": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        "policy": None if policy is None else policy.to_dict(),
        "settings": dict(settings),
        "batch_size": batch_size,
    }


def require_full(examples: Sequence[Example], full: Mapping[str, Record] | None) -> None:
    """Raise a ValueError unless the full model answered all examples."""
    if missing := [example.id for example in examples if example.id not in (full or {})]:
        raise ValueError(
            f"the full model's records of {len(missing)} of {len(examples)} examples are missing (such as "
            f"{missing[0]!r}); make them first, with policy=None, and give them as `full`"
        )


def kept(
    path: Path,
    header: Mapping[str, Any],
    examples: Sequence[Example],
    batch_size: int,
    answer: Answer,
    progress: Progress | None = None,
    what: str = "",
) -> list[Record]:
    """The records of `path`, after those that are missing have been made and appended, batch by batch.

    Batches are always the same, so nothing depends on where an earlier call was interrupted.

    Args:
        path: JSON Lines file; made if missing.
        header: How the records come about, as JSON values: the first line.
        examples: With ids of their own.
        batch_size: Examples answered together.
        answer: Makes the records of a batch.
        progress: Called with the examples done and asked for.
        what: For `progress`.

    Returns:
        One record per example, in their order.

    Raises:
        ValueError: No or repeated examples, a batch size below 1, or `path` holds other records.
    """
    if not examples:
        raise ValueError("there are no examples; give at least one")
    if len({example.id for example in examples}) < len(examples):
        raise ValueError("two examples have the same id; give each one of its own")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    records = _open(path, json.loads(json.dumps(header)), examples, batch_size)
    for at in range(len(records), len(examples), batch_size):
        if progress is not None:
            progress(at, len(examples), what)
        new = answer(examples[at : at + batch_size])
        _append(path, [asdict(record) for record in new])
        records += new
    if progress is not None:
        progress(len(examples), len(examples), what)
    return records


def read_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The header and the records of a file; half a line at its end is left out.

    Returns:
        Header and records; an empty header if there is not even a first line.

    Raises:
        ValueError: The file does not hold records.
    """
    lines = path.read_bytes().split(b"\n")[:-1]  # behind the last line end: half a line
    if not lines:
        return {}, []
    try:
        header, *rows = [json.loads(line) for line in lines]
        if header.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {header.get('schema')!r}, not {SCHEMA!r}")
        return header, [Record(**row) for row in rows]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold records ({error}); remove it, or use another folder") from None


def write_records(path: Path, header: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Write a whole file at once: it appears complete, or stays what it was."""
    from offramp.files import replace_file

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"")
        _append(temporary, [dict(header), *(asdict(record) for record in records)])

    replace_file(path, write)


def _open(path: Path, header: dict[str, Any], examples: Sequence[Example], batch_size: int) -> list[Record]:
    """The records of finished batches; whatever an interruption left behind them is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    have, records = read_records(path) if path.exists() else ({}, [])
    if not have:
        path.write_bytes(b"")
        _append(path, [header])
        return []
    if differing := differences(have, header):
        raise ValueError(
            f"{path} holds records made otherwise ({'; '.join(differing)}); remove it, or use another folder"
        )
    done = len(records)
    done -= done % batch_size if done < len(examples) else 0
    if [record.id for record in records[:done]] != [example.id for example in examples[:done]]:
        raise ValueError(f"{path} holds records of other examples; remove it, or use another folder")
    lines = path.read_bytes().split(b"\n")
    os.truncate(path, sum(len(line) + 1 for line in lines[: done + 1]))
    return records[:done]


def _append(path: Path, values: Sequence[Mapping[str, Any]]) -> None:
    with path.open("ab") as file:
        text = "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())

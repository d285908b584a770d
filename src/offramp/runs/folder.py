"""What a training run writes, such that it can be killed at any moment and continued.

config.json             what was asked for; a run with other options is refused here, but for those that may change
                        behind a stop for NaN
metrics.jsonl           one line per step and per validation
checkpoint.safetensors  what is trained, and the optimiser; step, tokens and seconds stand in its header. One file,
                        replaced by rename, so that weights and step can never disagree
answers.jsonl           the model's own answers, if it was asked for some (see `offramp.training.answers`)
exits/                  the result
model/                  the model, if its own weights were trained
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.runs.bounded import parsed
from offramp.runs.resume import (
    append_lines,
    as_json,
    differences,
    locked,
    read_asked,
    read_lines,
    require_same,
    write_asked,
    write_lines,
)
from offramp.runs.tensor_files import not_finite_in, read_tensors, write_tensors

MAY_CHANGE = [f"config.{part}{name}" for part in ("", "training.") for name in ("learning_rate", "clip")]
"""Options that a run may go on with other values of, once NaN or infinity has stopped it."""


ANEW = "remove the run folder to train anew, or give another folder"


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


@dataclass(frozen=True)
class TrainState:
    """How far a run is: steps and trained positions so far, and the seconds and most bytes they took.

    The bytes are those of `offramp.runs.machine.peak`, of the process that writes; 0: unknown.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    memory: int = 0


class RunFolder:
    """The folder of a run, and whether this process `writes` there: one of several does; use `opened`."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.config, self.metrics = path / "config.json", path / "metrics.jsonl"
        self.checkpoint, self.exits, self.model = path / "checkpoint.safetensors", path / "exits", path / "model"

    def check(self, record: dict[str, Any], about: Mapping[str, Any] | None = None) -> list[str]:
        """Write what is asked for, or refuse another run; returned is what of `MAY_CHANGE` changed behind stops."""
        record = as_json(record)
        if not self.writes:
            return []
        if not self.config.exists():
            write_asked(self.config, record, about=dict(about or {}))
            return []
        have, beside = read_asked(self.config, ANEW, "about", "stopped", "changed")
        stopped = beside.pop("stopped", None)
        differing = differences(have, record)
        if stopped is None or not all(each.partition(" was ")[0] in MAY_CHANGE for each in differing):
            require_same(have, record, self.path)
        changed = [*beside.pop("changed", []), *(f"{each}, after {stopped}" for each in differing)]
        if stopped is not None:  # once for each stop
            write_asked(self.config, record, **beside, **({"changed": changed} if changed else {}))
        return changed

    def begun(self) -> dict[str, Any] | None:
        """What the run that was begun here was asked for; None: none was."""
        return read_asked(self.config, ANEW)[0] if self.config.exists() else None

    def stopped(self, why: str) -> None:
        """Keep in config.json that NaN or infinity stopped the run, so that it may go on with other `MAY_CHANGE`."""
        if (config := self.begun()) is not None:
            write_asked(self.config, config, stopped=why)

    # ------------------------------------------------------------ metrics

    def log(self, row: dict[str, Any]) -> None:
        """Append a line of metrics."""
        append_lines(self.metrics, [row], durable=False)

    def rows(self) -> list[dict[str, Any]]:
        """All lines of metrics, as JSON objects; a ValueError if they were changed or are damaged."""
        return read_lines(self.metrics, "metrics", ANEW) if self.metrics.exists() else []

    def _rewind(self, step: int) -> None:
        """Drop metrics of steps that will be repeated."""
        if self.writes:
            write_lines(self.metrics, [row for row in self.rows() if row["step"] <= step])

    # ------------------------------------------------------------ checkpoint

    def save(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Replace the checkpoint; a TrainingError if a weight is not finite."""
        tensors = {f"weights.{name}": value for name, value in parameters.items()}
        if (strange := not_finite_in(tensors)) is not None:
            raise TrainingError(f"weights are not finite after step {state.step} ({strange}); {self.advice()}")
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        write_tensors(self.checkpoint, tensors, {"clock": json.dumps(asdict(state))})

    def restore(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> TrainState | None:
        """Continue from the checkpoint; None: there is none; a ValueError, nothing changed: it is damaged."""
        if not self.checkpoint.exists():
            self._rewind(-1)
            return None
        header, tensors = read_tensors(self.checkpoint, ANEW)
        learns = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        try:
            state = TrainState(**parsed(header["clock"], "its clock"))
            weights, states = _by_kind(tensors)
            _require_whole(weights, states, parameters, learns)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{self.checkpoint} is damaged or of another run: {error}; {ANEW}") from error
        for name, tensor in weights.items():
            place = parameters[name]
            if place.shape == tensor.shape:
                place.data.copy_(tensor)
            else:  # not a weight: what the model is trained on may grow and shrink
                place.data = tensor.to(place.device)
        kept = {at: {key: _laid_out(value, learns[at]) for key, value in own.items()} for at, own in states.items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})
        self._rewind(state.step)
        return state

    def advice(self) -> str:
        """What to do when training failed."""
        kept = f"the last good checkpoint is kept in {self.checkpoint}" if self.checkpoint.exists() else "nothing saved"
        return (
            f"{kept}; lower the learning rate or the clipping norm and start again in the same folder to go on from "
            "there, or change anything else, such as to a float32 model, in a new folder"
        )


@contextlib.contextmanager
def opened(path: Path, *, writes: bool = True) -> Iterator[RunFolder]:
    """The run folder, without half-written files, for this process alone; not `writes`: for one that reads along."""
    if not writes:
        yield RunFolder(path, writes=False)
        return
    with locked(path, "another process is training"):
        for leftover in path.glob(".*-*"):  # of a write that was killed
            if leftover.name.split("-")[0] in (".checkpoint", ".metrics", ".config"):
                leftover.unlink()
            elif leftover.name.startswith((".exits-", ".model-")):
                shutil.rmtree(leftover)
        run = RunFolder(path)
        try:
            yield run
        except TrainingError as error:
            run.stopped(str(error).partition(";")[0])
            raise


def _by_kind(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """Weights by name, and states of the optimiser by number and name."""
    weights: dict[str, Tensor] = {}
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "weights":
            weights[rest] = tensor
        elif kind == "optimizer":
            index, _, key = rest.partition(".")
            states.setdefault(int(index), {})[key] = tensor
        else:
            raise ValueError(f"it holds {name!r}")
    return weights, states


def _require_whole(
    weights: Mapping[str, Tensor],
    states: Mapping[int, Mapping[str, Tensor]],
    parameters: Mapping[str, Tensor],
    learns: list[Tensor],
) -> None:
    """Refuse a checkpoint without something that training goes on from."""
    if differing := sorted(set(weights) ^ set(parameters)):
        raise ValueError(f"it has no {differing[0]!r}" if differing[0] in parameters else f"it has {differing[0]!r}")
    learnt = {id(parameter) for parameter in learns}
    for name, tensor in weights.items():
        place = parameters[name]
        if id(place) in learnt and place.shape != tensor.shape:
            raise ValueError(f"its {name!r} has the shape {list(tensor.shape)}, not {list(place.shape)}")
    if states and not set(states) <= set(range(len(learns))):
        raise ValueError(f"it has states of {len(states)} parameters, and {len(learns)} are trained")
    names = {frozenset(state) for state in states.values()}
    if len(names) > 1:
        raise ValueError("the optimiser's states are not complete")
    for at, state in states.items():
        if any(value.ndim and value.shape != learns[at].shape for value in state.values()):
            raise ValueError(f"the optimiser's state of parameter {at} is of another shape")


def _laid_out(state: Tensor, like: Tensor) -> Tensor:
    """An optimiser's state in its parameter's memory format: fused optimisers go through both as they lie in memory."""
    return torch.empty_like(like, dtype=state.dtype).copy_(state) if state.shape == like.shape else state

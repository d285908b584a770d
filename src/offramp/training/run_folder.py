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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.files import differences, locked, replace_file, write_json, write_text

MAY_CHANGE = [f"config.{part}{name}" for part in ("", "training.") for name in ("learning_rate", "clip")]
"""Options that a run may go on with other values of, once NaN or infinity has stopped it."""


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


@dataclass(frozen=True)
class Clock:
    """How far a run is: steps and trained positions so far, and the seconds they took."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class RunFolder:
    """The folder of a run; use `opened`.

    Args:
        path: The folder.
        writes: Whether this process may write: one of several does.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.config, self.metrics = path / "config.json", path / "metrics.jsonl"
        self.checkpoint, self.exits, self.model = path / "checkpoint.safetensors", path / "exits", path / "model"

    def check(self, record: dict[str, Any], about: Mapping[str, Any] | None = None) -> list[str]:
        """Write what is asked for, or compare it with what was.

        Where NaN or infinity stopped the run, what is in `MAY_CHANGE` may be other than it was; config.json then keeps
        under "changed" what it was before.

        Args:
            record: What makes the run, as JSON values.
            about: What else is worth knowing of its first start; not compared.

        Returns:
            What was changed behind stops, in words.

        Raises:
            ValueError: The folder holds a run with other options.
        """
        record = json.loads(json.dumps(record))
        if not self.writes:
            return []
        if not self.config.exists():
            write_json(self.config, {**record, "about": dict(about or {})})
            return []
        have = json.loads(self.config.read_text(encoding="utf-8"))
        about, stopped, changed = have.pop("about", {}), have.pop("stopped", None), have.pop("changed", [])
        differing = differences(have, record)
        if any(stopped is None or not _may_change(each) for each in differing):
            raise ValueError(
                f"{self.path} holds another run: {'; '.join(differing)}; "
                "give the same options to continue it, or another folder"
            )
        if stopped is not None:  # once for each stop
            changed = [*changed, *(f"{each}, after {stopped}" for each in differing)]
            write_json(self.config, {**record, "about": about, **({"changed": changed} if changed else {})})
        return list(changed)

    def stopped(self, why: str) -> None:
        """Keep in config.json that NaN or infinity stopped the run, so that it may go on with other `MAY_CHANGE`."""
        if self.config.exists():
            write_json(self.config, {**json.loads(self.config.read_text(encoding="utf-8")), "stopped": why})

    # ------------------------------------------------------------ metrics

    def log(self, row: dict[str, Any]) -> None:
        """Append a line of metrics."""
        with self.metrics.open("ab") as file:
            file.write((json.dumps(row, allow_nan=False) + "\n").encode())

    def rows(self) -> list[dict[str, Any]]:
        """All lines of metrics."""
        lines = self.metrics.read_bytes().split(b"\n")[:-1] if self.metrics.exists() else []
        return [json.loads(line) for line in lines]

    def _rewind(self, step: int) -> None:
        """Drop metrics of steps that will be repeated."""
        if not self.writes:
            return
        kept = "".join(json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step)
        write_text(self.metrics, kept)

    # ------------------------------------------------------------ checkpoint

    def save(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, clock: Clock) -> None:
        """Replace the checkpoint.

        Raises:
            TrainingError: A weight is not finite.
        """
        tensors = {f"weights.{name}": value for name, value in parameters.items()}
        if strange := [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]:
            raise TrainingError(f"weights are not finite after step {clock.step} ({strange[0]}); {self.advice()}")
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        header = {"clock": json.dumps(asdict(clock))}
        replace_file(self.checkpoint, lambda temporary: save_file(tensors, temporary, metadata=header))

    def restore(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Clock | None:
        """Continue from the checkpoint; None if there is none."""
        if not self.checkpoint.exists():
            self._rewind(-1)
            return None
        learns = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states: dict[int, dict[str, Tensor]] = {}
        with safe_open(self.checkpoint, framework="pt") as file:
            clock = Clock(**json.loads(file.metadata()["clock"]))
            for name in file.keys():  # noqa: SIM118 - it is not a dict
                kind, rest = name.split(".", 1)
                if kind == "weights":
                    tensor, place = file.get_tensor(name), parameters[rest]
                    if place.shape == tensor.shape:
                        place.data.copy_(tensor)
                    else:  # not a weight: what the model is trained on may grow and shrink
                        place.data = tensor.to(place.device)
                else:
                    index, key = rest.split(".", 1)
                    states.setdefault(int(index), {})[key] = _laid_out(file.get_tensor(name), learns[int(index)])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        self._rewind(clock.step)
        return clock

    def advice(self) -> str:
        """What to do when training failed."""
        kept = f"the last good checkpoint is kept in {self.checkpoint}" if self.checkpoint.exists() else "nothing saved"
        return (
            f"{kept}; lower the learning rate or the clipping norm and start again in the same folder to go on from "
            "there, or change anything else, such as to a float32 model, in a new folder"
        )


@contextlib.contextmanager
def opened(path: Path, *, writes: bool = True) -> Iterator[RunFolder]:
    """The run folder, for this process alone, or not `writes`: for one that only reads along.

    Yields:
        The folder, rid of half-written files.

    Raises:
        ValueError: Another process trains there.
        TrainingError: Raised within; that NaN or infinity stopped the run is kept.
    """
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


def _may_change(difference: str) -> bool:
    """Whether a line of `differences` is about one of `MAY_CHANGE`."""
    return difference.partition(" was ")[0] in MAY_CHANGE


def _laid_out(state: Tensor, like: Tensor) -> Tensor:
    """An optimiser's state in its parameter's memory format: fused optimisers go through both as they lie in memory."""
    return torch.empty_like(like, dtype=state.dtype).copy_(state) if state.shape == like.shape else state

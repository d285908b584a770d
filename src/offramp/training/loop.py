"""The steps of a training run: order of the data, gradients, checkpoints and metrics, whatever the loss is.

The order of the data, dropout and all other draws are functions of (seed, step), so a run that was killed and continued
ends with the same bits as one that was not, on the same machine with the same number of threads.

Several processes (`accelerate launch`, on CPUs `torchrun --nproc-per-node N`) divide each step's windows and add up
their gradients. Every process holds the whole model: weights that are divided between processes (FSDP, DeepSpeed ZeRO)
are not supported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offramp.runs.folder import Clock, RunFolder, TrainingError
from offramp.training.config import TrainConfig
from offramp.training.data import Windows
from offramp.training.optimiser import adamw


@dataclass(frozen=True)
class Done:
    """What a step came to; its gradients are in the parameters.

    Attributes:
        loss: Over all processes, for the progress bar.
        positions: Trained, over all processes.
        row: For metrics.jsonl, as JSON values.
        strange: Where the loss is not finite; None: it is.
    """

    loss: float
    positions: int
    row: Mapping[str, Any]
    strange: str | None = None


class Work(Protocol):
    """What is trained."""

    def begin(self, clock: Clock) -> None:
        """Called once, where a run begins or is continued, with what was kept already restored."""
        ...

    def settle(self, clock: Clock) -> None:
        """Called once for every step done, 0 included, before what there is then is judged and saved."""
        ...

    def learn(self, step: int) -> Done:
        """Losses of a step, counted from 0; adds the gradients of what this process does of it."""
        ...

    def judge(self) -> Done:
        """The same on held-out data, without gradients."""
        ...


class Loop:
    """Everything it needs to go on stands in the run folder.

    Args:
        parameters: What is trained, by name.
        config: Schedule, clipping, and when to judge and save.
        run: The folder.
        workers: `accelerate.Accelerator`.
        device: Where the model is.
        columns: What the places in the metrics' lists are, for trackers.
        kept: Other tensors that belong to a checkpoint, by name; they are filled in place when a run goes on, whatever
            shape they had when it was saved.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: TrainConfig,
        run: RunFolder,
        workers: Any,
        device: torch.device,
        *,
        columns: Sequence[Any] = (),
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.parameters, self.config, self.run, self.workers = parameters, config, run, workers
        self.device, self.columns, self.kept = device, columns, {**parameters, **(kept or {})}
        self.optimizer = adamw(parameters.values(), config.rate(Clock()), config.weight_decay)

    def go(self, work: Work, progress: Callable[..., None] | None) -> Clock:
        """Train to the end."""
        config = self.config
        clock = self.run.restore(self.kept, self.optimizer)
        self.workers.wait_for_everyone()
        work.begin(clock or Clock())
        if clock is None:
            clock = Clock()
            work.settle(clock)
            self._validate(work, clock)
            self._save(clock)
        what = ""
        while config.done(clock) < config.total:
            if progress is not None:
                progress(config.done(clock), config.total, what)
            clock, loss = self._step(work, clock)
            work.settle(clock)
            what = f"loss {loss:.3f}"
            ended = config.done(clock) >= config.total
            if ended or (config.validate_every and clock.step % config.validate_every == 0):
                self._validate(work, clock)
            if ended or clock.step % config.save_every == 0:  # behind its metrics, which a continued run keeps
                self._save(clock)
        if progress is not None:
            progress(config.total, config.total, what)
        return clock

    def _save(self, clock: Clock) -> None:
        if self.workers.is_main_process:
            self.run.save(self.kept, self.optimizer, clock)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a line of metrics, and tell trackers."""
        if self.workers.is_main_process:
            self.run.log(dict(row))
        values = {f"{row['kind']}/{name}": value for name, value in row.items() if isinstance(value, float)}
        for name, value in row.items():
            if isinstance(value, list):
                named = zip(self.columns, value, strict=True)
                values |= {f"{row['kind']}/{name}_{column}": each for column, each in named if each is not None}
        self.workers.log(values, step=row["step"])

    def _step(self, work: Work, clock: Clock) -> tuple[Clock, float]:
        config, began = self.config, time.perf_counter()
        rate = config.rate(clock)
        self.optimizer.zero_grad()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(hash((config.seed, clock.step, self.workers.process_index)) & 0x7FFFFFFF)
            done = work.learn(clock.step)
        norm = self._reduce_gradients()
        self._check(clock.step + 1, done, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        seconds = time.perf_counter() - began
        after = Clock(clock.step + 1, clock.tokens + done.positions, clock.seconds + seconds)
        self.log({
            "kind": "step", "step": after.step, "tokens": after.tokens, **done.row, "learning_rate": rate,
            "gradient_norm": norm, "tokens_per_second": done.positions / seconds,
        })  # fmt: skip
        return after, done.loss

    def _validate(self, work: Work, clock: Clock) -> None:
        done = work.judge()
        self._check(clock.step, done, 0.0)
        self.log({
            "kind": "validation", "step": clock.step, "tokens": clock.tokens, "positions": done.positions, **done.row
        })  # fmt: skip

    def _check(self, step: int, done: Done, norm: float) -> None:
        where = done.strange or (None if math.isfinite(norm) else "the gradient")
        if where is not None:
            raise TrainingError(f"training met NaN or infinity at step {step} in {where}; {self.run.advice()}")

    # ------------------------------------------------------------ several processes

    def mine(self, windows: Windows, size: int | None) -> list[Windows]:
        """What this process does of some windows, `size` at a time; None: all at once."""
        own = torch.arange(self.workers.process_index, len(windows), self.workers.num_processes)
        return [windows[part] for part in torch.split(own, size or max(len(own), 1)) if len(part)]

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.workers.num_processes == 1:
            return values
        whole: Tensor = self.workers.reduce(values, "sum")
        return whole

    def _reduce_gradients(self) -> float:
        """Add up the gradients of all processes, clip them, and return their norm before."""
        parameters = list(self.parameters.values())
        if self.workers.num_processes > 1:
            used = self.summed(torch.tensor([float(p.grad is not None) for p in parameters], device=self.device))
            parameters = [
                p for p, count in zip(parameters, used.tolist(), strict=True) if count
            ]  # others learn nothing
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            whole = self.summed(torch.cat([part.flatten() for part in parts]))
            for parameter, part in zip(parameters, torch.split(whole, [p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter).to(parameter.dtype)  # summed in the widest format of all
        return float(nn.utils.clip_grad_norm_(parameters, self.config.clip or math.inf))

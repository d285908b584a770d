"""The steps of every training run: gradients, checkpoints and metrics, whatever learns and whatever the loss is.

The order of the data, dropout and all other draws are functions of (seed, step), so a run that was killed and continued
ends with the same bits as one that was not, on the same machine with the same number of threads.

Several processes (`accelerate launch`, on CPUs `torchrun --nproc-per-node N`) divide each step's rows and add up their
gradients. Every process holds the whole model: weights that are divided between processes (FSDP, DeepSpeed ZeRO)
are not supported.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offramp.runs.folder import RunFolder, TrainingError, TrainState
from offramp.runs.machine import forget_peak, memory_kept, peak
from offramp.training.schedule import Schedule


@dataclass(frozen=True)
class StepResult:
    """What a step came to; its gradients are in the parameters.

    Attributes:
        loss: Over all processes, for the progress bar.
        count: Rows or positions trained, over all processes.
        row: For metrics.jsonl, as JSON values.
        strange: Where the loss is not finite; None: it is.
    """

    loss: float
    count: int
    row: Mapping[str, Any]
    strange: str | None = None


class TrainTask(Protocol):
    """What is trained.

    Attributes:
        unit: What a `count` counts, in metrics.
    """

    unit: str

    def begin(self, state: TrainState) -> None:
        """Called once, where a run begins or is continued, with what was kept already restored."""
        ...

    def settle(self, state: TrainState) -> None:
        """Called once for every step done, 0 included, before what there is then is judged and saved."""
        ...

    def learn(self, step: int) -> StepResult:
        """Losses of a step, counted from 0; adds the gradients of what this process does of it."""
        ...

    def judge(self) -> StepResult:
        """The same on held-out data, without gradients."""
        ...


class Loop:
    """Everything it needs to go on stands in the run folder.

    Args:
        parameters: What is trained, by name.
        optimizer: Of these; the loop sets its learning rate.
        schedule: What is done when.
        run: The folder.
        device: Where the model is.
        workers: `accelerate.Accelerator`; None: this process is alone, and there are no trackers.
        columns: What the places in the metrics' lists are, for trackers.
        kept: Other tensors that belong to a checkpoint, by name; they are filled in place when a run goes on, whatever
            shape they had when it was saved.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        run: RunFolder,
        device: torch.device,
        workers: Any = None,
        *,
        columns: Sequence[Any] = (),
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.parameters, self.optimizer, self.schedule, self.run = parameters, optimizer, schedule, run
        self.device, self.workers, self.columns, self.kept = device, workers, columns, {**parameters, **(kept or {})}
        if isinstance(optimizer, MasterWeights):
            names = {id(parameter): name for name, parameter in parameters.items()}
            self.kept |= {f"master.{names[id(weight)]}": master for weight, master in optimizer.pairs}
        self.processes = 1 if workers is None else workers.num_processes
        self.writes = workers is None or workers.is_main_process

    def go(self, work: TrainTask, progress: Callable[..., None] | None) -> TrainState:
        """Train to the end."""
        with memory_kept(self.device):
            return self._go(work, progress)

    def _go(self, work: TrainTask, progress: Callable[..., None] | None) -> TrainState:
        schedule = self.schedule
        forget_peak(self.device)
        state = self.run.restore(self.kept, self.optimizer)
        if self.workers is not None:
            self.workers.wait_for_everyone()
        work.begin(state or TrainState())
        if state is None:
            state = TrainState()
            work.settle(state)
            self._validate(work, state)
            self._save(state)
        what = ""
        while not schedule.ended(state):
            if progress is not None:
                progress(schedule.done(state), schedule.total, what)
            state, loss = self._step(work, state)
            work.settle(state)
            what = f"loss {loss:.3f}"
            if schedule.validates(state):
                self._validate(work, state)
            if schedule.saves(state):  # behind its metrics, which a continued run keeps
                self._save(state)
        if progress is not None:
            progress(schedule.total, schedule.total, what)
        return state

    def _save(self, state: TrainState) -> None:
        if self.writes:
            self.run.save(self.kept, self.optimizer, state)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a line of metrics, and tell trackers."""
        if self.writes:
            self.run.log(dict(row))
        if self.workers is None:
            return
        values = {f"{row['kind']}/{name}": value for name, value in row.items() if isinstance(value, float)}
        for name, value in row.items():
            if isinstance(value, list):
                named = zip(self.columns, value, strict=True)
                values |= {f"{row['kind']}/{name}_{column}": each for column, each in named if each is not None}
        self.workers.log(values, step=row["step"])

    def _step(self, work: TrainTask, state: TrainState) -> tuple[TrainState, float]:
        began, rate = time.perf_counter(), self.schedule.rate(state)
        self.optimizer.zero_grad()
        with self.drawing(state.step):
            done = work.learn(state.step)
        norm = self._reduce_gradients()
        self._check(state.step + 1, done, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        seconds = time.perf_counter() - began
        memory = max(state.memory, peak(self.device) or 0)
        after = TrainState(state.step + 1, state.tokens + done.count, state.seconds + seconds, memory)
        if self.schedule.logs(after):
            self.log({
                "kind": "step", "step": after.step, work.unit: after.tokens, **done.row, "learning_rate": rate,
                "gradient_norm": norm, f"{work.unit}_per_second": done.count / seconds,
            })  # fmt: skip
        return after, done.loss

    @contextlib.contextmanager
    def drawing(self, number: int) -> Iterator[None]:
        """Within, all draws are a function of the seed, this number and the process; outer ones go on as if alone."""
        key = (self.schedule.seed, number, *(() if self.workers is None else (self.workers.process_index,)))
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(hash(key) & 0x7FFFFFFF)
            yield

    def _validate(self, work: TrainTask, state: TrainState) -> None:
        done = work.judge()
        self._check(state.step, done, 0.0)
        self.log({"kind": "validation", "step": state.step, work.unit: state.tokens, **done.row})

    def _check(self, step: int, done: StepResult, norm: float) -> None:
        where = done.strange or (None if math.isfinite(norm) else "the gradient")
        if where is not None:
            raise TrainingError(f"training met NaN or infinity at step {step} in {where}; {self.run.advice()}")

    # ------------------------------------------------------------ several processes

    def mine(self, count: int, size: int | None) -> list[Tensor]:
        """Places of what this process does of so many rows, `size` at a time; None: all at once."""
        first = 0 if self.workers is None else self.workers.process_index
        own = torch.arange(first, count, self.processes)
        return [part for part in torch.split(own, size or max(len(own), 1)) if len(part)]

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.processes == 1:
            return values
        whole: Tensor = self.workers.reduce(values, "sum")
        return whole

    def _reduce_gradients(self) -> float:
        """Add up the gradients of all processes, clip them, and return their norm before."""
        parameters = list(self.parameters.values())
        if self.processes > 1:
            used = self.summed(torch.tensor([float(p.grad is not None) for p in parameters], device=self.device))
            parameters = [
                p for p, count in zip(parameters, used.tolist(), strict=True) if count
            ]  # others learn nothing
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            whole = self.summed(torch.cat([part.flatten() for part in parts]))
            for parameter, part in zip(parameters, torch.split(whole, [p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter).to(parameter.dtype)  # summed in the widest format of all
        return float(nn.utils.clip_grad_norm_(parameters, self.schedule.clip or math.inf))


# ---------------------------------------------------------------- the optimiser

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
FUSED = ("cpu", "cuda")
"""Devices on which torch updates a weight and its two moments in one pass, not in ten. On a CPU this takes a third off
the step of a small encoder, half of whose weights are word embeddings."""


class MasterWeights(torch.optim.AdamW):
    """AdamW on float32 copies of weights in 16 bits, which are rounded anew from them after every step.

    A step is far below the spacing of such weights (of bfloat16 numbers one part in 256), so that most steps taken on
    them directly would be rounded off. The copies are the master weights of mixed precision training (Micikevicius et
    al. 2018, arXiv 1710.03740, section 3.1); its scaling of losses, for float16, is not done.

    Args:
        groups: Groups of parameters; those in float32 are their own masters.
        options: As for `torch.optim.AdamW`.

    Attributes:
        pairs: Each weight in 16 bits, and its master.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **options: Any) -> None:
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        super().__init__([{**group, "params": [*map(self._master, group["params"])]} for group in groups], **options)

    def _master(self, weight: nn.Parameter) -> nn.Parameter:
        if weight.dtype not in SIXTEEN_BITS:
            return weight
        self.pairs.append((weight, nn.Parameter(weight.detach().float())))
        return self.pairs[-1][1]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the weights' gradients."""
        super().zero_grad(set_to_none)
        for weight, _ in self.pairs:
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step by the weights' gradients."""
        for weight, master in self.pairs:
            master.grad = None if weight.grad is None else weight.grad.float()
        super().step()
        for weight, master in self.pairs:
            weight.copy_(master)
            master.grad = None


def adamw(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], rate: float, weight_decay: float = 0.01
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), with torch's betas and epsilon.

    Args:
        parameters: What learns, or groups of it with a weight decay of their own.
        rate: Learning rate.
        weight_decay: Of what has none of its own.

    Returns:
        The optimiser; of weights in 16 bits one with `MasterWeights`.
    """
    given: list[Any] = list(parameters)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    weights = [p for group in groups for p in group["params"]]
    kind = MasterWeights if any(p.dtype in SIXTEEN_BITS for p in weights) else torch.optim.AdamW
    return kind(groups, lr=rate, weight_decay=weight_decay, fused=all(p.device.type in FUSED for p in weights))

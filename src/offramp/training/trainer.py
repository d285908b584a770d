"""Training exit adapters: the backbone stays as it is, each exit learns to say what the last layer will say.

One pass of the frozen model gives the states at all exits and the last layer's logits; every exit's loss is then
computed from the state there alone. A lens per exit (Belrose et al. 2023, "Eliciting Latent Predictions with the Tuned
Lens"), trained by AdamW in float32. The data order is a function of the seed and the step, and nothing else is random
after the adapters' first values, so a run that was killed and continued ends with the same bits as one that was not, on
the same machine with the same number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.exits import Exits
from offramp.families import SplitModel
from offramp.training.data import Data, Windows, batch
from offramp.training.objectives import OBJECTIVES, SOFTENED, WEIGHTS, Tally, chunk_rows, tally
from offramp.training.run_folder import Clock, RunFolder, TrainingError, opened

if TYPE_CHECKING:
    from offramp.language_model import LanguageModel

SCHEMA = "offramp/train/1"
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, and how.

    The exits have separate parameters and Adam divides by the size of a gradient, so `weights` between them only
    matter where something is shared: in the norm that `clip` bounds.

    Attributes:
        layers: Exits; None: a default for the depth.
        rank: Of each adapter's matrix; None: full.
        objective: One of `OBJECTIVES`.
        temperature: Softens both sides of a divergence.
        weights: One of `WEIGHTS`.
        learning_rate: After the warm-up.
        weight_decay: Of AdamW, towards the untrained readout.
        steps: How many; or else
        tokens: stop at the first step that reaches so many trained positions.
        batch_size: Windows per step.
        warmup: Steps over which the learning rate rises.
        schedule: "cosine" (falling to 0 at the end) or "constant".
        clip: Largest norm of the gradient over all exits; None: any.
        seed: Of the order of the data and the adapters' first values.
        validate_every: Steps between judgements on the held-out windows; None: only before and after.
        save_every: Steps between checkpoints.

    Raises:
        ValueError: A value out of range.
    """

    layers: tuple[int, ...] | None = None
    rank: int | None = None
    objective: str = "forward-kl"
    temperature: float = 1.0
    weights: str = "uniform"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    steps: int | None = None
    tokens: int | None = None
    batch_size: int = 4
    warmup: int = 10
    schedule: str = "cosine"
    clip: float | None = 1.0
    seed: int = 0
    validate_every: int | None = None
    save_every: int = 50

    def __post_init__(self) -> None:
        for name, choices in (("objective", OBJECTIVES), ("weights", WEIGHTS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give steps or tokens, one of them, to say when training ends")
        for name in ("steps", "tokens", "batch_size", "validate_every", "save_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "temperature", "clip"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        if self.temperature != 1 and self.objective not in SOFTENED:
            raise ValueError(f"objective {self.objective!r} has no temperature; {' and '.join(SOFTENED)} have one")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ValueError("warmup and weight_decay must not be negative")

    def done(self, clock: Clock) -> int:
        """Steps or tokens done, whichever `total` counts."""
        return clock.tokens if self.steps is None else clock.step

    @property
    def total(self) -> int:
        """Steps or tokens to do."""
        total = self.tokens if self.steps is None else self.steps
        assert total is not None
        return total

    def rate(self, clock: Clock) -> float:
        """Learning rate of the step that comes next."""
        rise = min(1.0, (clock.step + 1) / self.warmup) if self.warmup else 1.0
        fall = (1 + math.cos(math.pi * self.done(clock) / self.total)) / 2 if self.schedule == "cosine" else 1.0
        return self.learning_rate * rise * fall


@dataclass(frozen=True)
class TrainResult:
    """What training did, one value per exit where there are several.

    Attributes:
        layers: The exits.
        agreement_before: Share of held-out positions at which the exit's most probable token is the last layer's,
            untrained.
        agreement_after: Likewise, trained.
        loss_before: Mean loss at those positions, in nats.
        loss_after: Likewise, trained.
        positions: Held-out positions.
        steps: Steps made, those before an interruption included.
        tokens: Positions trained on.
        seconds: Time the steps took.
        exits: Folder of the trained exits.
    """

    layers: tuple[int, ...]
    agreement_before: tuple[float, ...]
    agreement_after: tuple[float, ...]
    loss_before: tuple[float, ...]
    loss_after: tuple[float, ...]
    positions: int
    steps: int
    tokens: int
    seconds: float
    exits: Path

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"schema": SCHEMA, **asdict(self), "exits": str(self.exits)}

    def table(self) -> str:
        """A small table."""
        lines = ["exit after layer   agreement on held-out text   loss (nats)"]
        columns = (self.layers, self.agreement_before, self.agreement_after, self.loss_before, self.loss_after)
        for layer, old, new, worse, better in zip(*columns, strict=True):
            lines.append(f"{layer:16d}   {old:12.3f} -> {new:.3f}{worse:15.3f} -> {better:.3f}")
        rate = self.tokens / self.seconds if self.seconds else 0.0
        lines.append(
            f"{self.positions} held-out positions; {self.steps} steps on {self.tokens} positions, {rate:.0f} per second"
        )
        return "\n".join(lines)


def train(
    lm: LanguageModel,
    data: Data,
    config: TrainConfig,
    folder: Path,
    progress: Callable[..., None] | None = None,
) -> TrainResult:
    """Train the adapters of exits, or go on where an earlier call in the same folder was interrupted.

    Args:
        lm: The model; it is not changed.
        data: From `offramp.training.data.prepare`.
        config: What to do.
        folder: Where everything is written, see `offramp.training.run_folder`.
        progress: Called with the steps (or tokens) done and to do, and the loss.

    Returns:
        What was reached.

    Raises:
        ValueError: The folder holds a run with other options or data, or a layer is no possible exit.
        TrainingError: The loss is not finite.
    """
    exits = _fresh(lm, config)
    with opened(folder) as run, evaluating(lm.model):
        record = {
            "schema": SCHEMA,
            "model": {
                "name": lm.name, "fingerprint": exits.fingerprint, "dtype": str(lm.model.dtype).removeprefix("torch."),
            },
            "config": {**asdict(config), "layers": exits.layers},
            "data": {**data.settings, "train": data.train.digest(), "held_out": data.held_out.digest()},
        }  # fmt: skip
        run.check(record)
        optimizer = torch.optim.AdamW(
            exits.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )  # fmt: skip
        clock = _Trainer(lm.split, exits, optimizer, data, config, run).go(progress)
        exits.save(run.exits, settings=record)
        judged = [row for row in run.rows() if row["kind"] == "validation"]
    before, after = judged[0], judged[-1]
    return TrainResult(
        layers=exits.layers,
        agreement_before=tuple(before["agreement"]),
        agreement_after=tuple(after["agreement"]),
        loss_before=tuple(before["loss"]),
        loss_after=tuple(after["loss"]),
        positions=data.held_out.positions,
        steps=clock.step,
        tokens=clock.tokens,
        seconds=clock.seconds,
        exits=run.exits,
    )


def _fresh(lm: LanguageModel, config: TrainConfig) -> Exits:
    """Untrained adapters; their first values depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        exits = Exits.fresh(lm.split, config.layers, rank=config.rank)
    exits.model = lm.name
    return exits


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, in every part of the model; afterwards as it was.

    Yields:
        Nothing.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


@torch.no_grad()
def states_at(split: SplitModel, layers: Sequence[int], ids: Tensor, counted: Tensor) -> tuple[list[Tensor], Tensor]:
    """States from which counted tokens are predicted, and these tokens.

    Args:
        split: The model.
        layers: After which.
        ids: Token ids, [B, T]; padding only behind what is counted.
        counted: Tokens to be predicted, [B, T].

    Returns:
        One [N, D] per layer and one for layer L, and labels [N].
    """
    where = counted[:, 1:].to(split.device)
    ids = ids.to(split.device)
    state, depth, kept = split.start(ids[:, :-1]), 0, []
    for layer in (*layers, split.num_layers):
        state, depth = split.run(state, depth, layer), layer
        kept.append(state.hidden[where])
    return kept, ids[:, 1:][where]


class _Trainer:
    """The loop; everything it needs to go on stands in the run folder."""

    def __init__(
        self,
        split: SplitModel,
        exits: Exits,
        optimizer: torch.optim.Optimizer,
        data: Data,
        config: TrainConfig,
        run: RunFolder,
    ) -> None:
        self.split, self.exits, self.optimizer = split, exits, optimizer
        self.data, self.config, self.run = data, config, run
        self.parameters = list(exits.parameters())
        self.weights = WEIGHTS[config.weights](exits.layers)

    def go(self, progress: Callable[..., None] | None) -> Clock:
        """Train to the end."""
        config = self.config
        clock = self.run.restore(self.exits, self.optimizer)
        if clock is None:
            clock = Clock()
            self._validate(clock)
            self.run.save(self.exits, self.optimizer, clock)
        what = ""
        while config.done(clock) < config.total:
            if progress is not None:
                progress(config.done(clock), config.total, what)
            clock, loss = self._step(clock)
            what = f"loss {loss:.3f}"
            ended = config.done(clock) >= config.total
            if ended or (config.validate_every and clock.step % config.validate_every == 0):
                self._validate(clock)
            if ended or clock.step % config.save_every == 0:  # behind its metrics, which a continued run keeps
                self.run.save(self.exits, self.optimizer, clock)
        if progress is not None:
            progress(config.total, config.total, what)
        return clock

    def _step(self, clock: Clock) -> tuple[Clock, float]:
        config, began = self.config, time.perf_counter()
        rate = config.rate(clock)
        self.optimizer.zero_grad()
        ids, counted = batch(self.data.train, clock.step, config.batch_size, config.seed)
        result = _tally(self.split, self.exits, ids, counted, config, weights=self.weights, parameters=self.parameters)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, config.clip or math.inf))
        loss = sum(w * value for w, value in zip(self.weights, result.loss, strict=True))
        self._check(clock.step + 1, result, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        seconds = time.perf_counter() - began
        after = Clock(clock.step + 1, clock.tokens + result.positions, clock.seconds + seconds)
        self.run.log({
            "kind": "step", "step": after.step, "tokens": after.tokens, "loss": result.loss,
            "agreement": result.agreement, "learning_rate": rate, "gradient_norm": norm,
            "tokens_per_second": result.positions / seconds,
        })  # fmt: skip
        return after, loss

    def _check(self, step: int, result: Tally, norm: float) -> None:
        strange = [layer for layer, loss in zip(self.exits.layers, result.loss, strict=True) if not math.isfinite(loss)]
        if strange or not math.isfinite(norm):
            where = f"the exit after layer {strange[0]}" if strange else "the gradient"
            if len(strange) == len(self.exits.layers) > 1:
                where = "every exit, so perhaps in the model itself"
            raise TrainingError(f"training met NaN or infinity at step {step} in {where}; {self.run.advice()}")

    def _validate(self, clock: Clock) -> None:
        result = measure(self.split, self.exits, self.data.held_out, self.config)
        self._check(clock.step, result, 0.0)
        row = {"kind": "validation", "step": clock.step, "tokens": clock.tokens, "positions": result.positions}
        self.run.log({**row, "loss": result.loss, "agreement": result.agreement})


def measure(split: SplitModel, exits: Exits, windows: Windows, config: TrainConfig) -> Tally:
    """Losses and agreement with the last layer over all windows."""
    parts = [slice(at, at + config.batch_size) for at in range(0, len(windows), config.batch_size)]
    tallies = (_tally(split, exits, windows.ids[part], windows.counted[part], config) for part in parts)
    return functools.reduce(operator.add, tallies)


def _tally(
    split: SplitModel, exits: Exits, ids: Tensor, counted: Tensor, config: TrainConfig, **gradient: Any
) -> Tally:  # fmt: skip
    states, labels = states_at(split, exits.layers, ids, counted)
    return tally(
        exits, split.readout, states, labels, OBJECTIVES[config.objective],
        rows=chunk_rows(split.shape.vocabulary), temperature=config.temperature, **gradient,
    )  # fmt: skip

"""How a classifier is trained: the options, checked, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from offramp.training.schedule import FALLS, PRECISIONS, WEIGHTS, Schedule
from offramp.values import choice

OPTIMISERS = ("sgd", "adamw")


@dataclass(frozen=True)
class ClassifierTrainConfig:
    """How all exits of a classifier are trained jointly.

    The defaults are those of MSDNet (Huang et al. 2018, arXiv 1703.09844, section 5) but for the number of epochs, 300
    there. For a pretrained encoder: optimiser "adamw", schedule "linear", 3 epochs, batches of 32, clip 1.

    Attributes:
        epochs: Passes over the training rows.
        batch_size: Rows per step.
        optimiser: "sgd" with momentum, or "adamw".
        learning_rate: After the warm-up; None: 0.1 for SGD, 5e-5 for AdamW.
        momentum: Momentum of SGD.
        nesterov: Whether SGD's momentum is Nesterov's.
        weight_decay: Weight decay of all weights with "sgd", as published; with "adamw" of matrices and kernels only,
            not of biases and norms.
        schedule: "step" (divided by 10 at half and at three quarters of the way), "cosine" or "linear" (falling to 0),
            or "constant".
        warmup: Steps over which the learning rate rises.
        weights: Weights of the exits in the sum of losses: one of `offramp.training.schedule.WEIGHTS` over the exits
            counted 1..E, times E, so that "uniform" is a plain sum; or E numbers.
        label_smoothing: Share of the target spread over all classes.
        clip: Largest norm of the gradient; None: any.
        precision: "bf16": compute in bfloat16 under autocast, weights stay as they are; None: as loaded.
        seed: Seed of the order of the rows, augmentation and dropout. First values are the caller's: seed torch for
            them.
        validate_every: Epochs between judgements on the validation split (tune); the last epoch always is judged.
        save_every: Steps between checkpoints, besides those at the end of each epoch.
        log_every: Steps between lines of metrics, besides the last one of each epoch.

    Raises:
        ValueError: A value out of range.
    """

    epochs: int
    batch_size: int = 64
    optimiser: str = "sgd"
    learning_rate: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: str = "step"
    warmup: int = 0
    weights: str | tuple[float, ...] = "uniform"
    label_smoothing: float = 0.0
    clip: float | None = None
    precision: str | None = None
    seed: int = 0
    validate_every: int = 1
    save_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 0.1 if self.optimiser == "sgd" else 5e-5)
        choices: dict[str, Collection[str | None]] = {
            "optimiser": OPTIMISERS, "schedule": FALLS, "precision": PRECISIONS,
        }  # fmt: skip
        if isinstance(self.weights, str):
            choices["weights"] = WEIGHTS
        for name, allowed in choices.items():
            choice(name, getattr(self, name), allowed)
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in ("epochs", "batch_size", "validate_every", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "clip"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be above 0 and finite")
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is a kind of momentum, but momentum is 0; raise it, or leave nesterov out")
        if self.optimiser == "adamw" and (self.nesterov or self.momentum != ClassifierTrainConfig.momentum):
            raise ValueError("momentum and nesterov are of SGD; give optimiser 'sgd', or leave them out")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ValueError("warmup and weight_decay must not be negative")

    def exit_weights(self, exits: int) -> list[float]:
        """Weights of the losses of E exits; a ValueError for another number, a negative one, or zeros only."""
        if isinstance(self.weights, str):
            return [exits * weight for weight in WEIGHTS[self.weights](range(1, exits + 1))]
        if len(self.weights) != exits or min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf:
            raise ValueError(f"weights are {self.weights}; give {exits}, one per exit, none negative, not all 0")
        return list(self.weights)

    def run_schedule(self, per_epoch: int) -> Schedule:
        """What the loop goes by, in epochs of so many steps."""
        assert self.learning_rate is not None
        return Schedule(
            self.epochs * per_epoch, self.learning_rate, self.schedule, self.warmup, self.clip, self.seed,
            self.validate_every * per_epoch, self.save_every, self.log_every, per_epoch,
        )  # fmt: skip

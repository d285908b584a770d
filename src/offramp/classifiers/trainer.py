"""Training all exits of a classifier jointly, or a student with a loss of its own.

Steps and checkpoints are those of `offramp.training.loop`, where everything drawn is a function of (seed, step), the
order of the rows and augmentation, too. One process trains.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.classifiers.batches import Batch, Rows, batch, by_length, order
from offramp.classifiers.config import ClassifierTrainConfig
from offramp.families.backbone import autocast
from offramp.runs.digests import fingerprint
from offramp.runs.folder import RunFolder, TrainState, opened
from offramp.runs.machine import describe
from offramp.runs.results import Result
from offramp.runs.tables import markdown
from offramp.tasks.labelled import require_apart
from offramp.training.loop import Loop, StepResult, adamw

SCHEMA = "offramp/train-classifier/1"

# ---------------------------------------------------------------- what exits are trained for

Objective = Callable[[Any, Batch], Tensor | tuple[Tensor, Mapping[str, Tensor]]]
"""What a classifier's forward gave, and the batch -> the loss of the step, and terms of it to be logged by name.

One that is a module is trained too where it has parameters (projectors, say), and its buffers are kept in checkpoints:
what changes between steps, such as weights of rows, must be a buffer."""
AfterEpoch = Callable[[int, nn.Module], None]
"""Epoch (counted from 0) that ended, and the classifier, which it must leave as it was -> changes the objective."""


def logits_of(outputs: Sequence[Any]) -> list[Tensor]:
    """The logits [B, C] of each exit, in float32, of what a classifier's forward gave."""
    return [(output if isinstance(output, Tensor) else output.logits).float() for output in outputs]


def joint_cross_entropy(weights: Sequence[float], label_smoothing: float = 0.0) -> Objective:
    """Σ_e w_e · mean over rows of the cross-entropy at exit e, in nats (MSDNet, arXiv 1703.09844, section 4)."""

    def objective(outputs: Any, batch: Batch) -> Tensor:
        losses = [F.cross_entropy(z, batch.labels, label_smoothing=label_smoothing) for z in logits_of(outputs)]
        return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()

    return objective


@torch.no_grad()
def judged(outputs: Any, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies, and rows that are right, at each exit: [2, E], float64."""
    found = []
    for z in logits_of(outputs):
        right = (z.argmax(-1) == labels).sum()
        found.append(torch.stack([F.cross_entropy(z, labels, reduction="sum").double(), right.double()]))
    return torch.stack(found, 1)


# ---------------------------------------------------------------- what came of it


@dataclass(frozen=True)
class ClassifierTrainResult(Result):
    """What training did, one value per exit where there are several.

    Attributes:
        accuracy_before: Share of validation rows that each exit classified right, before training.
        accuracy: Likewise, after.
        loss_before: Mean cross-entropy there, in nats, before training.
        loss: Likewise, after.
        validation_rows: How many rows that was.
        epochs: Passes made.
        steps: Steps made, those before an interruption included.
        rows: Rows trained on, repetitions counted.
        seconds: Time the steps took.
        truncated: Rows of the training split whose text was cut.
        model: Folder of the classifier; None: it cannot save itself.
    """

    schema = SCHEMA

    accuracy_before: tuple[float, ...]
    accuracy: tuple[float, ...]
    loss_before: tuple[float, ...]
    loss: tuple[float, ...]
    validation_rows: int
    epochs: int
    steps: int
    rows: int
    seconds: float
    truncated: int = 0
    model: Path | None = None

    def __repr__(self) -> str:
        changes = zip(self.accuracy_before, self.accuracy, strict=True)
        said = ", ".join(f"{before:.3f} -> {after:.3f}" for before, after in changes)
        return f"ClassifierTrainResult(accuracy by exit {said} on {self.validation_rows} validation rows)"

    def _rows(self) -> Iterable[Any]:
        """A row per exit: exit, accuracy_before, accuracy, loss_before, loss."""
        columns = ("accuracy_before", "accuracy", "loss_before", "loss")
        rows = enumerate(zip(*(getattr(self, name) for name in columns), strict=True), 1)
        return ({"exit": exit_, **dict(zip(columns, row, strict=True))} for exit_, row in rows)

    def table(self) -> str:
        """A small table."""
        columns = zip(self.accuracy_before, self.accuracy, self.loss_before, self.loss, strict=True)
        rows = [
            [str(place), f"{before:.3f} -> {after:.3f}", f"{worse:.3f} -> {better:.3f}"]
            for place, (before, after, worse, better) in enumerate(columns, 1)
        ]
        rate = self.rows / self.seconds if self.seconds else 0.0
        cut = f"; {self.truncated} texts were cut" if self.truncated else ""
        did = f"{self.steps} steps on {self.rows} rows, {rate:.0f} per second{cut}"
        return f"{markdown(['exit', 'accuracy', 'loss (nats)'], rows)}\n{self.validation_rows} validation rows; {did}"


def train_exits(
    model: nn.Module,
    train: Rows,
    validation: Rows,
    config: ClassifierTrainConfig,
    folder: Path,
    *,
    objective: Objective | None = None,
    after_epoch: AfterEpoch | None = None,
    sampling: Tensor | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[..., None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> ClassifierTrainResult:
    """Train a classifier, or go on where an earlier call in the same folder was interrupted.

    Args:
        model: Inputs of a batch -> one output per exit: logits [B, C], or anything with such under `logits`, such as
            `EarlyExitClassifier`. Its weights change, those that require gradients; it is left in
            evaluation mode.
        train: What it learns.
        validation: What it is judged by; of other rows.
        config: How.
        folder: Where everything is written, see `offramp.runs.folder`.
        objective: The loss; None: `joint_cross_entropy` by the config's weights.
        after_epoch: Called behind every epoch.
        sampling: How often each training row is drawn, in proportion, [N], with replacement; None: once per epoch.
        settings: Settings of the objective and whatever else makes this run, as JSON values: a run with others is
            refused.
        progress: Called with the steps done and to do, and the loss.
        about: What else config.json should say, as JSON values; nobody compares it.

    Returns:
        What was reached.

    Raises:
        ValueError: The folder holds a run with other options or data; the splits overlap; labels and classes do not
            fit, or there is only one class.
        TrainingError: The loss is not finite; the last good checkpoint is kept.
    """
    _check_data(train, validation, sampling)
    _check_labels(getattr(model, "labels", None), train.data.classes)
    record = {
        "schema": SCHEMA,
        "model": {"kind": type(model).__name__, "fingerprint": fingerprint(model)},
        "config": asdict(config),
        "data": {
            "classes": list(train.data.classes), "train": train.data.digest(), "validation": validation.data.digest(),
            "sampling": None if sampling is None else hashlib.sha256(sampling.double().numpy().tobytes()).hexdigest(),
            **train.settings,
        },
        "settings": dict(settings or {}),
    }  # fmt: skip
    with opened(folder) as run:
        work = _Exits(model, train, validation, config, run, objective, after_epoch, sampling)
        run.check(record, about={**(about or {}), **describe(work.device)})
        try:
            clock = work.loop.go(work, progress)
        finally:
            model.eval()
        saves = getattr(model, "save", None)
        if saves is not None:
            saves(run.model)
        judged = [row for row in run.rows() if row["kind"] == "validation"]
    before, after = judged[0], judged[-1]
    return ClassifierTrainResult(
        accuracy_before=tuple(before["accuracy"]),
        accuracy=tuple(after["accuracy"]),
        loss_before=tuple(before["loss"]),
        loss=tuple(after["loss"]),
        validation_rows=len(validation.data),
        epochs=config.epochs,
        steps=clock.step,
        rows=clock.tokens,
        seconds=clock.seconds,
        truncated=train.settings.get("truncated", 0),
        model=None if saves is None else run.model,
    )


def _check_data(train: Rows, validation: Rows, sampling: Tensor | None) -> None:
    require_apart(train=train.data, validation=validation.data)
    if train.data.classes != validation.data.classes:
        raise ValueError(
            f"the classes are {', '.join(train.data.classes)} in training and {', '.join(validation.data.classes)} in "
            "validation; both must have the same, in the same order"
        )
    if not len(validation.data):
        raise ValueError("the validation split is empty; hold out some rows")
    missing = [name for name, count in zip(train.data.classes, train.data.counts, strict=True) if not count]
    if len(train.data.classes) - len(missing) < 2:
        raise ValueError(f"{train.data.source or 'the training split'} has rows of one class only; two are needed")
    if missing:
        warnings.warn(f"no training row is of class {', '.join(missing)}", stacklevel=3)
    if sampling is not None:
        fine = sampling.shape == (len(train.data),) and bool(torch.isfinite(sampling).all() & (sampling >= 0).all())
        if not fine or not float(sampling.sum()) > 0:
            raise ValueError(f"sampling has shape {list(sampling.shape)}; give {len(train.data)} weights of at least 0")


def _check_labels(labels: Sequence[str] | None, classes: Sequence[str]) -> None:
    """Refuse a classifier that names the classes in another order than the data, as copies of SNLI do."""
    if labels is not None and set(labels) == set(classes) and list(labels) != list(classes):
        raise ValueError(
            f"the classifier's labels are {', '.join(labels)} and the data's classes {', '.join(classes)}; give both "
            "in one order"
        )


class _Exits:
    """The losses of all exits, or those of an objective, whose state the loop keeps, too."""

    unit = "rows"

    def __init__(
        self,
        model: nn.Module,
        train: Rows,
        validation: Rows,
        config: ClassifierTrainConfig,
        run: RunFolder,
        objective: Objective | None,
        after_epoch: AfterEpoch | None,
        sampling: Tensor | None,
    ) -> None:
        self.model, self.train, self.validation, self.config = model, train, validation, config
        self.objective, self.after_epoch, self.sampling = objective, after_epoch, sampling
        self.modules = {"model": model, **({"objective": objective} if isinstance(objective, nn.Module) else {})}
        kept = {f"{part}.{name}": t for part, module in self.modules.items() for name, t in _state(module)}
        learns = {name: t for name, t in kept.items() if isinstance(t, nn.Parameter) and t.requires_grad}
        self.batches, self.epoch, self.ended = self._order(0), 0, 0
        self.per_epoch, self.device = len(self.batches), next(model.parameters()).device
        schedule = config.run_schedule(self.per_epoch)
        self.loop = Loop(learns, _optimiser(list(learns.values()), config), schedule, run, self.device, kept=kept)

    def begin(self, clock: TrainState) -> None:
        """Nothing depends on how far the run is."""

    def settle(self, clock: TrainState) -> None:
        """Behind every epoch, let its caller change the objective."""
        self.ended, within = divmod(clock.step, self.per_epoch)
        if self.after_epoch is not None and clock.step and not within:
            self.model.eval()
            with self.loop.drawing(self.loop.schedule.total + self.ended):
                self.after_epoch(self.ended - 1, self.model)

    # ------------------------------------------------------------ a step

    def learn(self, step: int) -> StepResult:
        """Losses of a step, and their gradients."""
        epoch, at = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.batches, self.epoch = self._order(epoch), epoch
        for module in self.modules.values():
            module.train()
        part = self._batch(self.train, self.batches[at], torch.Generator().manual_seed(torch.initial_seed()), epoch)
        with autocast(self.device, self.config.precision):
            outputs = self.model(part.inputs)
        loss, terms = self._loss(outputs, part)
        loss.backward()  # type: ignore[no-untyped-call]
        value, count = float(loss.detach()), len(part.ids)
        losses, accuracy = (judged(outputs, part.labels) / count).tolist()
        row = {"epoch": epoch, "objective": value, "terms": terms, "loss": losses, "accuracy": accuracy}
        return StepResult(value, count, row, _strange(losses, [value, *terms.values()]))

    def _order(self, epoch: int) -> list[Tensor]:
        return order(self.train, self.config.batch_size, self.config.seed, epoch, self.sampling)

    def _loss(self, outputs: Any, part: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss, and its terms by name."""
        if self.objective is None:
            weights = self.config.exit_weights(len(outputs))
            self.objective = joint_cross_entropy(weights, self.config.label_smoothing)
        found = self.objective(outputs, part)
        loss, terms = found if isinstance(found, tuple) else (found, {})
        return loss, {name: float(value.detach()) for name, value in terms.items()}

    def _batch(self, rows: Rows, places: Tensor, generator: torch.Generator | None = None, epoch: int = 0) -> Batch:
        """A batch where the model is."""
        made = batch(rows, places, generator, epoch)
        inputs = made.inputs
        moved = (
            inputs.to(self.device) if isinstance(inputs, Tensor) else {k: v.to(self.device) for k, v in inputs.items()}
        )
        groups = None if made.groups is None else made.groups.to(self.device)
        return Batch(made.rows, made.ids, made.labels.to(self.device), moved, groups, epoch)

    # ------------------------------------------------------------ judging

    @torch.no_grad()
    def judge(self) -> StepResult:
        """Losses and accuracy over all validation rows, without dropout."""
        self.model.eval()
        sums, rows = [], self.validation
        for places in by_length(rows, self.config.batch_size):
            part = self._batch(rows, places)
            with autocast(self.device, self.config.precision):
                outputs = self.model(part.inputs)
            if (classes := logits_of(outputs)[0].shape[-1]) != len(rows.data.classes):
                raise ValueError(
                    f"the classifier has {classes} classes and the data {len(rows.data.classes)}; build it for as many"
                )
            sums.append(judged(outputs, part.labels))
        count = len(rows.data)
        losses, accuracy = (torch.stack(sums).sum(0) / count).tolist()
        row = {"epoch": self.ended, "rows": count, "loss": losses, "accuracy": accuracy}  # rows: those judged
        return StepResult(sum(losses), count, row, _strange(losses))


def _strange(losses: Sequence[float], objective: Sequence[float] = ()) -> str | None:
    """Which loss is not finite."""
    strange = [f"exit {place}" for place, value in enumerate(losses, 1) if not math.isfinite(value)]
    return next(iter([*strange, *(["the objective"] * (not all(map(math.isfinite, objective))))]), None)


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers, each tensor once."""
    lasting = module.state_dict().keys()
    return [(name, t) for name, t in (*module.named_parameters(), *module.named_buffers()) if name in lasting]


def _optimiser(parameters: Sequence[nn.Parameter], config: ClassifierTrainConfig) -> torch.optim.Optimizer:
    assert config.learning_rate is not None
    if config.optimiser == "sgd":
        return torch.optim.SGD(
            parameters, config.learning_rate, momentum=config.momentum, nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )  # fmt: skip
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return adamw(groups, config.learning_rate)

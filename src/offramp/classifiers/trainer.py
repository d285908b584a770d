"""The loop that trains all exits of a classifier jointly, or a student with a loss of its own.

The order of the rows, augmentation, dropout and all other draws are functions of (seed, step), so a run that was killed
and continued ends with the same bits as one that was not, on the same machine with the same number of threads. One
process trains; for several use the trainer of language models as a pattern.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.classifiers.batches import Batch, Rows, batch, by_length, order
from offramp.classifiers.config import ClassifierTrainConfig
from offramp.classifiers.objectives import AfterEpoch, Objective, joint_cross_entropy, judged, logits_of
from offramp.families.backbone import autocast
from offramp.runs.digests import fingerprint
from offramp.runs.folder import Clock, RunFolder, TrainingError, opened
from offramp.runs.machine import describe
from offramp.runs.results import Result
from offramp.runs.tables import markdown
from offramp.tasks.labelled import require_apart
from offramp.training.optimiser import adamw

SCHEMA = "offramp/train-classifier/1"


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


def train_classifier(
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
        settings: Of the objective and whatever else makes this run, as JSON values: a run with others is refused.
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
        trainer = _Trainer(model, train, validation, config, run, objective, after_epoch, sampling)
        run.check(record, about={**(about or {}), **describe(trainer.device)})
        try:
            clock = trainer.go(progress)
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


class _Trainer:
    """The loop; everything it needs to go on stands in the run folder."""

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
        self.model, self.train, self.validation, self.config, self.run = model, train, validation, config, run
        self.objective, self.after_epoch, self.sampling = objective, after_epoch, sampling
        self.device = next(model.parameters()).device
        self.modules = {"model": model, **({"objective": objective} if isinstance(objective, nn.Module) else {})}
        self.kept = {f"{part}.{name}": t for part, module in self.modules.items() for name, t in _state(module)}
        self.learns = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        self.optimiser = _optimiser(self.learns, config)
        self.batches, self.epoch = list[Tensor](), -1
        self.per_epoch = len(order(train, config.batch_size, config.seed, 0, sampling))
        self.total = config.epochs * self.per_epoch

    def go(self, progress: Callable[..., None] | None) -> Clock:
        """Train to the end."""
        config = self.config
        clock = self.run.restore(self.kept, self.optimiser)
        if clock is None:
            clock = Clock()
            self._validate(clock)
            self.run.save(self.kept, self.optimiser, clock)
        what = ""
        while clock.step < self.total:
            if progress is not None:
                progress(clock.step, self.total, what)
            clock, loss = self._step(clock)
            what = f"loss {loss:.3f}"
            ended = clock.step % self.per_epoch == 0
            if ended:
                self._end_epoch(clock)
            if ended or clock.step % config.save_every == 0:  # behind its metrics, which a continued run keeps
                self.run.save(self.kept, self.optimiser, clock)
        if progress is not None:
            progress(self.total, self.total, what)
        return clock

    def _end_epoch(self, clock: Clock) -> None:
        done = clock.step // self.per_epoch
        if done % self.config.validate_every == 0 or done == self.config.epochs:
            self._validate(clock)
        if self.after_epoch is not None:
            with self._drawing(self.total + done):
                self.after_epoch(done - 1, self.model)

    # ------------------------------------------------------------ a step

    def _step(self, clock: Clock) -> tuple[Clock, float]:
        config, began = self.config, time.perf_counter()
        rate = config.rate(clock.step, self.total)
        epoch, at = divmod(clock.step, self.per_epoch)
        if epoch != self.epoch:
            self.batches = order(self.train, config.batch_size, config.seed, epoch, self.sampling)
            self.epoch = epoch
        for module in self.modules.values():
            module.train()
        self.optimiser.zero_grad()
        with self._drawing(clock.step) as generator:
            part = self._batch(self.train, self.batches[at], generator, epoch)
            with autocast(self.device, self.config.precision):
                outputs = self.model(part.inputs)
            loss, terms = self._loss(outputs, part)
            loss.backward()  # type: ignore[no-untyped-call]
        value = float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_(self.learns, config.clip or math.inf))
        losses, accuracy = (judged(outputs, part.labels) / len(part.ids)).tolist()
        self._check(clock.step + 1, losses, [value, *terms.values()], norm)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        seconds = time.perf_counter() - began
        after = Clock(clock.step + 1, clock.tokens + len(part.ids), clock.seconds + seconds)
        if after.step % config.log_every == 0 or after.step % self.per_epoch == 0:
            self.run.log({
                "kind": "step", "step": after.step, "epoch": epoch, "rows": after.tokens, "objective": value,
                "terms": terms, "loss": losses, "accuracy": accuracy, "learning_rate": rate, "gradient_norm": norm,
                "rows_per_second": len(part.ids) / seconds,
            })  # fmt: skip
        return after, value

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

    @contextlib.contextmanager
    def _drawing(self, number: int) -> Any:
        """Within, all draws are a function of the seed and this number; the outer ones go on as if nothing was."""
        seed = hash((self.config.seed, number)) & 0x7FFFFFFF
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield torch.Generator().manual_seed(seed)

    # ------------------------------------------------------------ judging

    def _check(self, step: int, losses: Sequence[float], objective: Sequence[float] = (), norm: float = 0.0) -> None:
        strange = [f"exit {place}" for place, value in enumerate(losses, 1) if not math.isfinite(value)]
        strange += ["the objective"] * (not all(map(math.isfinite, objective)))
        strange += ["the gradient"] * (not math.isfinite(norm))
        if strange:
            raise TrainingError(f"training met NaN or infinity at step {step} in {strange[0]}; {self.run.advice()}")

    @torch.no_grad()
    def _validate(self, clock: Clock) -> None:
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
        losses, accuracy = (torch.stack(sums).sum(0) / len(rows.data)).tolist()
        self._check(clock.step, losses)
        self.run.log({
            "kind": "validation", "step": clock.step, "epoch": clock.step // self.per_epoch, "rows": len(rows.data),
            "loss": losses, "accuracy": accuracy,
        })  # fmt: skip


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

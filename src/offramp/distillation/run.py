"""One student, from data to result: train, look at groups after every epoch, and judge the test rows in the end.

config.json             what was asked for, and digests of the data and of a teacher that was given
training/               see `offramp.classifiers.trainer`; an interrupted run goes on from there
history/                validation after each epoch, and until the end weights of epochs that a rule would choose
model/                  the student at the epoch that `select` chose
predictions.safetensors logits of the test rows, of all exits at that epoch and of the last exit at the last epoch
weights.safetensors     weights of the training rows at the last epoch, where a method weights them and groups are known
result.json             everything the report needs; it is there when the run is finished. Its seconds include those of
                        teachers and first students that this run was the first to need
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.classifiers.batches import Rows
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.config import ClassifierTrainConfig
from offramp.classifiers.loading import load
from offramp.classifiers.projected import ProjectedConfig, ProjectedHead
from offramp.classifiers.saving import training_rows
from offramp.classifiers.trainer import train_exits
from offramp.distillation import objectives
from offramp.distillation import teacher as teachers
from offramp.distillation.config import APART, Run
from offramp.distillation.data import group_counts, load_set, minority_of
from offramp.distillation.instance_weights import InstanceWeights, new_weights, require_early
from offramp.distillation.judging import found_by_group, judged, keep_weights, outputs_of, record
from offramp.distillation.linear_probes import refitted, require_linear
from offramp.distillation.networks import States, begun_from, build, require_same_classes, rows_for
from offramp.distillation.parts import Parts, parts_of
from offramp.distillation.results import History
from offramp.metrics.group_effects import weight_diagnostics
from offramp.runs.codec import encode
from offramp.runs.digests import fingerprint, sealed
from offramp.runs.files import write_json
from offramp.tasks.labelled import row_hashes

RESULT = "result.json"

Need = Callable[[Run], Path]
"""Gives the folder of another run, finished."""


def train_run(run: Run, folder: Path, need: Need, device: str = "cpu") -> dict[str, Any]:
    """Train a student and judge it, or go on, in a folder of this process alone; what stands in result.json."""
    began = time.process_time(), time.perf_counter()
    data = load_set(run.study.data, run.seed)
    given = run.teacher is not None and run.teacher_run() is None
    unseen = teachers.require_unseen(run.teacher or "", data) if given else True
    if (begun := begun_from(run.study.student)) is not None:
        teachers.require_unseen(f"folder:{begun}", data)
    student = build(run.study.student, data.train.rows, run.seed + run.apart, device)
    if not run.joint:
        require_linear(student)  # this and the next before anything is trained, also teachers
    if run.method.weights is not None:
        require_early(student, run.method.weights)
    parts = parts_of(run, data, student)
    objective, sampling, student = _learning(run, parts, student, need)
    history = History(folder / "history")
    if run.method.refit:
        student = load(need(_required(run.first_run())) / "model", device=device)
        student = _refitted(student, parts, run.seed)
        record(history, 1, student, parts, {})
    else:
        _train(run, parts, student, objective, sampling, folder, history)
    student.training_rows = _learnt_from(run, parts, begun)
    result = judged(run, parts, student, history, folder) | {"teacher_unseen": unseen, "truncated": parts.truncated}
    result |= found_by_group(run, data, folder, result["exits"]["costs"], need)
    seconds = {"cpu": time.process_time() - began[0], "wall": time.perf_counter() - began[1]}
    found: dict[str, Any] = encode({**run.to_dict(), "key": run.key, **result, "seconds": seconds})
    write_json(folder / RESULT, sealed(found))
    (folder / "training" / "checkpoint.safetensors").unlink(missing_ok=True)  # only now is nothing to be lost
    history.forget_weights()
    return found


# ---------------------------------------------------------------- what it learns


def _learning(
    run: Run, parts: Parts, student: EarlyExitClassifier, need: Need
) -> tuple[nn.Module, Tensor | None, EarlyExitClassifier]:
    """The objective, how often rows are drawn, and the student, with another last exit where the method says so."""
    method, count = run.method, len(parts.train.data)
    exits = [1.0] * len(student.layers) if run.joint else None
    sampling: Tensor | None = None
    objective: nn.Module
    if method.loss == "group_dro":
        counts = group_counts(parts.data.train)
        objective = objectives.GroupDRO(counts, step=method.step, adjustment=method.adjustment)
    elif method.loss == "lff":
        biased = build(run.study.student, parts.data.train.rows, run.seed + run.apart + 2 * APART, parts.device)
        objective = objectives.LearningFromFailure(
            parts.train.data.labels, biased, power=method.power, precision=parts.precision
        )  # fmt: skip
    elif method.loss == "features":
        teacher, rows = _teacher(run, parts, need)
        table = features_of(teacher, rows, run.study.teacher_training.precision)
        student = with_teachers_classifier(student, teacher, table.shape[1:], run.seed + run.apart)
        objective = objectives.FeatureMatching(count, teachers.from_table(table))
    else:
        target = _targets(run, parts, need) if method.loss == "kd" else None
        objective = objectives.Distilled(
            count, target, fraction=method.fraction, temperature=method.temperature, exits=exits,
            weight_on="ce" if target is None else method.weights.weight_on if method.weights else "both",
        )  # fmt: skip
    if method.balanced:
        sampling = 1 / group_counts(parts.data.train)[parts.data.train.rows.groups].double()
    if method.errors is not None:
        factors = 1 + (method.errors.factor - 1) * _errors(run, parts, need).double()
        if method.errors.by == "weights":
            objective.weights.copy_(factors)  # type: ignore[operator]
        else:
            sampling = factors if sampling is None else sampling * factors
    return objective.to(parts.device), sampling, student


def _targets(run: Run, parts: Parts, need: Need) -> objectives.Targets:
    teacher = run.teacher or ""
    rows = parts.data.train.rows
    if teacher.startswith("logits:"):
        return teachers.from_table(teachers.load_logits(Path(teacher[7:]).expanduser(), rows))
    classifier, prepared = _teacher(run, parts, need)
    if run.study.augments:
        return teachers.live(classifier, parts.train, prepared, run.study.teacher_training.precision)
    folder = Path(teacher[7:]).expanduser() if teacher.startswith("folder:") else None
    key = f"{fingerprint(classifier)} {json.dumps(prepared.settings, sort_keys=True)} {rows.digest()}"
    if folder is None:
        run_of = run.teacher_run()
        assert run_of is not None
        kept = need(run_of) / "train_logits.safetensors"
        if kept.is_file():
            try:
                return teachers.from_table(teachers.load_logits(kept, rows, key))
            except ValueError:
                kept.unlink(missing_ok=True)  # of an older teacher: made again below
    logits = teachers.logits_of_all(classifier, prepared, run.study.teacher_training.precision)[-1]
    if folder is None:
        teachers.save_logits(kept, logits, rows.ids, rows.classes, key, rows.inputs)
    return teachers.from_table(logits)


def _teacher(run: Run, parts: Parts, need: Need) -> tuple[EarlyExitClassifier, Rows]:
    """The teacher, and the training rows as it takes them."""
    trained = run.teacher_run()
    folder = need(trained) / "model" if trained is not None else Path((run.teacher or "")[7:]).expanduser()
    classifier = load(folder, device=parts.device)
    require_same_classes(parts.data.classes, classifier.labels)
    return classifier, rows_for(classifier, parts.data.train.rows, longest=run.study.teacher.longest)


def _errors(run: Run, parts: Parts, need: Need) -> Tensor:
    """Rows that the first student gets wrong, [N], bool."""
    first = load(need(_required(run.first_run())) / "model", device=parts.device)
    answers = teachers.logits_of_all(first, parts.train, parts.precision)[-1].argmax(-1)
    wrong = answers != parts.train.data.labels
    if not bool(wrong.any()):
        assert run.method.errors is not None
        raise ValueError(
            f"{run.name}: after {run.method.errors.epochs} epochs the first student gets no training row wrong, so no "
            "row can count more; give it fewer epochs (errors.epochs), or more weight decay"
        )
    return wrong


def _learnt_from(run: Run, parts: Parts, begun: str | None) -> Tensor | None:
    """Hashes of the rows whose labels the student learns from, also as what it began as; None: unknown."""
    before = torch.empty(0, dtype=torch.int64) if begun is None else training_rows(Path(begun))
    splits = [parts.data.train, *([parts.kept[0]] if run.method.refit else [])]
    own = [row_hashes(split.rows, parts.data.name) for split in splits]
    return None if before is None else torch.cat([before, *own])


def _required(run: Run | None) -> Run:
    assert run is not None
    return run


def _refitted(student: EarlyExitClassifier, parts: Parts, seed: int) -> EarlyExitClassifier:
    """The last layer from validation rows."""
    select = parts.kept[0]
    if select.rows.groups is None:
        raise ValueError("dfr trains by groups of validation rows, which are unknown here or overlap")
    features = outputs_of(student, parts.select, parts.precision).features[-1]
    layer = refitted(features, select.rows.labels, select.rows.groups, student.num_classes, seed=seed)
    linear: Any = student.heads[-1].linear
    with torch.no_grad():
        linear.weight.copy_(layer.weight)
        linear.bias.copy_(layer.bias)
    return student


# ---------------------------------------------------------------- training


class _Unsaved(nn.Module):
    """The student for the trainer, which is not to save it: what is saved is chosen here."""

    def __init__(self, classifier: EarlyExitClassifier) -> None:
        super().__init__()
        self.classifier, self.labels = classifier, classifier.labels

    def forward(self, inputs: Any) -> Any:
        return self.classifier(inputs)


def _train(
    run: Run,
    parts: Parts,
    student: EarlyExitClassifier,
    objective: nn.Module,
    sampling: Tensor | None,
    folder: Path,
    history: History,
) -> None:
    epochs = run.study.training.epochs
    training = replace(_training(run), seed=run.seed + run.apart, validate_every=epochs)
    weights = _with_rates(run)
    minority = minority_of(parts.data.train)

    def after_epoch(epoch: int, _: nn.Module) -> None:
        more: dict[str, Any] = {}
        if weights is not None and weights.due(epoch, epochs):
            found, seen = new_weights(
                student, parts.train, weights, epoch=epoch, seed=run.seed, tune=parts.tune, minority=minority,
                precision=parts.precision, batch=training.batch_size,
            )  # fmt: skip
            objective.weights.copy_(found)  # type: ignore[operator]
            more["readout"] = None if seen is None else asdict(seen)
        if run.method.weights is not None or run.method.loss == "lff" or run.method.errors is not None:
            now: Any = objective.weights
            if run.method.errors is not None and run.method.errors.by == "sampling":
                assert sampling is not None
                now = sampling
            groups = parts.data.train.groups
            more["weights"] = asdict(weight_diagnostics(now.detach().cpu(), groups, minority))
            keep_weights(folder, now.detach().cpu(), groups, epoch + 1)
        if isinstance(objective, objectives.GroupDRO):
            more["q"] = objective.q.tolist()
        record(history, epoch + 1, student, parts, more)

    settings = {"run": run.digest}
    train_exits(
        _Unsaved(student), parts.train, parts.select, training, folder / "training", objective=objective,
        after_epoch=after_epoch, sampling=sampling, settings=settings,
    )  # fmt: skip


def _training(run: Run) -> ClassifierTrainConfig:
    """Of all students, with what the method has of its own."""
    own = {name: getattr(run.method, name) for name in ("learning_rate", "weight_decay")}
    return replace(run.study.training, **{name: value for name, value in own.items() if value is not None})


def _with_rates(run: Run) -> InstanceWeights | None:
    """The weights, with the readout's optimiser, learning rate and decay: the student's unless given."""
    weights, training = run.method.weights, _training(run)
    if weights is None:
        return None
    readout = weights.readout
    rate = training.learning_rate if readout.learning_rate is None else readout.learning_rate
    decay = training.weight_decay if readout.weight_decay is None else readout.weight_decay
    optimiser = readout.optimiser or training.optimiser
    return replace(
        weights, readout=replace(readout, optimiser=optimiser, learning_rate=rate, weight_decay=decay)
    )  # fmt: skip


# ---------------------------------------------------------------- a student that ends in its teacher's classifier


def features_of(teacher: EarlyExitClassifier, rows: Rows, precision: str | None = None) -> States:
    """What a student is to match: the teacher's last maps [N, D, H, W], of texts its pooled states [N, D]."""
    head: Any = teacher.heads[-1]
    return States(teacher, rows, teacher.backbone.num_layers, head.body, precision)


def with_teachers_classifier(
    student: EarlyExitClassifier, teacher: EarlyExitClassifier, shape: torch.Size, seed: int = 0
) -> EarlyExitClassifier:
    """Replace the student's last exit by a projector, drawn by the seed, and its teacher's classifier."""
    require_same_classes(student.labels, teacher.labels)
    last: Any = teacher.heads[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ProjectedConfig.of(last, tuple(shape))
        head = ProjectedHead(student.backbone, student.head_config.pooling, student.num_classes, config)
    head.take_over(last)
    student.heads[-1] = head
    return student

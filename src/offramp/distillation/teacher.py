"""What a teacher says about training rows: worked out once and kept on disk by row id, or anew for every batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.classifiers.batches import Batch, Rows, by_length
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.saving import training_rows
from offramp.distillation.networks import States, require_same_classes
from offramp.distillation.objectives import Targets
from offramp.families.backbone import autocast, evaluating
from offramp.families.finite import require_finite
from offramp.hub.messages import first_line
from offramp.runs.bounded import parsed
from offramp.runs.tensor_files import read_tensors, write_tensors
from offramp.tasks.group_sets import GroupedSet
from offramp.tasks.labelled import Inputs, Labelled, input_hashes, row_hashes

SCHEMA = "offramp/teacher-logits/1"


@torch.no_grad()
def logits_of_all(classifier: EarlyExitClassifier, rows: Rows, precision: str | None = None) -> Tensor:
    """Logits of all exits for all rows, without augmentation and dropout, [E, N, C], float32 on the CPU, all finite."""
    parts = by_length(rows)
    with evaluating(classifier, precision):
        found = [torch.stack([o.logits.float().cpu() for o in classifier(rows.inputs(places))]) for places in parts]
    logits = torch.cat(found, 1)[:, torch.cat(parts).argsort()]
    require_finite(logits, "the classifier", "in its logits")
    return logits


def from_table(table: Tensor | States) -> Targets:
    """Targets of rows by their place in the training split, of N in all; not for augmented inputs."""

    def targets(batch: Batch) -> Tensor:
        return table[batch.rows].to(batch.labels.device)

    return targets


def live(teacher: EarlyExitClassifier, student_rows: Rows, rows: Rows, precision: str | None = None) -> Targets:
    """The teacher's logits for the very images that the student sees; a ValueError if only one takes colours."""
    teacher = teacher.eval().requires_grad_(False)
    (mean, std), (its_mean, its_std) = (
        [torch.tensor(made.settings[name]).to(teacher.device)[:, None, None] for name in ("mean", "std")]
        for made in (student_rows, rows)
    )
    if mean.shape != its_mean.shape:
        raise ValueError(
            f"the student takes images with {len(mean)} channels and the teacher with {len(its_mean)}, so "
            "augmented ones are not for both; leave out pad and flip"
        )
    alike = torch.equal(mean, its_mean) and torch.equal(std, its_std)

    def targets(batch: Batch) -> Tensor:
        images: Any = batch.inputs
        if not alike:
            images = (images * std + mean - its_mean) / its_std
        with torch.no_grad(), autocast(teacher.device, precision):
            logits: Tensor = teacher(images)[-1].logits.float()
        require_finite(logits, "the teacher", "in its logits")
        return logits

    return targets


def require_unseen(source: str, data: GroupedSet) -> bool | None:
    """Refuse a saved classifier that was trained on test rows, as a teacher or as what a network begins as.

    Those that the set itself has among its training rows too are not its fault.

    Args:
        source: "folder:PATH", or "logits:FILE".
        data: With the splits of this seed.

    Returns:
        True; None: nobody knows what it was trained on.

    Raises:
        ValueError: It was trained on test rows.
    """
    kind, _, path = source.partition(":")
    rows = training_rows(Path(path).expanduser()) if kind == "folder" else None
    if rows is None:
        return None
    train, test = (row_hashes(split.rows, data.name) for split in (data.train, data.test))
    if seen := int((torch.isin(test, rows) & ~torch.isin(test, train)).sum()):
        raise ValueError(
            f"the classifier {path} was trained on {seen} of the {len(test)} test rows ({data.source}); give the seed "
            "it was trained with as --first-seed with --seeds 1, or a network, which is trained anew for every seed"
        )
    return True


def save_logits(
    path: Path, logits: Tensor, ids: Sequence[str], classes: Sequence[str], teacher: str, inputs: Inputs | None = None
) -> None:
    """Keep a teacher's logits [N, C] by ids of rows, in a file in the format safetensors.

    `teacher` is the fingerprint of the teacher and its preprocessing, or where the logits come from. Inputs are kept so
    that rows of the same ids that hold something else are refused; without, as for images in files, ids alone count.
    """
    header = {
        "schema": SCHEMA, "ids": json.dumps(list(ids)), "classes": json.dumps(list(classes)), "teacher": teacher
    }  # fmt: skip
    tensors = {"logits": logits.float()}
    if (held := None if inputs is None else input_hashes(inputs)) is not None:
        tensors["inputs"] = held
    write_tensors(path, tensors, header)


def load_logits(path: Path, rows: Labelled, teacher: str | None = None) -> Tensor:
    """A teacher's logits in the order of these rows.

    Args:
        path: What `save_logits` wrote.
        rows: The training rows.
        teacher: The fingerprint that must have been given; None: any.

    Returns:
        [N, C].

    Raises:
        ValueError: The file is missing, damaged, not finite or of another teacher, a row is missing or holds something
            else, or classes differ.
    """
    header, tensors = read_tensors(path, "save the logits again")
    if header.get("schema") != SCHEMA:
        raise ValueError(f"{path} has the schema {header.get('schema')!r}, not {SCHEMA!r}: no teacher's logits")
    try:
        ids, classes, made_by = (
            parsed(header["ids"], "its header"),
            tuple(parsed(header["classes"], "its header")),
            header["teacher"],
        )
        logits, held = tensors["logits"], tensors.get("inputs")
        if logits.shape != (len(ids), len(classes)) or (held is not None and len(held) != len(ids)):
            raise ValueError(f"logits of shape {list(logits.shape)} for {len(ids)} rows")
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); save the logits again") from error
    if teacher is not None and made_by != teacher:
        raise ValueError(f"{path} was made by another teacher or preprocessing; save the logits again")
    require_same_classes(rows.classes, classes)
    if not bool(torch.isfinite(logits).all()):
        row = ids[int((~torch.isfinite(logits)).any(-1).nonzero()[0])]
        raise ValueError(f"{path} holds logits of row {row!r} that are not finite; save the logits again")
    place = {id: at for at, id in enumerate(ids)}
    if missing := next((id for id in rows.ids if id not in place), None):
        raise ValueError(f"{path} says nothing of the training row {missing!r}; it has {len(place)} other rows")
    at = [place[id] for id in rows.ids]
    now = None if held is None else input_hashes(rows.inputs)
    if held is not None and now is not None and (others := (held[at] != now).nonzero().flatten().tolist()):
        raise ValueError(
            f"{path} is of other data: {len(others)} of {len(rows)} rows hold something else under the same id, such "
            f"as {rows.ids[others[0]]!r} (a set that is drawn anew for every seed?); save logits for these"
        )
    return logits[at]

"""`offramp.train_classifier`: a classifier with early exits, from files of labelled images or texts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from offramp.classifiers.architectures import build, rows_of, usual
from offramp.classifiers.batches import AUGMENTATIONS
from offramp.classifiers.config import ClassifierTrainConfig
from offramp.classifiers.splits import COLUMNS, TEXTS, DataConfig, TaskName, divide, layout_of, record
from offramp.classifiers.trainer import ClassifierTrainResult, train_exits
from offramp.families.backbone import HeadConfig
from offramp.hub.pretrained import named_device
from offramp.runs.progress import shown
from offramp.tasks.labelled import row_hashes
from offramp.tasks.labelled_text import Column
from offramp.values import ArgumentError, idle

log = logging.getLogger(__name__)
File = str | os.PathLike[str]


def run_folder(architecture: str, data: File) -> Path:
    """Where a training is written by default: named by its network and its file or folder of data, without endings."""
    return Path("runs") / f"train-{Path(architecture).name}-{Path(data).expanduser().resolve().name.split('.')[0]}"


def train_classifier(
    architecture: str,
    task: TaskName,
    data: File,
    *,
    test_data: File | None = None,
    layout: Literal["idx", "cifar10", "cifar100", "folder", "sst2", "snli", "snli-published", "columns"] | None = None,
    text_column: Column = "text",
    label_column: Column = "label",
    pair_column: Column | None = None,
    cluster_column: Column | None = None,
    classes: Sequence[str] = (),
    limit: int | None = None,
    image_size: int | None = None,
    longest: int | None = None,
    layers: Sequence[int] | None = None,
    pooling: Literal["mean", "first"] | None = None,
    hidden: int | None = None,
    dropout: float = 0.0,
    augment: Literal["crop-flip", "crop", "flip", "none"] = "crop-flip",
    config: ClassifierTrainConfig | None = None,
    device: str | None = None,
    about: Mapping[str, Any] | None = None,
    out: File | None = None,
    progress: Callable[..., None] | None = None,
) -> ClassifierTrainResult:
    """Train a classifier with early exits on images or texts, all exits jointly.

    The rows are divided by the seed: 60 % train the network; 10 % each tune temperatures, give thresholds for budgets,
    calibrate guarantees and test. The model remembers the division, and later steps keep to it. Started again in the
    same folder, an interrupted training goes on:

        result = offramp.train_classifier("msdnet-small", "image-classification", "fashion-mnist")
        offramp.evaluate_classifier(result.model, "fashion-mnist")

    How many rows each split has is logged, as "offramp.classifiers".

    Args:
        architecture: "msdnet-small", "msdnet-medium", "msdnet-large" or "resnet", trained from nothing; or a pretrained
            encoder by packaged name ("minilm"), local folder or hub id.
        task: Whether the rows are images or texts.
        data: The folder of IDX or CIFAR files, or of one folder per class; of texts a .tsv, .csv or .jsonl file. Or the
            name of a set, see `offramp.classifiers.splits.located`.
        test_data: A published test split in the same layout; None: that of `data`, or a tenth of it.
        layout: None: of images by the names of the files, of texts "columns".
        text_column: Column of the text: a name in the header, or a place from 0 without header.
        label_column: Likewise, of the label.
        pair_column: Likewise, of the second text of pairs; None: there is none.
        cluster_column: Likewise: rows that are the same there are never divided between splits.
        classes: Names of the classes in their order; empty: as the files say.
        limit: Use only so many rows, drawn at random; a published test split stays whole.
        image_size: Side that images of a folder are brought to, in pixels; None: they are all of one size.
        longest: Most tokens of a text; None: what the encoder takes.
        layers: Exits after these layers besides the last; None: all, of an encoder six at most.
        pooling: How states become a vector; None: "first" (CLS) for ViT, "mean" for texts.
        hidden: Width of a dense layer in each exit; None: there is none.
        dropout: Dropout of the exits' features, in [0, 1).
        augment: Augmentation of images, random crops and mirror images; "crop" for digits and letters.
        config: How it is trained, its `seed` also that of the division and of first weights; None: as is usual for the
            architecture, see `offramp.classifiers.architectures.usual`.
        device: Where to train; None: the first CUDA GPU if there is one, else the CPU.
        about: What else the run's config.json should say, as JSON values.
        out: Run folder; None: runs/train-ARCHITECTURE-DATA.
        progress: Called with the steps done and to do, and the loss.
            None: a bar in a terminal or a notebook, unless TQDM_DISABLE is set.

    Returns:
        What was reached, and where the classifier is.

    Raises:
        ArgumentError: There is no such augmentation, or arguments do not go together; a ValueError.
        ValueError: A file is damaged or of another layout, there are too few rows or classes, the network is not for
            such data, or the folder holds a run with other options or data.
        FileNotFoundError: A file is missing.
        ModelError: There is no such encoder, or it is damaged.
        TrainingError: The loss is not finite.
    """
    progress = shown(progress, "training")
    if augment not in AUGMENTATIONS:
        raise ArgumentError(f"`augment` {augment}: choose one of {', '.join(AUGMENTATIONS)}")
    config = config or ClassifierTrainConfig(**usual(architecture))
    reading = DataConfig(
        task, layout, text_column, label_column, pair_column, cluster_column, tuple(classes), limit, config.seed,
        image_size, longest,
    )  # fmt: skip
    _check_idle(reading, layout_of(task, layout, Path(data)), augment)
    splits = divide(reading, Path(data), None if test_data is None else Path(test_data))
    log.info("rows: %s", ", ".join(f"{name} {len(rows)}" for name, rows in splits.items()))
    model = build(
        architecture, splits["train"], layers=layers, head=HeadConfig(pooling, hidden, dropout), seed=config.seed
    ).to(named_device(device))
    config.exit_weights(len(model.layers))  # one for each, or no run begins
    model.trained_on = record(reading, splits)
    if task == TEXTS:  # images of another layout have other ids
        model.training_rows = row_hashes(splits["train"], "")
    train = rows_of(model, splits["train"], augmentation=AUGMENTATIONS[augment], longest=longest)
    folder = run_folder(architecture, data) if out is None else Path(out)
    return train_exits(
        model, train, rows_of(model, splits["tune"], longest=longest), config, folder, progress=progress,
        settings={"division": model.trained_on},
        about={**(about or {}), "architecture": architecture, "data": os.fspath(data)},
    )  # fmt: skip


def _check_idle(given: DataConfig, layout: str, augment: str) -> None:
    """Refuse what data of this task and layout has no use for."""
    named = {"classes": (given.classes, ())}
    columns = {
        "text_column": (given.text, "text"), "label_column": (given.label, "label"), "pair_column": (given.pair, None),
        "cluster_column": (given.cluster, None),
    }  # fmt: skip
    sized = {"image_size": (given.image_size, None)}
    if given.task == TEXTS:
        idle({**sized, "augment": (augment, "crop-flip")}, "of images; give such data")
        if layout != COLUMNS:
            idle({**columns, **named}, f"of `layout` {COLUMNS}, since {layout} has its own; give that")
        return
    idle({**columns, "longest": (given.longest, None)}, "of texts; give such data")
    if layout != "folder":
        idle(sized, f"of `layout` folder, since images of {layout} have a size; give that")
    if layout.startswith("cifar"):
        idle(named, f"of other layouts, since {layout} has its own; give one")

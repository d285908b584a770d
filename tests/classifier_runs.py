"""Small trainings of classifiers, in a module of its own so that other processes can start them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from offramp.classifiers.batches import Augmentation, ImagePreprocessing, ImageRows
from offramp.classifiers.config import ClassifierTrainConfig
from offramp.classifiers.trainer import logits_of, train_exits
from offramp.tasks.labelled import Labelled


class Output(NamedTuple):
    features: torch.Tensor
    logits: torch.Tensor


class TinyNet(nn.Module):
    """Three exits; with batch norm and dropout, whose state must survive an interruption."""

    def __init__(self, classes=3, channels=1):
        super().__init__()
        widths = (channels, 4, 6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.Dropout(0.1))
            for a, b in zip(widths, widths[1:], strict=False)
        )
        self.heads = nn.ModuleList(nn.Linear(width, classes) for width in widths[1:])

    def forward(self, x):
        found = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x)
            features = x.amax((2, 3))
            found.append(Output(features, head(features)))
        return found


def net(seed=0, **options):
    torch.manual_seed(seed)
    return TinyNet(**options)


def images(count, *, seed=0, prefix="r"):
    """Three classes: a lying bar, a standing bar, a spot; with noise."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 60, (count, 8, 8, 1))
    labels = np.arange(count) % 3
    for row, label in enumerate(labels):
        y, x = random.integers(0, 6, 2)
        part = [np.s_[y : y + 1, :], np.s_[:, x : x + 1], np.s_[y : y + 3, x : x + 3]][label]
        pixels[row][part] = 255
    ids = tuple(f"{prefix}{row}" for row in range(count))
    return Labelled(ids, pixels.astype(np.uint8), torch.from_numpy(labels), ("lying", "standing", "spot"))


def rows(count=60, *, augment=True, **options):
    data = images(count, **options)
    return ImageRows(data, ImagePreprocessing.of(data), Augmentation(1, flip=True) if augment else None)


class Weighted(nn.Module):
    """An objective with a state of its own: weights by row, changed after every epoch, and a projector that learns."""

    def __init__(self, count):
        super().__init__()
        self.register_buffer("weights", torch.ones(count))
        self.projector = nn.Linear(8, 3)

    def forward(self, outputs, batch):
        losses = nn.functional.cross_entropy(logits_of(outputs)[-1], batch.labels, reduction="none")
        helped = nn.functional.cross_entropy(self.projector(outputs[-1].features), batch.labels)
        return (self.weights[batch.rows] * losses).mean() + helped, {"helped": helped}

    def after_epoch(self, epoch, model):
        self.weights.copy_(1 + torch.rand(len(self.weights)) * (epoch + 1))


def run(folder, *, weighted=False, progress=None, **options):
    torch.set_num_threads(1)
    settings = {"epochs": 4, "batch_size": 8, "learning_rate": 0.05, "save_every": 3, "log_every": 1, **options}
    torch.manual_seed(1)
    objective = Weighted(60) if weighted else None
    model = net()
    result = train_exits(
        model, rows(), rows(24, seed=1, prefix="v"), ClassifierTrainConfig(**settings), Path(folder),
        objective=objective, after_epoch=objective.after_epoch if objective else None, progress=progress,
    )  # fmt: skip
    return model, objective, result

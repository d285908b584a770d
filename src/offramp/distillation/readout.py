"""The auxiliary readout: a small network that is taught, from scratch and again and again, what early layers know.

DEDIER (Tiwari et al., WACV 2024, arXiv 2310.18590). It learns from features that are computed in evaluation mode and
without gradients; so the student, its batch norms and its optimiser are what they were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.classifiers.batches import Rows
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.distillation.states import CHUNK, States
from offramp.families.heads import PooledBody
from offramp.training.loop import adamw


@dataclass(frozen=True)
class ReadoutConfig:
    """How the auxiliary readout is built and taught.

    Attributes:
        depth: d, after how many blocks of the student it reads.
        epochs: R, passes over the training rows; 1 in the reference code.
        batch_size: Rows per step.
        optimiser: "sgd" with momentum 0.9, as in the reference code, or "adamw"; None: the student's.
        learning_rate: None: the student's, as there.
        weight_decay: None: the student's, as there.
        width: Width of its inner layers; None: twice the channels that it reads (images, as there), or as many (texts,
            ours).
    """

    depth: int = 1
    epochs: int = 1
    batch_size: int = 64
    optimiser: str | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        for name in ("depth", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"the readout's {name} is {getattr(self, name)}; it counts from 1")
        if self.optimiser not in (None, "sgd", "adamw"):
            raise ValueError(f"the readout's optimiser is {self.optimiser!r}; choose sgd, adamw or None")


@dataclass(frozen=True)
class ReadoutOutputs:
    """What a readout says about rows.

    Attributes:
        epoch: Epoch of the student it was taught on.
        features: Inputs of its last layer, [N, D].
        logits: [N, C].
        labels: [N].
        ids: Ids of the rows.
    """

    epoch: int
    features: Tensor
    logits: Tensor
    labels: Tensor
    ids: tuple[str, ...]


class Readout(nn.Module):
    """Of maps [B, D, H, W] two convolutions and an average, of vectors [B, D] a layer with GELU; then a linear layer.

    The convolutions are 3 x 3 with batch norm and ReLU, without a skip, as in the reference code.

    Args:
        shape: Shape of a row's state, without B.
        classes: C.
        width: Width of the inner layers.
    """

    def __init__(self, shape: torch.Size, classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if len(shape) == 3:
            for ins in (shape[0], width):
                layers += [nn.Conv2d(ins, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        else:
            layers += [nn.Linear(shape[0], width), nn.GELU()]
        self.body = nn.Sequential(*layers)
        self.linear = nn.Linear(width, classes)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, width] and logits [B, C]."""
        features: Tensor = self.body(states)
        return features, self.linear(features)


def states_at(student: EarlyExitClassifier, rows: Rows, depth: int, precision: str | None = None) -> States:
    """What all rows are after `depth` blocks, without augmentation: maps [N, D, H, W]; of texts means [N, D]."""
    return States(student, rows, depth, PooledBody("mean"), precision)


def teach(states: States, labels: Tensor, classes: int, config: ReadoutConfig, seed: int) -> Readout:
    """A new readout, taught by plain unweighted cross-entropy.

    Args:
        states: States of the training rows, from `states_at`.
        labels: [N], on any device.
        classes: C.
        config: How; optimiser, learning rate and weight decay given.
        seed: Seed of its first weights and the order of rows.

    Returns:
        The readout, in evaluation mode, where the states are.
    """
    assert config.learning_rate is not None
    decay = config.weight_decay or 0.0
    labels = labels.to(states.device)
    with torch.random.fork_rng(devices=[states.device] if states.device.type == "cuda" else []):
        torch.manual_seed(seed)
        width = config.width or states.shape[1] * (2 if len(states.shape) == 4 else 1)
        readout = Readout(states.shape[1:], classes, width).to(states.device)
        optimiser: torch.optim.Optimizer
        if config.optimiser == "sgd":
            optimiser = torch.optim.SGD(readout.parameters(), config.learning_rate, momentum=0.9, weight_decay=decay)
        else:
            optimiser = adamw(readout.parameters(), config.learning_rate, decay)
        with torch.enable_grad():
            for _ in range(config.epochs):
                for rows in torch.split(torch.randperm(len(states)), config.batch_size):
                    if len(rows) < 2:  # batch norm cannot do with one
                        continue
                    optimiser.zero_grad()
                    F.cross_entropy(readout(states[rows])[1], labels[rows]).backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
    return readout.eval()


@torch.no_grad()
def read(readout: Readout, states: States, rows: Rows, epoch: int) -> ReadoutOutputs:
    """What it says about rows, on the CPU."""
    found = [readout(states[places]) for places in torch.split(torch.arange(len(states)), CHUNK)]
    features, logits = (torch.cat([part.cpu() for part in parts]) for parts in zip(*found, strict=True))
    return ReadoutOutputs(epoch, features, logits, rows.data.labels, rows.data.ids)

"""The auxiliary readout: a small network that is taught, from scratch and again and again, what early layers know.

DEDIER (Tiwari et al., WACV 2024, arXiv 2310.18590). It learns from features that are computed in evaluation mode and
without gradients; so the student, its batch norms and its optimiser are what they were. Of a language model it is what
the student would say after an early layer, through its own head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.classifiers.batches import Rows
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.core.adapters import Lens
from offramp.distillation.networks import CHUNK, States
from offramp.families import SplitModel
from offramp.families.backbone import PooledBody
from offramp.training.data import Windows
from offramp.training.loop import adamw
from offramp.training.objectives import OBJECTIVES, Teacher
from offramp.values import choice


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
    """A new readout, taught by plain unweighted cross-entropy on what `states_at` gave; its rates are given."""
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


# ---------------------------------------------------------------- of the tokens of a language model


READOUTS = ("head", "lens")
FITS = ("labels", "forward-kl", "teacher-argmax")


@dataclass(frozen=True)
class TokenReadoutConfig:
    """An early readout.

    Attributes:
        layer: d; None: a sixth of the depth, and at least 1 (1 of 6 layers, 2 of 12, as DEDIER's texts have it).
        kind: "head": the final norm and the head, through the lens of the student's attached exits if one is there.
            "lens": a new h + W h + b in front of them, taught each time on states that are kept for it.
        fit: What a lens is taught: "labels", plain cross-entropy to the target token; "forward-kl", the teacher's
            distribution; "teacher-argmax", its choice. Never weighted.
        rank: Rank of W; None: full. Keep it small: a readout without errors leaves nothing to weight.
        tokens: Most that states are kept of; those of windows drawn anew each time.
        epochs: R, passes over them.
        batch_size: Tokens per step.
        learning_rate: Learning rate of AdamW.

    Raises:
        ValueError: A value out of range.
    """

    layer: int | None = None
    kind: str = "head"
    fit: str = "labels"
    rank: int | None = 16
    tokens: int = 1 << 15
    epochs: int = 1
    batch_size: int = 256
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name, allowed in (("kind", READOUTS), ("fit", FITS)):
            choice(f"{name} of the readout", getattr(self, name), allowed)
        for name in ("layer", "rank", "tokens", "epochs", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} of the readout is {getattr(self, name)}; it counts from 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate of the readout is {self.learning_rate}; it must be above 0")

    def at(self, split: SplitModel) -> int:
        """The layer d in a student; a ValueError if it is not early."""
        layer = max(1, split.num_layers // 6) if self.layer is None else self.layer
        if layer >= split.num_layers:
            raise ValueError(
                f"the readout is after layer {layer} of the student's {split.num_layers}, which is not early; choose "
                f"one of 1..{split.num_layers - 1}"
            )
        return layer


@dataclass(frozen=True)
class TokenReadout:
    """A readout of one student as it is.

    Attributes:
        split: The student.
        layer: d.
        lens: A taught one; None: what is attached, if anything is.
    """

    split: SplitModel
    layer: int
    lens: Lens | None = None

    def inputs(self, hidden: Tensor) -> Tensor:
        """What the head multiplies, of states after layer d: [n, D] -> [n, D]."""
        if self.lens is None:
            return self.split.readout_input(hidden, self.layer)
        return self.split.readout_input(self.lens(hidden.float()).to(hidden.dtype))

    def logits(self, inputs: Tensor) -> Tensor:
        """Float32 logits of readout inputs: [n, D] -> [n, V]."""
        return self.split.project(inputs).float()


@torch.no_grad()
def early_states(split: SplitModel, windows: Windows, layer: int) -> Tensor:
    """States [M, D] after a layer from which the M counted tokens are predicted, by a pass that stops there."""
    state = split.run(split.start(windows.ids[:, :-1].to(split.device)), 0, layer)
    return state.hidden[windows.counted[:, 1:].to(split.device)]


@dataclass(frozen=True)
class LensData:
    """What a lens is taught on.

    Attributes:
        states: After layer d, [n, D].
        targets: Tokens, [n].
        guides: Readout inputs of the teacher, [n, D_t]; empty where its distribution is not needed.
    """

    states: Tensor
    targets: Tensor
    guides: Tensor


def taught(
    split: SplitModel, teacher: SplitModel, kept: LensData, config: TokenReadoutConfig, seed: int
) -> TokenReadout:
    """A lens, drawn by the seed and taught on kept states; gradients go nowhere else."""
    layer, device = config.at(split), kept.states.device
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        lens = Lens(split.shape.width, config.rank).to(device)
        readout, learns = TokenReadout(split, layer, lens), list(lens.parameters())
        optimizer = adamw(learns, config.learning_rate)
        for _ in range(config.epochs):
            for rows in torch.split(torch.randperm(len(kept.states)), config.batch_size):
                logits, guide = readout.logits(readout.inputs(kept.states[rows])), None
                if config.fit == "forward-kl":
                    with torch.no_grad():
                        guide = Teacher(teacher.project(kept.guides[rows]).float().to(device))
                loss = OBJECTIVES["labels" if guide is None else config.fit](logits, guide, kept.targets[rows]).mean()
                for parameter, gradient in zip(learns, torch.autograd.grad(loss, learns), strict=True):
                    parameter.grad = gradient
                optimizer.step()
    lens.requires_grad_(False)
    return readout

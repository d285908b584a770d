"""A readout of a student's early states: what it would say after layer d. Nothing here changes the student."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.core.adapters import Lens
from offramp.families import SplitModel
from offramp.training.data import Windows
from offramp.training.loop import adamw
from offramp.training.objectives import OBJECTIVES, Teacher
from offramp.values import listed

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
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} of the readout is {value!r}; choose one of {listed(value, allowed)}")
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
    """A lens, new and then taught on kept states; gradients go nowhere else.

    Args:
        split: The student.
        teacher: Its teacher.
        kept: States and targets.
        config: How.
        seed: Seed of first values and of the order of tokens.

    Returns:
        The readout.
    """
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

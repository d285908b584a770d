"""A last exit that is another classifier's, behind a projector that takes the states to that one's shape.

SimKD (Chen et al. 2022, arXiv 2203.14001) and DeTT. The projector is part of the deployed model, so costs count it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from offramp.classifiers.convolutional import ConvBody, PlacesBody
from offramp.families.backbone import Activations, Backbone, ExitHead, ExitOutput, PooledBody


@dataclass(frozen=True)
class ProjectedConfig:
    """The shape of such an exit.

    Attributes:
        shape: What the other exit reads of a row: maps (D, H, W), or a pooled vector (D,).
        width: Length of what its body makes of that.
        hidden: Width of its dense layer; None: it has none.
        places: Fields along each side that its body averages over; None: another body.
        channels: Into and out of the convolutions of its body; None: another body.
        factor: By which the projector's bottleneck is narrower than D.
    """

    shape: tuple[int, ...]
    width: int
    hidden: int | None = None
    places: int | None = None
    channels: tuple[int, int] | None = None
    factor: int = 2

    @classmethod
    def of(cls, exit_: ExitHead, shape: tuple[int, ...], factor: int = 2) -> ProjectedConfig:
        """Of an exit that reads this shape, to take it over; a ValueError if its body cannot be built again."""
        dense = [part for part in exit_.dense if isinstance(part, nn.Linear)]
        width, hidden = (dense[0].in_features, dense[0].out_features) if dense else (exit_.width, None)
        found: dict[str, Any] = {"shape": tuple(shape), "width": width, "hidden": hidden, "factor": factor}
        if len(shape) == 1 or isinstance(exit_.body, PooledBody):
            return cls(**found)
        if isinstance(exit_.body, PlacesBody):
            return cls(**found, places=exit_.body.places)
        if isinstance(exit_.body, ConvBody):
            return cls(**found, channels=exit_.body.channels)
        raise ValueError(f"the teacher's last exit has a {type(exit_.body).__name__}, which cannot be taken over")

    def body(self) -> nn.Module:
        """From activations to [B, width]; a pooled vector stays what it is."""
        if len(self.shape) == 1:
            return nn.Identity()
        if self.channels is not None:
            return ConvBody(*self.channels)
        return PooledBody("mean") if self.places is None else PlacesBody(self.places)


class Projected(ExitOutput):
    """What the exit says, and what is to be like the other's.

    Attributes:
        matched: Projected maps [B, D, H, W], or vectors [B, D].
    """

    matched: Tensor


class OtherExit(nn.Module):
    """The exit that is taken over, but for its dropout: it is not trained.

    Args:
        config: Its shape.
        classes: C.
    """

    def __init__(self, config: ProjectedConfig, classes: int) -> None:
        super().__init__()
        self.body: Any = config.body()
        dense = [] if config.hidden is None else [nn.Linear(config.width, config.hidden), nn.Tanh()]
        self.dense = nn.Sequential(*dense)
        self.linear = nn.Linear(config.hidden or config.width, classes)


class ProjectedHead(nn.Module):
    """The exit. It is trained but for the part that was taken over, which stays in evaluation mode.

    Maps: 1 x 1, 3 x 3 and 1 x 1 convolutions with batch norm and ReLU, a bottleneck in between. Vectors (ours): linear,
    GELU, linear on the pooled state.

    Args:
        backbone: What it reads the last block of.
        pooling: How states become a vector, see `offramp.families.backbone`.
        classes: C.
        config: Its shape.
    """

    def __init__(self, backbone: Backbone, pooling: str | None, classes: int, config: ProjectedConfig) -> None:
        super().__init__()
        body, width = backbone.body(backbone.num_layers, pooling)
        self.config, outs = config, config.shape[0]
        inner = max(outs // config.factor, 1)
        self.maps = len(config.shape) == 3
        self.body: Any = nn.Identity() if self.maps else body
        if self.maps:
            layers: list[nn.Module] = []
            for a, b, kernel in ((_channels(backbone), inner, 1), (inner, inner, 3), (inner, outs, 1)):
                layers += [nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            self.projector = nn.Sequential(*layers)
        else:
            self.projector = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, outs))
        self.classifier = OtherExit(config, classes).requires_grad_(False)
        self.to(device=backbone.device, dtype=backbone.dtype)

    def take_over(self, exit_: ExitHead) -> None:
        """Copy the weights of the other exit."""
        own, other = self.classifier, exit_
        if self.maps:
            own.body.load_state_dict(other.body.state_dict())
        own.dense.load_state_dict(other.dense.state_dict())
        own.linear.load_state_dict(other.linear.state_dict())

    @property
    def linear(self) -> nn.Linear:
        """The last layer."""
        return self.classifier.linear

    @property
    def width(self) -> int:
        """Length of the features."""
        return self.linear.in_features

    def train(self, mode: bool = True) -> ProjectedHead:
        """Training mode, but for the part that was taken over."""
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, state: Activations) -> ExitOutput:
        """Features, logits and what is matched."""
        if self.maps:
            hidden, side = state.hidden, self.config.shape[1:]
            if hidden.shape[2] > side[0]:
                hidden = F.adaptive_avg_pool2d(hidden, side)  # type: ignore[arg-type]
            matched = self.projector(hidden)
            features = self.classifier.dense(self.classifier.body(Activations((matched,), state.depth)))
        else:
            matched = self.projector(self.body(state))
            features = self.classifier.dense(matched)
        found = Projected(features, self.linear(features))
        found.matched = matched
        return found


def _channels(backbone: Any) -> int:
    """Of the last maps."""
    if hasattr(backbone, "widths"):
        return int(backbone.widths[-1])
    if hasattr(backbone.config, "hidden_sizes"):
        return int(backbone.config.hidden_sizes[-1])
    raise ValueError("the teacher's last states are maps and the student's are not; give both of one kind")

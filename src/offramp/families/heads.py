"""Exits of a classifier: activations to features, and a last linear layer on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from offramp.families.backbone import Activations, Backbone
from offramp.values import choice

POOLINGS = ("mean", "first")
"""How states [B, T, D] become one vector: the mean over tokens that are not padding, or the first token (CLS)."""


@dataclass(frozen=True)
class HeadConfig:
    """How every exit is built.

    Attributes:
        pooling: One of `POOLINGS`; None: what is usual for the backbone ("first" for ViT, "mean" for texts). Feature
            maps of images are always averaged over their places.
        hidden: Width of a dense layer with tanh between pooling and the last linear layer, as in BERT's own pooler;
            None: none.
        dropout: Of the features in training, in [0, 1).
    """

    pooling: str | None = None
    hidden: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        choice("pooling", self.pooling, (None, *POOLINGS))
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden is {self.hidden}; it is a width from 1, or None for no dense layer")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it is in [0, 1)")


class ExitOutput(NamedTuple):
    """What one exit says about B rows: what its last linear layer reads, [B, D_e], and logits [B, C]."""

    features: Tensor
    logits: Tensor


class PooledBody(nn.Module):
    """Pooling of states [B, T, D], behind a norm where they have none, or of maps [B, D, H, W], to features [B, D]."""

    def __init__(self, pooling: str, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.pooling = pooling
        self.norm: Any = norm if norm is not None else nn.Identity()

    def forward(self, state: Activations) -> Tensor:
        """Features [B, D] of activations."""
        hidden: Tensor = state.hidden
        if hidden.ndim == 4:
            return hidden.mean((2, 3))  # [B, D, H, W] -> [B, D]
        if self.pooling == "first":
            first: Tensor = self.norm(hidden[:, 0])  # [B, T, D] -> [B, D]; the norm looks at one token at a time
            return first
        hidden = self.norm(hidden)
        if state.tokens is None:
            return hidden.mean(1)
        weight = state.tokens[..., None].to(hidden.dtype)  # [B, T, 1]
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


class ExitHead(nn.Module):
    """One exit of a backbone after `layer` blocks, 1..L, for C classes, built as the config says."""

    def __init__(self, backbone: Backbone, layer: int, classes: int, config: HeadConfig) -> None:
        super().__init__()
        self.body, width = backbone.body(layer, config.pooling)
        dense: list[nn.Module] = []
        if config.hidden is not None:
            dense, width = [nn.Linear(width, config.hidden), nn.Tanh()], config.hidden
        self.dense = nn.Sequential(*dense, nn.Dropout(config.dropout))
        self.linear = nn.Linear(width, classes)
        self.to(device=backbone.device, dtype=backbone.dtype)

    @property
    def width(self) -> int:
        """D_e, the features' length."""
        return self.linear.in_features

    def forward(self, state: Activations) -> ExitOutput:
        """Features [B, D_e] and logits [B, C] of activations at this exit's layer."""
        features: Tensor = self.dense(self.body(state))
        return ExitOutput(features, self.linear(features))

"""Dropping blocks in training (LayerSkip)."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.families import Edit, SplitModel


def dropout_rates(num_layers: int, largest: float) -> list[float]:
    """Rates at which blocks 1..L are dropped: largest · (2^(l / (L - 1)) - 1) for l = 0..L-1.

    LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710), equation 1, without the curriculum over time that it uses for
    training from scratch only.

    Args:
        num_layers: L.
        largest: The last block's rate.

    Returns:
        L rates, ascending from 0.
    """
    return [largest * (2 ** (layer / max(num_layers - 1, 1)) - 1) for layer in range(num_layers)]


def dropping(split: SplitModel, largest: float) -> Edit | None:
    """Skips each block for whole rows, at random, while the model is in training mode.

    A dropped block is computed all the same: rows of a batch drop different ones.

    Args:
        split: The model.
        largest: The last block's rate, see `dropout_rates`.

    Returns:
        What `SplitModel.states` applies; None if nothing is dropped.
    """
    rates = dropout_rates(split.num_layers, largest if split.model.training else 0.0)
    if not any(rates):
        return None

    def edit(layer: int, entering: Tensor, leaving: Tensor) -> Tensor:
        dropped = torch.rand(len(leaving), 1, 1, device=leaving.device) < rates[layer - 1]
        return torch.where(dropped, entering, leaving)

    return edit

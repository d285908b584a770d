"""What training changes inside a pass: blocks that are dropped, prompts that stop early."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.families import Edit, SplitModel
from offramp.training.config import TrainConfig
from offramp.training.data import Windows


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


def check_edits(split: SplitModel, config: TrainConfig) -> None:
    """Refuse what cannot be done to this model.

    Raises:
        ValueError: `prompt_layer` is not below L, or the model is an encoder-decoder.
    """
    stop = config.prompt_layer
    if stop is not None and split.is_encoder_decoder:
        raise ValueError(f"prompt_layer is {stop}, but an encoder-decoder has no prompt in its decoder; leave it away")
    if stop is not None and stop >= split.num_layers:
        raise ValueError(f"prompt_layer is {stop}, but a prompt can stop after layers 1..{split.num_layers - 1}")


def edit_for(split: SplitModel, config: TrainConfig, windows: Windows) -> Edit | None:
    """The changes that a configuration asks for, for a pass over some windows without their last column.

    Dropping skips a block for whole rows, at random, while the model is in training mode. It is computed all the same:
    rows of a batch drop different blocks. With `prompt_layer`, the states of what stands before the last position of a
    prompt no longer change after that layer, so that deeper layers see keys and values projected from there.

    Returns:
        What `SplitModel.states` applies; None if nothing changes.
    """
    stop = config.prompt_layer
    rates = dropout_rates(split.num_layers, config.layer_dropout if split.model.training else 0.0)
    if stop is None and not any(rates):
        return None
    last = windows.first - 1  # of the prompt; it reads on, to predict the answer's first token
    before = (torch.arange(windows.ids.shape[1] - 1) < last[:, None]).to(split.device)  # [B, T - 1]

    def edit(layer: int, entering: Tensor, leaving: Tensor) -> Tensor:
        if stop is not None and layer > stop:
            leaving = torch.where(before[..., None], entering, leaving)
        if rate := rates[layer - 1]:
            dropped = torch.rand(len(leaving), 1, 1, device=leaving.device) < rate
            leaving = torch.where(dropped, entering, leaving)
        return leaving

    return edit

"""The pass of a training step: states at every exit, from which the next tokens are predicted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.core.skipped_kv import parted
from offramp.families import Edit, SplitModel
from offramp.training.data import Windows


def check_prompt_layer(split: SplitModel, stop: int | None) -> None:
    """Raise a ValueError unless a prompt's last layer is below L, and the model no encoder-decoder."""
    if stop is not None and split.is_encoder_decoder:
        raise ValueError(f"prompt_layer is {stop}, but an encoder-decoder has no prompt in its decoder; leave it out")
    if stop is not None and stop >= split.num_layers:
        raise ValueError(f"prompt_layer is {stop}, but a prompt can stop after layers 1..{split.num_layers - 1}")


def encoded(split: SplitModel, windows: Windows) -> tuple[Tensor | None, Tensor | None]:
    """Encoder output of windows, [B, X, D], and the mask of its input, [B, X]; None of a decoder-only model."""
    if windows.sources is None or windows.present is None:
        return None, None
    present = windows.present.to(split.device)
    return split.encode(windows.sources.to(split.device), present), present


def states_of(
    split: SplitModel, windows: Windows, layers: Sequence[int], *, edit: Edit | None = None
) -> tuple[list[Tensor], Tensor]:
    """States from which counted tokens are predicted, by the model's own pass, and these tokens.

    Args:
        split: The model.
        windows: On any device.
        layers: After which, in 1..L.
        edit: See `SplitModel.states`.

    Returns:
        One [N, D] per layer, and labels [N].
    """
    ids, counted = windows.ids.to(split.device), windows.counted.to(split.device)
    memory, present = encoded(split, windows)
    states = split.states(ids[:, :-1], layers, memory=memory, memory_mask=present, edit=edit)
    where = counted[:, 1:]
    return [hidden[where] for hidden in states], ids[:, 1:][where]


def states_behind_prompts(
    split: SplitModel, windows: Windows, layers: Sequence[int], stop: int
) -> tuple[list[Tensor], Tensor]:
    """The same where all but the last position of each prompt stop after layer `stop` (`ExitPolicy.prompt_layer`).

    Decoding's own parts do it: deeper layers get keys and values projected from the frozen states, and nothing else is
    computed for a prompt, so training costs less as well. What stands before the first token to predict is the prompt.

    Args:
        split: A decoder-only model.
        windows: On any device.
        layers: After which, ascending in 1..L.
        stop: In 1..L-1.

    Returns:
        One [N, D] per layer, and labels [N].
    """
    ids, counted, present, edge = _aligned(windows)
    ids, counted, present = (part.to(split.device) for part in (ids, counted, present))
    state, kept = split.start(ids[:, :-1], present[:, :-1]), {}
    for layer in sorted({*layers, stop, split.num_layers}):
        state = split.run(state, state.depth, layer)
        kept[layer] = state.hidden if state.frame.start else state.hidden[:, edge:]
        if layer == stop and edge:
            frozen, state = parted(state, edge)
            split.fill(state.context, stop, split.num_layers, frozen)
    where = counted[:, edge + 1 :]
    return [kept[layer][where] for layer in layers], ids[:, edge + 1 :][where]


def _aligned(windows: Windows) -> tuple[Tensor, Tensor, Tensor, int]:
    """Windows shifted such that the last position of every prompt is in one column, with padding in front.

    Returns:
        Ids, counted and a mask of what is not padding in front, [B, T'] each; and that column.
    """
    lead = (windows.first - 1).clamp(min=0)
    edge, width = int(lead.max()), windows.ids.shape[1]
    length = edge + int((windows.lengths - lead).max())  # behind the longest answer there is only padding
    columns = torch.arange(length) - (edge - lead)[:, None]  # where each column comes from, [B, T']
    inside = (columns >= 0) & (columns < width)
    source = columns.clamp(0, width - 1)
    ids = windows.ids.gather(1, source).where(inside, 0)
    counted = windows.counted.gather(1, source) & inside
    return ids, counted, columns >= 0, edge


# ---------------------------------------------------------------- blocks that are dropped (LayerSkip)


def dropout_rates(num_layers: int, largest: float) -> list[float]:
    """Rates at which blocks 1..L are dropped: largest · (2^(l / (L - 1)) - 1) for l = 0..L-1.

    LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710), equation 1, without the curriculum over time that it uses for
    training from scratch only.

    Returns:
        L rates, ascending from 0.
    """
    return [largest * (2 ** (layer / max(num_layers - 1, 1)) - 1) for layer in range(num_layers)]


def dropping(split: SplitModel, largest: float) -> Edit | None:
    """Skips each block for whole rows, at random, while the model is in training mode (rates: `dropout_rates`).

    A dropped block is computed all the same: rows of a batch drop different ones.

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

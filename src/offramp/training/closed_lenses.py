"""Where in the depth the last layer's choice is known: lenses in closed form, in one pass over some text.

The best affine map from the state after a layer to that after the last one, by least squares with a small ridge (Din et
al. 2023, arXiv 2303.09435; the ridge is ours, and holds the map at the identity, where lenses begin). It is short of
what training a lens by its readouts reaches, and takes the time of a few passes; layers are compared on equal terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offramp.core.exits import Exits
from offramp.families import SplitModel
from offramp.families.backbone import autocast, evaluating
from offramp.training.data import Windows
from offramp.training.loss_sums import chunk_rows
from offramp.training.objectives import choices
from offramp.training.passes import states_of

RIDGE = 1e-3
"""Share of each component's own second moment that is added to it."""
_PER_WEIGHT, _MOST_FITTED, _MEASURED, _TOGETHER = 16, 1 << 14, 1000, 4


@torch.no_grad()
def agreement(split: SplitModel, windows: Windows, seed: int, precision: str | None = None) -> Tensor:
    """Whether each layer would choose the last layer's token, through a lens fitted on other windows.

    Args:
        split: The model, which stays as it is.
        windows: At least two; half of them may be fitted on, of the others counted positions are measured.
        seed: Of the choice of windows.
        precision: "bf16": compute in bfloat16; None: as loaded.

    Returns:
        Bool [N, L-1], for about 1,000 positions if there are as many.

    Raises:
        ValueError: There is one window only.
    """
    if len(windows) < 2:
        raise ValueError("exits are placed by windows to fit on and others to measure on, but there is one; give more")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    fitted, measured = windows[order[::2]], windows[order[1::2]]
    layers = range(1, split.num_layers + 1)
    with evaluating(split.model), autocast(split.device, precision):
        lenses = _fit(split, fitted, layers)
        found: list[Tensor] = []
        for at in range(0, len(measured), _TOGETHER):
            hidden, _ = states_of(split, measured[at : at + _TOGETHER], layers)
            found += _agree(split, lenses, hidden)
            if sum(map(len, found)) >= _MEASURED:
                break
    return torch.cat(found).cpu()


def _fit(split: SplitModel, windows: Windows, layers: Sequence[int]) -> Exits:
    """Lenses after layers 1..L-1, fitted on all positions of some windows, prompts included."""
    width, enough = split.shape.width, min(_PER_WEIGHT * split.shape.width, _MOST_FITTED)
    lenses = Exits(split.num_layers, width, layers[:-1], device=split.device)
    sums = [torch.zeros(width + 1, 2 * width + 1, device=split.device) for _ in layers[:-1]]
    count = 0
    for at in range(0, len(windows), _TOGETHER):
        hidden, _ = states_of(split, _whole(windows[at : at + _TOGETHER]), layers)
        last = hidden[-1].float()
        for own, total in zip(hidden, sums, strict=False):
            x = torch.cat([own.float(), own.new_ones(len(own), 1).float()], 1)
            with torch.autocast(split.device.type, enabled=False):
                total += x.T @ torch.cat([x, last - own.float()], 1)
        count += len(last)
        if count >= enough:
            break
    for layer, total in zip(lenses.layers, sums, strict=True):
        weight, bias = solved(total.double().cpu())
        lens: Any = lenses.lenses[str(layer)]
        lens.up.weight.copy_(weight)
        lens.up.bias.copy_(bias)
    return lenses


def solved(sums: Tensor) -> tuple[Tensor, Tensor]:
    """W [D, D] and b [D] whose W x + b is closest to targets y; sums of [x, 1] [x, 1, y]^T, [D + 1, 2 D + 1]."""
    width = len(sums) - 1
    moments, targets = sums[:, : width + 1].clone(), sums[:, width + 1 :]
    moments.diagonal()[:width].mul_(1 + RIDGE).add_(1e-12)
    both = torch.linalg.solve(moments, targets)
    return both[:width].T, both[width]


def _whole(windows: Windows) -> Windows:
    """With all positions counted that are not padding."""
    last = windows.counted.shape[1] - windows.counted.int().flip(1).argmax(1)  # behind the last that counts
    columns = torch.arange(windows.counted.shape[1])
    return replace(windows, counted=(columns > 0) & (columns < last[:, None]))


def _agree(split: SplitModel, lenses: Exits, hidden: Sequence[Tensor]) -> list[Tensor]:
    """Whether the choices after layers 1..L-1 are the last one's, bool [n, L-1] per chunk of positions."""
    found = []
    for parts in zip(*(torch.split(h, chunk_rows(split.shape.vocabulary)) for h in hidden), strict=True):
        best = choices(split.readout(parts[-1]).float())
        own = [
            choices(split.readout(lenses.adapt(layer, part.float()).to(part.dtype)).float())
            for layer, part in zip(lenses.layers, parts, strict=False)
        ]
        found.append(torch.stack(own, 1) == best[:, None])
    return found

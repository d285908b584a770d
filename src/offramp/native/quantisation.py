"""Weights in eight bits, as the kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROUP = 64
"""Columns of a row that share a scale when quantised."""


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Eight bits per weight and one scale for 64 of them: weight ≈ values * scale, the largest of each 64 exactly.

    Args:
        weight: [R, C].

    Returns:
        Values, int8 [R, C rounded up to 64s] with zeros behind the end, and scales, float32 [R, that / 64].
    """
    rows, cols = weight.shape
    groups = -(-cols // GROUP)
    padded = nn.functional.pad(weight.float(), (0, groups * GROUP - cols)).view(rows, groups, GROUP)
    scales = padded.abs().amax(-1) / 127
    values = (padded / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().to(torch.int8)
    return values.view(rows, groups * GROUP), scales.contiguous()


def side_by_side(values: Tensor, scales: Tensor) -> Tensor:
    """Each row's values and behind them its scales, as one stream of memory.

    Args:
        values: int8, [R, C].
        scales: float32, [R, G].

    Returns:
        Bytes, int8 [R, C + 4 G rounded up to 16s].
    """
    rows = torch.cat([values, scales.view(torch.int8)], dim=1)
    return nn.functional.pad(rows, (0, -rows.shape[1] % 16))

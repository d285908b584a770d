"""Weights in eight bits, as the kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LANES, STEP, MOST_STEPS = 16, 64, 12
"""Numbers of a vector, columns of a step (four a lane), and steps whose columns of one lane share a scale."""


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Eight bits per weight, and one scale for up to 48 of them, which lie 16 columns apart.

    Args:
        weight: [R, C].

    Returns:
        Values, int8 [R, blocks, steps, 4, 16], in the columns' order with zeros behind the last one, and scales,
        bfloat16 [R, blocks, 16]: weight ≈ values * scales to half a scale, which is a largest size / 127 rounded up.
    """
    rows, cols = weight.shape
    blocks = -(-cols // (STEP * MOST_STEPS))
    steps = -(-cols // (STEP * blocks))
    padded = nn.functional.pad(weight.float(), (0, blocks * steps * STEP - cols)).view(rows, blocks, steps, 4, LANES)
    scales = (padded.abs().amax((2, 3)) * (1 + 2**-8) / 127).to(torch.bfloat16)
    sizes = scales.float().clamp(min=torch.finfo(torch.float32).tiny)
    values = (padded / sizes[:, :, None, None]).round_().clamp_(-127, 127)
    return values.to(torch.int8), scales


def dequantised(values: Tensor, scales: Tensor, cols: int) -> Tensor:
    """The weights, float32 [R, `cols`], that `quantised` ones stand for."""
    return (values * scales[:, :, None, None].float()).flatten(1)[:, :cols]


def side_by_side(values: Tensor, scales: Tensor) -> Tensor:
    """Each row's blocks one after another, as one stream of memory.

    A block is its values, with 128 added and the four of a lane together, and behind them its scales.

    Returns:
        Bytes, uint8 [R, blocks (64 steps + 32)].
    """
    together = values.view(torch.uint8).bitwise_xor(128).transpose(-2, -1).flatten(2)
    return torch.cat([together, scales.view(torch.uint8)], dim=2).flatten(1)

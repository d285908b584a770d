"""What weights and inputs in eight bits stand for, worked out column by column from the description of the kernels."""

import math

import torch

from offramp.native.weights import quantised


def dequantised(values, scales, cols):
    """The weights, float32 [R, `cols`], that `quantised` ones stand for."""
    return (values * scales[:, :, None, None].float()).flatten(1)[:, :cols]


def rounded_weight(weight):
    """A weight as the kernels keep it, in float32."""
    return dequantised(*quantised(weight), weight.shape[1])


def rounded_input(x):
    """An input as the kernels round it: columns 16 apart share a scale, in equal parts of up to 768 columns."""
    columns, rounded = x.shape[-1], x.clone()
    steps = math.ceil(columns / 64)
    width = math.ceil(steps / math.ceil(steps / 12)) * 64
    for start in range(0, columns, width):
        for first in range(start, min(start + 16, columns)):
            own = slice(first, min(start + width, columns), 16)
            most = x[..., own].abs().amax(-1, keepdim=True).float()
            inverse = torch.where(most > 1e-30, 127 / most, 0)
            # Multiplied and rounded at once, as fused instructions do
            whole = (x[..., own].double() * inverse.double()).round()
            rounded[..., own] = (whole * (most * (1 / 127)).double()).to(x.dtype)
    return rounded

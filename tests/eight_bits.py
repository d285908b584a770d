"""What weights and inputs in eight bits stand for, worked out column by column from the description of the kernels."""

import math

import scipy.linalg
import torch

from offramp.native.weights import quantised


def turning(count):
    """What `count` columns that share a scale are multiplied by, float64."""
    sizes = [1 << bit for bit in reversed(range(count.bit_length())) if count >> bit & 1]
    parts = [scipy.linalg.hadamard(size) / math.sqrt(size) for size in sizes]
    return torch.from_numpy(scipy.linalg.block_diag(*parts))


def dequantised(values, scales):
    """The weights, float32 [R, C'], that `quantised` ones stand for, with the columns behind the last one.

    These were zeros, of which turning, rounding and turning back may make something; so it does of inputs.
    """
    there = (values * scales[:, :, None, None].float()).flatten(2, 3)
    return (turning(there.shape[2]) @ there.double()).flatten(1).float()


def rounded_weight(weight):
    """A weight as the kernels keep it, in float32 [R, C']."""
    return dequantised(*quantised(weight))


def rounded_input(x):
    """An input [..., C] as the kernels round it, [..., C']: columns 16 apart share a scale, in parts of up to 768.

    The largest size of one of them, or of the sum of the first and second, third and fourth, and so on, becomes 126.
    """
    steps = math.ceil(x.shape[-1] / 64)
    parts = math.ceil(steps / 12)
    count = math.ceil(steps / parts) * 4
    padded = torch.nn.functional.pad(x.float(), (0, parts * count * 16 - x.shape[-1]))
    columns = butterflies(padded.view(*x.shape[:-1], parts, count, 16).clone())
    pairs = columns.unflatten(-2, (-1, 2)).sum(-2)
    most = torch.cat([columns, pairs], -2).abs().amax(-2, keepdim=True)
    inverse = torch.where(most > 1e-30, 126 / most, 0)
    # Multiplied and rounded at once, as fused instructions do
    whole = (columns.double() * inverse.double()).round() * (most * (1 / 126)).double()
    return (turning(count) @ whole).flatten(-3).to(x.dtype)


def butterflies(columns):
    """The same as `turning` in the kernels' own order of sums, since what is then rounded may be half a step off."""
    first, count = 0, columns.shape[-2]
    while first < count:
        size = 1 << ((count - first).bit_length() - 1)
        part, half = columns[..., first : first + size, :], 1
        while half < size:
            one, other = part.unflatten(-2, (size // (2 * half), 2, half)).unbind(-3)
            part, half = torch.stack([one + other, one - other], -3).flatten(-4, -2), 2 * half
            if half == 4:
                part = part * torch.tensor(1 / math.sqrt(size), dtype=torch.float32)
        columns[..., first : first + size, :] = part
        first += size
    return columns

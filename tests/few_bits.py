"""What weights and inputs in eight and four bits stand for, worked out from the description of the kernels."""

import copy
import math
import struct

import scipy.linalg
import torch
from transformers.pytorch_utils import Conv1D

from offramp.families import SplitModel
from offramp.hub.pretrained import rounded_dtype
from offramp.native.weights import FourBits, quantised


def rounded(form):
    """What a number format rounds matrices to; None: nothing."""
    return rounded_dtype(form)[1]


def weight_in(form, weight):
    """A weight as the kernels keep it in a number format, [R, C'], C' >= C."""
    return {"int8": rounded_weight, "int4": weight_of_tiles}.get(form, lambda weight: weight)(weight)


def input_in(form, x):
    """An input [..., C] as the kernels multiply it, [..., C']."""
    return {"int8": rounded_input, "int4": input_in_groups}.get(form, lambda x: x)(x)


def sixteen_values(weight, levels=15, seed=0):
    """A weight [R, C] with at most `levels` + 1 equally spaced values in each 32 columns of a row."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = weight.shape
    groups = math.ceil(cols / 32)
    numbers = torch.randint(levels + 1, (rows, groups, 32), generator=generator)
    scale = weight.float().abs().mean() / 4 * (0.5 + torch.rand(rows, groups, 1, generator=generator))
    shift = -scale * (7 + torch.rand(rows, groups, 1, generator=generator))
    return (numbers * scale + shift).flatten(1)[:, :cols].to(weight.dtype)


def model_in(form, model):
    """A model, or a copy of it, that can be read in a number format; in four bits with other weights."""
    if form == "bfloat16":
        return copy.deepcopy(model).to(torch.bfloat16)
    if form != "int4":
        return model
    model = copy.deepcopy(model)
    for seed, module in enumerate(m for block in SplitModel(model).blocks for m in block.modules()):
        if isinstance(module, torch.nn.Linear):
            module.weight.data = sixteen_values(module.weight, seed=seed)
        elif isinstance(module, Conv1D):
            module.weight.data = sixteen_values(module.weight.T, seed=seed).T.contiguous()
    return model


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


def weight_of_tiles(weight):
    """A weight as its bytes in four bits say, read number by number, float32 [R, C']."""
    rows, groups = weight.shape[0], math.ceil(weight.shape[1] / 32)
    tiles = FourBits.of(weight).in_tiles()
    assert tiles.shape == (math.ceil(rows / 16), groups * 320 + 128)
    made = torch.zeros(rows, groups * 32, dtype=torch.float64)
    for row in range(rows):
        tile, lane = bytes(tiles[row // 16].tolist()), row % 16
        units = [struct.unpack_from("<f", tile, groups * 320 + 64 * i + 4 * lane)[0] for i in range(2)]
        for group in range(groups):
            scale, shift = (struct.unpack_from("<h", tile, group * 320 + 256 + 32 * i + 2 * lane)[0] for i in range(2))
            for column in range(32):
                byte = tile[group * 320 + column // 8 * 64 + 4 * lane + column % 4]
                number = byte >> 4 if column % 8 >= 4 else byte & 15
                made[row, group * 32 + column] = units[0] * scale * number + units[1] * shift
    return made.float()


def input_in_groups(x):
    """An input [..., C] as the kernels round it beside weights in four bits: 32 columns share a scale."""
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 1e-30, 127 / most, 0)
    whole = (groups.double() * inverse.double()).round()  # multiplied and rounded at once, as fused instructions do
    return (whole * (most * torch.tensor(1 / 127)).double()).flatten(-2).to(x.dtype)

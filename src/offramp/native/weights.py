"""A model's weights as the kernels read them: where they lie, copied where they lie otherwise, or in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from offramp.hub.pretrained import Rounded
from offramp.native import kernels as lib
from offramp.native.kernels import NativeError

# ---------------------------------------------------------------- in eight bits

LANES, STEP, MOST_STEPS = 16, 64, 12
"""Numbers of a vector, columns of a step (four a lane), and steps whose columns of one lane share a scale."""


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Eight bits per weight, and one scale for up to 48 of them, which lie 16 columns apart and were turned first.

    Args:
        weight: [R, C].

    Returns:
        Values, int8 [R, blocks, steps, 4, 16], in the columns' order with zeros behind the last one, and scales,
        bfloat16 [R, blocks, 16]: `turned` weights ≈ values * scales to half a scale, which is a largest size / 127
        rounded up.
    """
    rows, cols = weight.shape
    blocks = -(-cols // (STEP * MOST_STEPS))
    steps = -(-cols // (STEP * blocks))
    padded = nn.functional.pad(weight.float(), (0, blocks * steps * STEP - cols)).view(rows, blocks, steps * 4, LANES)
    padded = turned(padded).view(rows, blocks, steps, 4, LANES)
    scales = (padded.abs().amax((2, 3)) * (1 + 2**-8) / 127).to(torch.bfloat16)
    sizes = scales.float().clamp(min=torch.finfo(torch.float32).tiny)
    values = (padded / sizes[:, :, None, None]).round_().clamp_(-127, 127)
    return values.to(torch.int8), scales


def turned(columns: Tensor) -> Tensor:
    """Columns that share scales, multiplied by symmetric orthogonal matrices, whose inverse is themselves.

    Hadamard's, of the largest power of two that fits and so on with the rest. The kernels multiply inputs by the same,
    so that products stay what they are, while what one column has too much of is shared by all: as in QuaRot (Ashkboos
    et al. 2024, arXiv 2404.00456), but within the columns of a scale and not over a state, so that no state changes.

    Args:
        columns: [..., n, 16].

    Returns:
        The same shape, in float32.
    """
    first, count = 0, columns.shape[-2]
    turning = torch.zeros(count, count)
    while first < count:
        size = 1 << ((count - first).bit_length() - 1)
        part = torch.ones(1, 1)
        while len(part) < size:
            part = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), part)
        turning[first : first + size, first : first + size] = part / size**0.5
        first += size
    return turning @ columns.float()


def side_by_side(values: Tensor, scales: Tensor) -> Tensor:
    """Each row's blocks one after another, as one stream of memory.

    A block is its values, with 128 added and the four of a lane together, and behind them its scales.

    Returns:
        Bytes, uint8 [R, blocks (64 steps + 32)].
    """
    together = values.view(torch.uint8).bitwise_xor(128).transpose(-2, -1).flatten(2)
    return torch.cat([together, scales.view(torch.uint8)], dim=2).flatten(1)


# ---------------------------------------------------------------- in four bits

GROUP, LEVELS = 32, 15
"""Columns that share a scale and a shift, and the largest number of four bits."""


@dataclass(frozen=True)
class FourBits:
    """A matrix in four bits per weight: weights ≈ units[0] * scales * numbers + units[1] * shifts.

    Attributes:
        numbers: From 0 to 15, uint8 [R, G, 32].
        scales: int16 [R, G], from 0 on.
        shifts: int16 [R, G].
        units: float32 [2, R].
    """

    numbers: Tensor
    scales: Tensor
    shifts: Tensor
    units: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> FourBits | None:
        """A weight as it is, if each 32 columns of a row have at most sixteen values, equally spaced.

        So have those of a checkpoint that went through four bits: llama.cpp's Q4_0, Q4_1 and Q4_K, GPTQ in groups of
        32 and more, or training for one of them. They are known up to the rounding of their own number format, to
        2^-7 of a group's largest, and no nearer than that: scale and shift are those of least squares.

        Args:
            weight: [R, C].

        Returns:
            The weight in four bits; None: it has other values.
        """
        rows, cols = weight.shape
        whole = torch.cat([weight, weight[:, -1:].expand(-1, -cols % GROUP)], 1).float()
        groups = whole.view(-1, GROUP)
        low, span = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)
        allowed, numbers = groups.abs().amax(1) * 2**-7, torch.zeros_like(groups)
        left = torch.arange(len(groups))
        for steps in range(LEVELS, 0, -1):  # between the smallest and the largest, which need not be 0 and 15
            some, scale = groups[left], span[left] / steps
            nearest = ((some - low[left]) / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_()
            fits = (some - low[left] - nearest * scale).abs().amax(1) <= allowed[left]
            numbers[left[fits]] = nearest[fits]
            left = left[~fits]
            if not len(left):
                return cls._of(groups.view(rows, -1, GROUP), numbers.view(rows, -1, GROUP))
        return None

    @classmethod
    def _of(cls, groups: Tensor, numbers: Tensor) -> FourBits:
        """The scales and shifts of least squares, as whole numbers."""
        middle = numbers.mean(-1, keepdim=True)
        apart = numbers - middle
        scale = (apart * groups).sum(-1) / apart.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        shift = groups.mean(-1) - scale * middle[..., 0]
        both = torch.stack([scale, shift])  # [2, R, G]
        units = both.abs().amax(2) / torch.iinfo(torch.int16).max
        parts = both / units[..., None].clamp(min=torch.finfo(torch.float32).tiny)
        scales, shifts = parts.round_().to(torch.int16)
        return cls(numbers.to(torch.uint8), scales, shifts, units)

    def in_tiles(self) -> Tensor:
        """Sixteen rows at a time as one stream of memory, as `Groups` in kernels.cpp says.

        Returns:
            Bytes, uint8 [tiles, 320 G + 128]; a last tile of fewer rows ends in rows of zeros.
        """
        rows, groups, _ = self.numbers.shape
        tiles = -(-rows // LANES)
        more = (0, tiles * LANES - rows)
        numbers = nn.functional.pad(self.numbers, (0, 0, 0, 0, *more)).view(tiles, LANES, groups, 4, 2, 4)
        steps = numbers.permute(0, 2, 3, 1, 5, 4)  # [tiles, G, steps, 16, 4, halves]
        packed = (steps[..., 0] | steps[..., 1] << 4).flatten(2)
        pairs = torch.stack([nn.functional.pad(part, (0, 0, *more)) for part in (self.scales, self.shifts)])
        pairs = pairs.view(2, tiles, LANES, groups).permute(1, 3, 0, 2).flatten(2).contiguous()  # [tiles, G, 32]
        units = nn.functional.pad(self.units, more).view(2, tiles, LANES).transpose(0, 1).flatten(1).contiguous()
        streams = torch.cat([packed, pairs.view(torch.uint8)], 2).flatten(1)
        return torch.cat([streams, units.view(torch.uint8)], 1)


# ---------------------------------------------------------------- of a model

_FORMATS = {torch.float32: lib.F32, torch.bfloat16: lib.BF16}


@dataclass(frozen=True)
class Part:
    """A linear layer, or some of its rows where several layers are kept as one.

    Attributes:
        linear: An `nn.Linear`, or a `Conv1D`, which is one with its weight transposed.
        rows: Takes those rows from a tensor that has all of them; None: all. A slice is read in place, rows in another
            order are copied.
    """

    linear: Any
    rows: Callable[[Tensor], Tensor] | None = None

    @property
    def width(self) -> int:
        """How many values it makes."""
        weight = self.linear.weight
        return len(self.of(torch.empty(weight.shape[isinstance(self.linear, Conv1D)])))

    def of(self, values: Tensor) -> Tensor:
        """Its rows of a tensor [R, ...]."""
        return values if self.rows is None else self.rows(values)


@dataclass
class Weights:
    """Pointers into tensors, and the tensors, so that they live as long.

    Attributes:
        rounded: "int8": matrices are copied in eight bits per weight, instead of being read where they lie; "int4":
            those in four bits that stay what they are.
        held: Everything pointed to.
        noted: The model's tensors, where each lay, how often it had been written to, and some of its values if it was
            copied, to notice changes; writing through `.data`, as merging adapters does, is not counted.
        made: The matrices and norms, so that a part of two programs is copied or quantised once.
    """

    rounded: Rounded | None = None
    held: list[Tensor] = field(default_factory=list)
    noted: list[tuple[Tensor, int, int, Tensor | None]] = field(default_factory=list)
    made: dict[Any, Any] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether a tensor was written to or replaced since."""
        return any(
            tensor.data_ptr() != place
            or tensor._version != version
            or (values is not None and not torch.equal(values, _some(tensor)))
            for tensor, place, version, values in self.noted
        )

    def _note(self, tensor: Tensor, *, copied: bool) -> None:
        values = _some(tensor).clone() if copied else None
        self.noted.append((tensor, tensor.data_ptr(), tensor._version, values))

    def _hold(self, tensor: Tensor) -> int:
        self.held.append(tensor)
        return tensor.data_ptr()

    def vector(self, values: Tensor | None, part: Part | None = None, *, plus: float = 0.0) -> int | None:
        """The address of a float32 copy of a small parameter, or of a part's rows of it; None for None."""
        if values is None:
            return None
        self._note(values, copied=True)
        own = values.detach() if part is None else part.of(values.detach())
        return self._hold(own.float() + plus)

    def matrices(self, parts: Sequence[Part]) -> list[lib.Matrix]:
        """Linear layers side by side; with "int4" in four bits if that leaves all of them what they are, else eight."""
        if self.rounded != "int4":
            return [self.matrix(part) for part in parts]
        if not all((part, lib.INT4) in self.made for part in parts):
            weights = [_weight(part) for part in parts]
            for some in ([weight[:LANES] for weight in weights], weights):  # most are known by their first rows
                four = [FourBits.of(weight) for weight in some]
                if None in four:
                    return [self.matrix(part) for part in parts]
            for part, bits in zip(parts, four, strict=True):
                self.made[part, lib.INT4] = self._matrix(part, None, bits)
        return [self.made[part, lib.INT4] for part in parts]

    def matrix(self, part: Part, bias: Tensor | None = None) -> lib.Matrix:
        """The weight of a linear layer, of which single rows can be read, with its bias or another one.

        Args:
            part: Which.
            bias: Another bias than its own.

        Returns:
            What the kernels are told: in place if its rows lie one after another, in eight bits with "int8" and "int4".
        """
        if (part, bias) not in self.made:
            self.made[part, bias] = self._matrix(part, bias, None)
        found: lib.Matrix = self.made[part, bias]
        return found

    @property
    def share_in_four_bits(self) -> float:
        """Of the weights of all matrices; a NativeError with "int4" if there are none."""
        found = [made for made in self.made.values() if isinstance(made, lib.Matrix)]
        four = sum(made.rows * made.cols for made in found if made.format == lib.INT4)
        if self.rounded == "int4" and not four:
            raise NativeError(
                "no matrix of its blocks has sixteen equally spaced values in each 32 columns of a row, as those of a "
                "checkpoint that went through four bits have; give dtype='int8'"
            )
        return float(four / sum(made.rows * made.cols for made in found))

    def _matrix(self, part: Part, bias: Tensor | None, four: FourBits | None) -> lib.Matrix:
        linear, weight = part.linear, _weight(part)
        inside = weight.untyped_storage().data_ptr() == linear.weight.untyped_storage().data_ptr()
        self._note(linear.weight, copied=bool(self.rounded) or not inside)
        bias_at = self.vector(linear.bias if bias is None else bias, part)
        made: dict[str, Any] = {"rows": weight.shape[0], "cols": weight.shape[1], "bias": bias_at}
        if four is not None:
            held = four.in_tiles()
            return lib.Matrix(format=lib.INT4, stride=held.stride(0) // LANES, data=self._hold(held), **made)
        if self.rounded:
            held = _in_eight_bits(weight)
            return lib.Matrix(format=lib.INT8, stride=held.stride(0), data=self._hold(held), **made)
        stride = weight.stride(0) * weight.element_size()
        return lib.Matrix(format=_FORMATS[weight.dtype], stride=stride, data=self._hold(weight), **made)

    def norm(self, module: Any) -> lib.Norm:
        """An RMS or layer norm, over the last dimension of its weight; none for None."""
        if module is None or isinstance(module, nn.Identity):
            return lib.Norm()
        if module not in self.made:
            self.made[module] = self._norm(module)
        found: lib.Norm = self.made[module]
        return found

    def _norm(self, module: Any) -> lib.Norm:
        name, weight = type(module).__name__, getattr(module, "weight", None)
        centred = isinstance(module, nn.LayerNorm) or name.startswith(("CohereLayer", "Cohere2Layer", "OlmoLayer"))
        if not centred and not name.endswith(("RMSNorm", "T5LayerNorm")):
            raise NativeError(f"a {name} is no norm that the kernels know; merge adapters first")
        eps = next((v for key in ("variance_epsilon", "eps") if (v := getattr(module, key, None)) is not None), 1e-5)
        plus = 1.0 if name.startswith(("Gemma", "Nemotron")) else 0.0  # whose weights are kept less one
        return lib.Norm(
            lib.LAYER if centred else lib.RMS, module.normalized_shape[-1] if weight is None else weight.shape[-1], eps,
            self.vector(weight, plus=plus), self.vector(getattr(module, "bias", None)),
        )  # fmt: skip


def _weight(part: Part) -> Tensor:
    """A linear layer's weight [R, C], each row in one piece."""
    linear = part.linear
    if type(linear) not in (nn.Linear, Conv1D):
        whose = f"a {type(linear).__name__} of {type(linear).__module__.split('.')[0]}"
        raise NativeError(f"{whose} is more than its weight; merge adapters and dequantise the model first")
    weight: Tensor = linear.weight.detach()
    if weight.dtype not in _FORMATS:
        raise NativeError(f"weights are in {weight.dtype}; float32 and bfloat16 are supported")
    weight = part.of(weight.T if type(linear) is Conv1D else weight)
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _in_eight_bits(weight: Tensor) -> Tensor:
    try:
        return side_by_side(*quantised(weight))
    except RuntimeError as error:  # torch has no type of its own for it on a CPU
        if "allocate memory" not in str(error):
            raise
        raise MemoryError(
            "eight-bit copies of its matrices, half their size in bfloat16, do not fit into memory beside the model; "
            "give dtype='bfloat16', which needs no copy"
        ) from error


def _some(tensor: Tensor) -> Tensor:
    """Some hundred values, spread over all of them: thousands took longer to look at than a token to make."""
    return tensor.detach().flatten()[:: max(1, tensor.numel() // 512)]

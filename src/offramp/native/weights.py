"""A model's weights as the kernels read them: where they lie, copied where they lie otherwise, or in eight bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

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
        int8: Whether matrices are quantised, instead of being read where they lie.
        held: Everything pointed to.
        noted: The model's tensors, where each lay, how often it had been written to, and some of its values if it was
            copied, to notice changes; writing through `.data`, as merging adapters does, is not counted.
        made: The matrices and norms, so that a part of two programs is copied or quantised once.
    """

    int8: bool = False
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

    def matrix(self, part: Part, bias: Tensor | None = None) -> lib.Matrix:
        """The weight of a linear layer, in place if its rows lie one after another, with its bias or another one."""
        if (part, bias) not in self.made:
            self.made[part, bias] = self._matrix(part, bias)
        found: lib.Matrix = self.made[part, bias]
        return found

    def _matrix(self, part: Part, bias: Tensor | None) -> lib.Matrix:
        linear = part.linear
        if type(linear) not in (nn.Linear, Conv1D):
            whose = f"a {type(linear).__name__} of {type(linear).__module__.split('.')[0]}"
            raise NativeError(f"{whose} is more than its weight; merge adapters and dequantise the model first")
        weight = linear.weight.detach()
        if weight.dtype not in _FORMATS:
            raise NativeError(f"weights are in {weight.dtype}; float32 and bfloat16 are supported")
        weight = part.of(weight.T if type(linear) is Conv1D else weight)
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        inside = weight.untyped_storage().data_ptr() == linear.weight.untyped_storage().data_ptr()
        self._note(linear.weight, copied=self.int8 or not inside)
        bias_at = self.vector(linear.bias if bias is None else bias, part)
        made: dict[str, Any] = {"rows": weight.shape[0], "cols": weight.shape[1], "bias": bias_at}
        if self.int8:
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

"""A model's weights as the kernels read them: where they lie, or copied where they lie otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from offramp.native import library as lib
from offramp.native.build import NativeError
from offramp.native.quantisation import quantised

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
        stamps: Where each parameter lay and how often it had been written to, to notice changes.
        made: The matrices, so that a part of two programs is copied or quantised once.
    """

    int8: bool = False
    held: list[Tensor] = field(default_factory=list)
    stamps: list[tuple[Tensor, int, int]] = field(default_factory=list)
    made: dict[tuple[Part, Tensor | None], lib.Matrix] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether a parameter was written to or replaced since."""
        return any(p.data_ptr() != place or p._version != version for p, place, version in self.stamps)

    def _note(self, parameter: Tensor) -> Tensor:
        self.stamps.append((parameter, parameter.data_ptr(), parameter._version))
        return parameter.detach()

    def _hold(self, tensor: Tensor) -> int:
        self.held.append(tensor)
        return tensor.data_ptr()

    def vector(self, values: Tensor | None, part: Part | None = None, *, plus: float = 0.0) -> int | None:
        """The address of a float32 copy of a small parameter, or of a part's rows of it; None for None."""
        if values is None:
            return None
        noted = self._note(values)
        return self._hold((noted if part is None else part.of(noted)).float() + plus)

    def matrix(self, part: Part, bias: Tensor | None = None) -> lib.Matrix:
        """The weight of a linear layer, in place if its rows lie one after another, with its bias or another one."""
        if (part, bias) not in self.made:
            self.made[part, bias] = self._matrix(part, bias)
        return self.made[part, bias]

    def _matrix(self, part: Part, bias: Tensor | None) -> lib.Matrix:
        linear = part.linear
        if type(linear) not in (nn.Linear, Conv1D):
            raise NativeError(
                f"a {type(linear).__name__} is more than its weight; merge adapters and dequantise the model first"
            )
        weight = self._note(linear.weight)
        if weight.dtype not in _FORMATS:
            raise NativeError(f"weights are in {weight.dtype}; float32 and bfloat16 are supported")
        weight = part.of(weight.T if type(linear) is Conv1D else weight)
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        bias_at = self.vector(linear.bias if bias is None else bias, part)
        made: dict[str, Any] = {"rows": weight.shape[0], "cols": weight.shape[1], "bias": bias_at}
        if self.int8:
            values, scales = quantised(weight)
            data, stride = self._hold(values), values.stride(0)
            return lib.Matrix(format=lib.INT8, stride=stride, data=data, scales=self._hold(scales), **made)
        return lib.Matrix(format=_FORMATS[weight.dtype], stride=weight.stride(0), data=self._hold(weight), **made)

    def norm(self, module: Any) -> lib.Norm:
        """An RMS or layer norm, over the last dimension of its weight; none for None."""
        if module is None or isinstance(module, nn.Identity):
            return lib.Norm()
        name, weight = type(module).__name__, getattr(module, "weight", None)
        centred = isinstance(module, nn.LayerNorm) or name.startswith(("CohereLayer", "Cohere2Layer", "OlmoLayer"))
        eps = next((v for key in ("variance_epsilon", "eps") if (v := getattr(module, key, None)) is not None), 1e-5)
        plus = 1.0 if name.startswith(("Gemma", "Nemotron")) else 0.0  # whose weights are kept less one
        return lib.Norm(
            lib.LAYER if centred else lib.RMS, module.normalized_shape[-1] if weight is None else weight.shape[-1], eps,
            self.vector(weight, plus=plus), self.vector(getattr(module, "bias", None)),
        )  # fmt: skip

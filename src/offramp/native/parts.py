"""The modules that the kernels stand for: whether something else acts beside them, and whether they are the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from offramp.families import acting
from offramp.native.build import NativeError


def require_plain(split: Any) -> None:
    """Refuse models whose blocks do more than their modules' own code, which is all that the kernels know.

    Args:
        split: A `SplitModel`.

    Raises:
        NativeError: A hook or another `forward` would not be called, or the attention is somebody's own.
    """
    for module in _modules(split):
        if any(acting(module)):
            name = next(name for name, found in split.model.named_modules() if found is module)
            raise NativeError(f"{name} has a hook or a forward of its own, which the kernels would not call")
    if (attention := getattr(split.config, "_attn_implementation", None)) not in (None, "eager", "sdpa"):
        raise NativeError(f"its attention is {attention!r}; the kernels compute what sdpa and eager do")
    if attention == "sdpa" and getattr(split.config, "attn_logit_softcapping", None):
        raise NativeError("its attention is 'sdpa', which leaves out its scores' cap; load it with 'eager' attention")


def parts(split: Any) -> list[object]:
    """Everything that can be exchanged in what the kernels stand for, to be compared by identity."""
    return [
        part
        for module in _modules(split)
        for part in (module, *module._parameters.values(), *module._buffers.values(), *acting(module))
    ]


def _modules(split: Any) -> Iterator[nn.Module]:
    return (module for root in (*split.blocks[: split.num_layers], split.norm, split.head) for module in root.modules())

"""Where a model runs and in which number format: one rule for all functions and commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from offramp.values import choice

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Number formats a model can be loaded in."""


def named_device(device: str | int | torch.device | None = None) -> torch.device:
    """The device of that name or number; None: the first CUDA GPU (ROCm's count as such), else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = ["cpu", *([accelerator.type] if accelerator else [])]
    if device is None:  # others are named: mps has no float64, in which statistics are summed
        return torch.device("cuda" if "cuda" in known else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = None
    count = torch.accelerator.device_count() if accelerator else 0
    if chosen is None or chosen.type not in known or (chosen.type != "cpu" and (chosen.index or 0) >= count):
        raise ValueError(f"device {str(device)!r} is not available on this machine; choose one of {', '.join(known)}")
    return chosen


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A supported dtype by name, or itself."""
    import torch

    name = str(dtype).removeprefix("torch.")
    choice("dtype", name, DTYPES)
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def process_device(device: str | None) -> tuple[Any, torch.device]:
    """`accelerate`'s state, and where this process runs: `named_device`, or of several each on a GPU of its own."""
    from accelerate import PartialState

    chosen = named_device(device)
    state = PartialState(cpu=chosen.type == "cpu")
    return state, state.device if state.num_processes > 1 else chosen


def agreed(value: T) -> T:
    """What the first of several processes found, for all of them; for one alone what it found."""
    from accelerate.utils import broadcast_object_list

    found: T = broadcast_object_list([value])[0]
    return found

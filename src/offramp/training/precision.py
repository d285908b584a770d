"""The number format that a training run computes in: what is fast on this device, and what the run began with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from offramp.runs.folder import RunFolder

FASTER = 1.3
"""How many times as fast matrix products in bfloat16 must be: autocast's conversions take some of what they save."""
_SIZE, _REPEATS = 512, 20  # some products of a few milliseconds are not interrupted, however busy the machine is
_LONGEST = 0.2  # seconds of all of them: formats without instructions are slow


@dataclass(frozen=True)
class Precision:
    """What to compute in, as `TrainConfig.precision` has it, and why, in words."""

    value: str | None
    why: str

    @property
    def name(self) -> str:
        """For a line of output."""
        return "the loaded format" if self.value is None else "bfloat16, weights as loaded"


def fast_precision(
    device: torch.device, dtype: torch.dtype, folder: Path | None = None, trainable: str = "exits"
) -> Precision:
    """Choose between computing in bfloat16 under autocast and as the weights are.

    A run that was begun goes on as it began. On a CPU products of both formats are timed, which takes some hundredths
    of a second: processors without instructions for bfloat16 are slower in it.

    A model all of whose weights learn stays in its own format. Published weights are often bfloat16 numbers, and the
    first small steps away from them are rounded off again where they are multiplied with: after three steps of SmolLM2
    the losses of its exits had fallen by .1 to .3 nats, by .4 to 1.9 in float32 (same data and seed).

    Returns:
        The choice.
    """
    begun = None if folder is None else RunFolder(folder).begun()
    if begun is not None:
        return Precision(begun["config"]["precision"], "as the run in this folder began")
    if dtype != torch.float32:
        return Precision(None, f"the weights are in {str(dtype).removeprefix('torch.')}{_slow(device, dtype)}")
    if trainable == "all":
        return Precision(None, "the first small steps of weights would be rounded off in bfloat16")
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return Precision("bf16" if able else None, f"this GPU has {'' if able else 'no '}bfloat16")
    if device.type != "cpu":
        return Precision(None, f"bfloat16 was not tried on {device.type}")
    times = product_seconds(torch.float32) / product_seconds(torch.bfloat16)
    why = f"matrix products in bfloat16 take {1 / times:.2f} of the time of float32's here"
    return Precision("bf16" if times >= FASTER else None, why)


def _slow(device: torch.device, dtype: torch.dtype) -> str:
    """What is to be said of a format that this CPU is slow in, as the end of a sentence; empty: it is not."""
    if device.type != "cpu" or (times := product_seconds(dtype) / product_seconds(torch.float32)) < FASTER:
        return ""
    return f", whose matrix products take {times:.1f} times as long as float32's here; in float32 it may be faster"


def product_seconds(dtype: torch.dtype) -> float:
    """Shortest time of a product of two matrices on this CPU, in seconds."""
    one = torch.ones(_SIZE, _SIZE, dtype=dtype)
    found: list[float] = []
    while len(found) < _REPEATS and sum(found) < _LONGEST:
        began = time.perf_counter()
        one @ one
        found.append(time.perf_counter() - began)
    return min(found)

"""Per-prompt losses: how much worse one prompt's answer is for leaving early.

What is promised is the mean of these over prompts, so clipping and comparing happen per prompt, before any mean. The
full answer is that of the same decoding configuration with "never exit". With sampled answers, average each prompt's
losses over a fixed number of samples first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Losses: TypeAlias = "Tensor | NDArray[Any] | Sequence[float]"
"""One number per prompt, [N]."""

ROUNDING = 1e-6
"""Losses this little outside their range are rounding errors (of float32) and are moved into it."""
TIE = 1e-9
"""Differences this small are rounding errors: such a loss is not above the margin, such a sum is a whole number."""


def checked(values: Losses, low: float, high: float, name: str = "losses", ndim: int = 1) -> NDArray[np.float64]:
    """The values in double precision, after a look at their shape and range.

    Args:
        values: Any shape of `ndim` dimensions, on any device.
        low: Smallest value allowed.
        high: Largest value allowed.
        name: What to call them in an error.
        ndim: Number of dimensions; the first counts prompts or candidates, and no dimension may be empty.

    Returns:
        The values, float64, within [low, high].

    Raises:
        ValueError: There are none, their shape is another, or one is NaN, infinite or outside the range.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim:
        raise ValueError(f"{name} has shape {list(array.shape)}; it must have {ndim} dimension{'s' * (ndim > 1)}")
    if array.size == 0:
        raise ValueError(f"{name} is empty; at least one prompt is needed")
    wrong = ~(np.isfinite(array) & (array >= low - ROUNDING) & (array <= high + ROUNDING))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{name}[{', '.join(map(str, at))}] is {array[at]:g}; allowed are finite values in [{low:g}, {high:g}]"
        )
    return np.clip(array, low, high)


def _pair(early: Losses, full: Losses) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    left, right = checked(early, 0, 1, "early"), checked(full, 0, 1, "full")
    if left.shape != right.shape:
        raise ValueError(f"early has {len(left)} prompts, full has {len(right)}; they must be the same prompts")
    return left, right


def textual_consistency(distance: Losses) -> NDArray[np.float64]:
    """How far the early answer is from the full model's; no references needed.

    Schuster et al. (2022), "Confident Adaptive Language Modeling", textual consistency.

    Args:
        distance: D(Y_early, Y_full) of each prompt, [N], in [0, 1]: 1 - ROUGE-L F, 1 - token F1, or 1 if they differ.

    Returns:
        The losses, [N], in [0, 1].

    Raises:
        ValueError: A distance is NaN or outside [0, 1], or there are none.
    """
    return checked(distance, 0, 1, "distance")


def risk_consistency(early: Losses, full: Losses, *, signed: bool = False) -> NDArray[np.float64]:
    """How much worse than the full model's answer the early one is, against references.

    Schuster et al. (2022), "Confident Adaptive Language Modeling", risk consistency. Differs in being clipped at 0 for
    every prompt, so that better answers do not pay for worse ones and bounds for losses in [0, 1] apply. Clipping the
    mean instead is covered by no bound.

    Args:
        early: Task loss of the early answers in [0, 1], [N].
        full: The same of the full model's answers.
        signed: Do not clip. Only `wsr` and `hoeffding_signed` bound such losses.

    Returns:
        The losses, [N], in [0, 1]; with `signed` in [-1, 1].

    Raises:
        ValueError: A value is NaN or outside [0, 1], there are none, or the numbers of prompts differ.
    """
    left, right = _pair(early, full)
    difference = left - right
    return difference if signed else np.maximum(0.0, difference)


def tail(early: Losses, full: Losses, margin: float) -> NDArray[np.float64]:
    """Whether a prompt loses more than `margin` by leaving early.

    Its mean is a probability: "at most `tolerance` of the prompts lose more than `margin`", which says nothing about
    the mean of what is lost. The losses are 0 or 1, so `binomial` is exact.

    Args:
        early: Task loss of the early answers in [0, 1], [N].
        full: The same of the full model's answers.
        margin: What a prompt may lose, in [0, 1).

    Returns:
        0 or 1 for each prompt, [N].

    Raises:
        ValueError: The margin or a value is outside its range, there are none, or the numbers of prompts differ.
    """
    if not 0 <= margin < 1:
        raise ValueError(f"margin is {margin}; allowed are values in [0, 1)")
    left, right = _pair(early, full)
    return (left - right > margin + TIE).astype(np.float64)

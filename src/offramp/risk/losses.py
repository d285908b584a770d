"""What is lost by leaving early: how much worse one prompt's answer is, or a row's class, at each exit.

What is promised is the mean of these over prompts, so clipping and comparing happen per prompt, before any mean. The
full answer is that of the same decoding configuration with "never exit". With sampled answers, average each prompt's
losses over a fixed number of samples first.

Of classifiers: Jazbec et al. (2024), "Fast yet Safe: Early-Exiting with Risk Control", section 3, consistency and
performance gap of predictions, and the same of Brier scores for whole distributions. What an exit is compared with is
the reference: other probabilities of the same rows, such as those of the network's own last exit before its exits were
calibrated, or without any the last exit of those at hand, at which each loss is then 0. Ties between classes go to the
lower one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
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


def checked_confidences(confidences: Tensor, exits: int) -> Tensor:
    """The confidences [E, N] as they are; a ValueError if they are of another shape, of no rows, or NaN."""
    if confidences.ndim != 2 or len(confidences) != exits or not confidences.shape[1]:
        raise ValueError(f"confidences have shape {list(confidences.shape)}; {exits} exits x at least 1 row are needed")
    if bool(confidences.isnan().any()):
        exit_, row = confidences.isnan().nonzero()[0].tolist()
        raise ValueError(f"the confidence of row {row} at exit {exit_ + 1} is nan; it must be a number")
    return confidences


def _pair(early: Losses, full: Losses) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    left, right = checked(early, 0, 1, "early"), checked(full, 0, 1, "full")
    if left.shape != right.shape:
        raise ValueError(f"early has {len(left)} prompts, full has {len(right)}; they must be the same prompts")
    return left, right


# ---------------------------------------------------------------- of a prompt


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


# ---------------------------------------------------------------- of a row of a classifier, at each exit


def consistency(probabilities: Tensor, reference: Tensor | None = None) -> Tensor:
    """Whether an exit's class is another than the reference's; no labels needed.

    Args:
        probabilities: Of each exit, [E, N, C].
        reference: What it is compared with, [N, C]; None: the last exit.

    Returns:
        0 or 1, [E, N], float64.

    Raises:
        ValueError: The probabilities are none, or the reference is of other rows.
    """
    classes = _checked(probabilities).argmax(dim=-1)
    return (classes != _reference(probabilities, reference).argmax(dim=-1)).double()


def performance_gap(probabilities: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
    """1[ŷ_e ≠ y] - 1[ŷ_ref ≠ y] of labels y [N], else as `consistency`: how much more often an exit is wrong."""
    labels = _checked_labels(labels, _checked(probabilities))
    wrong = (probabilities.argmax(dim=-1) != labels).double()
    return wrong - (_reference(probabilities, reference).argmax(dim=-1) != labels).double()


def brier_gap(probabilities: Tensor, labels: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
    """How much worse an exit's distribution is than the reference, by half their Brier scores.

    Args:
        probabilities: Of each exit, [E, N, C].
        labels: Right classes, [N]; None: those the reference chooses, so that no labels are needed.
        reference: What it is compared with, [N, C]; None: the last exit.

    Returns:
        (Σ_c (p_e,c - t_c)² - Σ_c (p_ref,c - t_c)²) / 2 with t the one-hot label, [E, N], float64, in [-1, 1].

    Raises:
        ValueError: The probabilities are none, or the labels are no classes of as many rows.
    """
    p = _checked(probabilities).double()
    against = _reference(probabilities, reference).double()
    target = against.argmax(dim=-1) if labels is None else _checked_labels(labels, probabilities)
    both = torch.cat([p, against[None]])  # [E + 1, N, C]
    of_target = both.gather(-1, target.expand(both.shape[:2])[..., None])[..., 0]
    brier = (both**2).sum(dim=-1) - 2 * of_target + 1  # [E + 1, N]
    return (brier[:-1] - brier[-1]) / 2


# ---------------------------------------------------------------- under each threshold


def exits_under(thresholds: Sequence[float], confidences: Tensor) -> Tensor:
    """Places of exits, [Λ, N], under thresholds from safe to bold (infinity: never early), each for all exits."""
    if not thresholds or any(not a > b for a, b in zip(thresholds, thresholds[1:], strict=False)):
        raise ValueError(f"thresholds are {list(thresholds)}; numbers are needed, from safe to bold, so descending")
    checked_confidences(confidences, len(confidences))
    surest_yet = confidences.cummax(dim=0).values[:-1]
    return torch.stack([(surest_yet <= value).sum(dim=0) for value in confidences.new_tensor(thresholds)])


def losses_under(losses: Tensor, exits: Tensor) -> Tensor:
    """The losses of rows where they leave, [Λ, N], from those at each exit [E, N] and places of exits [Λ, N]."""
    return losses.gather(0, exits)


def _reference(probabilities: Tensor, given: Tensor | None) -> Tensor:
    """What exits are compared with, [N, C]."""
    if given is None:
        return probabilities[-1]
    if given.shape != probabilities.shape[1:]:
        raise ValueError(
            f"the reference has shape {list(given.shape)}; rows x classes are needed, {list(probabilities.shape[1:])}"
        )
    return _checked(given[None])[0]


def _checked(probabilities: Tensor) -> Tensor:
    if probabilities.ndim != 3 or 0 in probabilities.shape:
        raise ValueError(f"probabilities have shape {list(probabilities.shape)}; exits x rows x classes are needed")
    sums = probabilities.double().sum(dim=-1)
    wrong = (probabilities < 0).any(dim=-1) | ~((sums - 1).abs() < 1e-3)
    if bool(wrong.any()):
        e, row = wrong.nonzero()[0].tolist()
        raise ValueError(f"row {row} at exit {e + 1} has no probabilities: they must be at least 0 with sum 1")
    return probabilities


def _checked_labels(labels: Tensor, probabilities: Tensor) -> Tensor:
    rows, classes = probabilities.shape[1:]
    if labels.shape != (rows,) or bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"labels have shape {list(labels.shape)}; {rows} numbers in 0..{classes - 1} are needed")
    return labels

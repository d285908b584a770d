"""What a row of a classifier loses by leaving early, at each exit; and under each threshold.

Jazbec et al. (2024), "Fast yet Safe: Early-Exiting with Risk Control", section 3: consistency and performance gap of
predictions, and the same of Brier scores for whole distributions. Each is 0 at the last exit. Ties between classes go
to the lower one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.risk.budgets import checked_confidences

# ---------------------------------------------------------------- at each exit


def consistency(probabilities: Tensor) -> Tensor:
    """Whether an exit's class is another than the last exit's; no labels needed.

    Args:
        probabilities: Of each exit, [E, N, C].

    Returns:
        0 or 1, [E, N], float64.

    Raises:
        ValueError: The probabilities are none.
    """
    classes = _checked(probabilities).argmax(dim=-1)
    return (classes != classes[-1]).double()


def performance_gap(probabilities: Tensor, labels: Tensor) -> Tensor:
    """How much more often an exit is wrong than the last one: 1[ŷ_e ≠ y] - 1[ŷ_E ≠ y].

    Args:
        probabilities: Of each exit, [E, N, C].
        labels: Right classes, [N].

    Returns:
        -1, 0 or 1, [E, N], float64.

    Raises:
        ValueError: The probabilities are none, or the labels are no classes of as many rows.
    """
    wrong = (_checked(probabilities).argmax(dim=-1) != _checked_labels(labels, probabilities)).double()
    return wrong - wrong[-1]


def brier_gap(probabilities: Tensor, labels: Tensor | None = None) -> Tensor:
    """How much worse an exit's distribution is than the last one's, by half their Brier scores.

    Args:
        probabilities: Of each exit, [E, N, C].
        labels: Right classes, [N]; None: those the last exit chooses, so that no labels are needed.

    Returns:
        (Σ_c (p_e,c - t_c)² - Σ_c (p_E,c - t_c)²) / 2 with t the one-hot label, [E, N], float64, in [-1, 1].

    Raises:
        ValueError: The probabilities are none, or the labels are no classes of as many rows.
    """
    p = _checked(probabilities).double()
    target = p[-1].argmax(dim=-1) if labels is None else _checked_labels(labels, probabilities)
    of_target = p.gather(-1, target.expand(p.shape[:2])[..., None])[..., 0]
    brier = (p**2).sum(dim=-1) - 2 * of_target + 1  # [E, N]
    return (brier - brier[-1]) / 2


# ---------------------------------------------------------------- under each threshold


def exits_under(thresholds: Sequence[float], confidences: Tensor) -> Tensor:
    """Where rows leave under each of several thresholds, each the same one for all exits.

    Args:
        thresholds: From safe to bold, so descending; infinity: never leave early.
        confidences: Of each exit, [E, N].

    Returns:
        Places of exits, 0..E-1, [Λ, N], int64.

    Raises:
        ValueError: There are no thresholds, or they do not descend, or a confidence is NaN.
    """
    if not thresholds or any(not a > b for a, b in zip(thresholds, thresholds[1:], strict=False)):
        raise ValueError(f"thresholds are {list(thresholds)}; numbers are needed, from safe to bold, so descending")
    checked_confidences(confidences, len(confidences))
    surest_yet = confidences.cummax(dim=0).values[:-1]
    return torch.stack([(surest_yet <= value).sum(dim=0) for value in confidences.new_tensor(thresholds)])


def losses_under(losses: Tensor, exits: Tensor) -> Tensor:
    """The losses of rows where they leave.

    Args:
        losses: Of each exit, [E, N].
        exits: Places of exits under each threshold, [Λ, N].

    Returns:
        [Λ, N].
    """
    return losses.gather(0, exits)


# ---------------------------------------------------------------- bad input


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

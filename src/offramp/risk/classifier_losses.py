"""What a row of a classifier loses by leaving early, at each exit; and under each threshold.

Jazbec et al. (2024), "Fast yet Safe: Early-Exiting with Risk Control", section 3: consistency and performance gap of
predictions, and the same of Brier scores for whole distributions. What an exit is compared with is the reference: other
probabilities of the same rows, such as those of the network's own last exit before its exits were calibrated, or
without any the last exit of those at hand, at which each loss is then 0. Ties between classes go to the lower one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.risk.budgets import checked_confidences

# ---------------------------------------------------------------- at each exit


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


# ---------------------------------------------------------------- bad input


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

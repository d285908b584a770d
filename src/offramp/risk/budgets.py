"""Thresholds that make a batch of rows cost what it may cost: budgeted batch classification.

Huang et al. (2018), "Multi-Scale Dense Networks for Resource Efficient Image Classification" (MSDNet), section 5, as
used by Meronen et al. (2024), "Fixing Overconfidence in Dynamic Neural Networks". A number q stands for a budget: exit
e of E is to be taken by the share f_e = q^e / Σ_j q^j of the rows, so by more late ones the larger q is; the published
curves are at 39 of them, `QS`. Nothing here enforces the budget on other rows than those the thresholds come from:
always report the realised cost next to the one asked for.

Rows leave at the first exit whose confidence is above its threshold, strictly as everywhere in offramp. The published
rule is "at least the threshold": a threshold here is the next smaller number of the confidences' type, which comes to
the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.risk.losses import ROUNDING, TIE, checked_confidences

QS = tuple(p / 20 for p in range(1, 40))
"""The 39 budgets of the published protocol, from cheap to dear; 1 is the uniform one."""
_HALVINGS = 200


@dataclass(frozen=True)
class Budget:
    """A budget and the thresholds that meet it on the rows they come from.

    Attributes:
        q: Which budget; 0: all leave at the first exit, infinity: all run through.
        target: Asked cost of a row on average, Σ f_e·c_e.
        realised: Cost of a row on average, of those that the thresholds come from.
        thresholds: Of each exit, [E], of the confidences' type; infinity: nobody leaves; -infinity for the last exit,
            where all do.
    """

    q: float
    target: float
    realised: float
    thresholds: Tensor


# ---------------------------------------------------------------- shares and costs


def fractions(q: float, exits: int) -> Tensor:
    """The share of rows that is to leave at each of E exits: q^e / Σ_j q^j, [E]; a ValueError for q below 0."""
    if not q >= 0:
        raise ValueError(f"q is {q}; allowed are numbers from 0 (the first exit) to infinity (the last one)")
    if exits < 1:
        raise ValueError(f"the number of exits is {exits}; at least 1 is needed")
    place = torch.arange(exits, dtype=torch.float64)
    powers = q**place if q <= 1 else (1 / q) ** (exits - 1 - place)  # none overflows; 0^0 = 1
    return powers / powers.sum()


def target_cost(q: float, costs: Tensor) -> float:
    """Cost of a row on average if each exit is taken by its share, Σ f_e·c_e, in the costs' unit; grows with q."""
    costs = _checked_costs(costs)
    return float(fractions(q, len(costs)) @ costs)


def q_of(
    costs: Tensor, *, flops: float | None = None, share: float | None = None, full: float | None = None
) -> float:  # fmt: skip
    """The budget that asks for a given cost, by bisection.

    Args:
        costs: FLOPs of a row that leaves at each exit, [E], ascending.
        flops: FLOPs per row, on average; or
        share: the same as a share of the full cost.
        full: The full cost, that of the plain network, which earlier exits' heads are no part of; None: the last
            exit's. All that run through may cost more.

    Returns:
        q, from 0 (the first exit's cost) to infinity (the last one's).

    Raises:
        ValueError: The cost is below the first exit's or above the last one's, not exactly one of `flops` and `share`
            is given, or the costs are not positive and ascending.
    """
    costs = _checked_costs(costs)
    if (flops is None) == (share is None):
        raise ValueError(f"flops is {flops} and share is {share}; give one of them as the budget")
    first, last = float(costs[0]), float(costs[-1])
    full = last if full is None else full
    asked = flops if flops is not None else float(share or 0) * full
    if not first * (1 - ROUNDING) <= asked <= last * (1 + ROUNDING):  # as typed in
        given = f"{flops:g} FLOPs per row" if flops is not None else f"{share:g} of the full cost"
        raise ValueError(
            f"a budget of {given} cannot be met; allowed are {first:.8g} FLOPs per row ({first / full:.3g} of the full "
            f"cost: all leave at the first exit) to {last:.8g} ({last / full:.3g}: all run through)"
        )
    if asked <= first:
        return 0.0
    if asked >= last:
        return math.inf
    low, high = -700.0, 700.0  # of ln q
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if target_cost(math.exp(middle), costs) < asked else (low, middle)
    return math.exp(high)


# ---------------------------------------------------------------- thresholds


def fit(confidences: Tensor, costs: Tensor, q: float) -> Budget:
    """Thresholds under which each exit is taken by its share of these rows.

    Exit by exit, from the rows that are left: the threshold is the confidence of the k-th surest, k = ⌊n·f_e⌋ of all n
    rows, and all rows at least as sure leave, ties included. k = 0: nobody leaves. k is all that are left or more: all
    leave, also new rows if nobody is left. Differs there from the published code, which lets nobody leave where fewer
    than k are left; and in rounding n·f_e down by 1e-9 less, since shares are not exact in floats.

    Args:
        confidences: Of each exit and row, [E, N], of the very method that will be used: fit anew after any change of
            its calibration, its ensemble or its number of samples.
        costs: Of a row that leaves at each exit, [E], ascending.
        q: Which budget.

    Returns:
        The thresholds, and what they cost on these rows.

    Raises:
        ValueError: There are no rows, a confidence is NaN, the shapes do not match, the costs are not positive and
            ascending, or q is negative or NaN.
    """
    costs = _checked_costs(costs)
    confidences = checked_confidences(confidences, len(costs))
    exits, rows = confidences.shape
    shares = fractions(q, exits)
    left = torch.ones(rows, dtype=torch.bool, device=confidences.device)
    thresholds = confidences.new_full((exits,), -math.inf)
    for e in range(exits - 1):
        thresholds[e] = _threshold(confidences[e, left], math.floor(rows * float(shares[e]) + TIE))
        left &= confidences[e] <= thresholds[e]
    realised = float(costs[leave(confidences, thresholds).cpu()].mean())
    return Budget(q, float(shares @ costs), realised, thresholds)


def _threshold(confidences: Tensor, count: int) -> float | Tensor:
    """What the `count` surest of the rows that are left are above."""
    if count == 0:
        return math.inf
    if not len(confidences):
        return -math.inf
    surest = confidences.sort(descending=True, stable=True).values
    return torch.nextafter(surest[min(count, len(surest)) - 1], surest.new_tensor(-math.inf))


def leave(confidences: Tensor, thresholds: Tensor) -> Tensor:
    """The exit each row takes: the first one whose confidence is above its threshold, else the last one.

    Args:
        confidences: Of each exit and row, [E, N].
        thresholds: Of each exit, [E], of the same type; the last is not looked at.

    Returns:
        Places of exits, 0..E-1, [N], int64.

    Raises:
        ValueError: The shapes do not match, there are no rows, or a confidence is NaN.
    """
    confidences = checked_confidences(confidences, len(thresholds))
    above = confidences > thresholds[:, None].to(confidences)
    above[-1] = True
    return above.int().argmax(dim=0)  # the first of several


# ---------------------------------------------------------------- bad input


def _checked_costs(costs: Tensor) -> Tensor:
    costs = torch.as_tensor(costs, dtype=torch.float64).cpu()
    if (
        costs.ndim != 1
        or not len(costs)
        or not bool(((costs > 0) & costs.isfinite()).all() and (costs.diff() >= 0).all())
    ):
        raise ValueError(f"costs are {costs.tolist()}; one positive number per exit is needed, in ascending order")
    return costs

"""What methods do to each group: is a minority made to wait longer, or dropped earlier, and what does a student change?

A change of model is that from teacher to student, or from one student to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.metrics.groups import SMALLEST, Groups
from offramp.uncertainty.outputs import ExitOutputs


@dataclass(frozen=True)
class ExitsByGroup:
    """E exits and G groups; shares are in [0, 1].

    Attributes:
        names: Of the groups, G.
        counts: Rows of each, [G].
        costs: FLOPs up to each exit, [E].
        accuracy: Of each exit if all rows left there, [E, G].
        confidence: Mean largest probability of each exit, likewise, [E, G].
        exit_rate: Share of a group's rows that leave at each exit, [E, G]; columns add up to 1.
        early_accuracy: Accuracy of the rows that leave at each exit, [E, G]; NaN where none does.
        chosen_accuracy: Accuracy of a group, each row at the exit it leaves at, [G].
        depth: Mean number of the exit, counted from 1, [G].
        flops: Mean FLOPs, [G].
        average: Accuracy over all rows at their exits, and their mean FLOPs.
    """

    names: tuple[str, ...]
    counts: Tensor
    costs: Tensor
    accuracy: Tensor
    confidence: Tensor
    exit_rate: Tensor
    early_accuracy: Tensor
    chosen_accuracy: Tensor
    depth: Tensor
    flops: Tensor
    average: tuple[float, float]

    def worst(self, smallest: int = SMALLEST) -> tuple[str, float] | None:
        """Name and accuracy of the worst group at the chosen exits; None if all have fewer rows than `smallest`."""
        judged = [g for g in range(len(self.names)) if int(self.counts[g]) >= smallest]
        if not judged:
            return None
        at = min(judged, key=lambda g: float(self.chosen_accuracy[g]))
        return self.names[at], float(self.chosen_accuracy[at])


def exits_by_group(outputs: ExitOutputs, chosen: Tensor, groups: Groups, *, split: str) -> ExitsByGroup:
    """Who leaves where, and how well each group is served there.

    Args:
        outputs: Of all exits.
        chosen: The exit each row leaves at, in 0..E-1, [N], int64.
        groups: Of the rows.
        split: Its name, for messages.

    Returns:
        Accuracy, confidence, exit rates, depth and FLOPs by group.

    Raises:
        ValueError: A group has no row, or shapes do not agree.
    """
    if groups.rows != outputs.rows:
        raise ValueError(f"groups are of {groups.rows} rows, outputs of {outputs.rows}; give those of the same split")
    groups.require_rows(split)
    if chosen.shape != (outputs.rows,) or bool(((chosen < 0) | (chosen >= outputs.exits)).any()):
        raise ValueError(
            f"the chosen exits have shape {list(chosen.shape)}; one in 0..{outputs.exits - 1} for each of the "
            f"{outputs.rows} rows is needed"
        )
    members, counts = groups.members.double(), groups.counts
    right = (outputs.logits.argmax(-1) == outputs.labels).double()  # [E, N]
    confidence = outputs.logits.double().softmax(-1).amax(-1)
    left = (torch.arange(outputs.exits)[:, None] == chosen).double()  # [E, N]
    leavers = left @ members  # [E, G]
    at_exit = (right * left).sum(0)  # whether a row is right where it leaves, [N]
    cost = outputs.costs.double()[chosen]
    return ExitsByGroup(
        groups.names, counts, outputs.costs, right @ members / counts, confidence @ members / counts,
        leavers / counts, (right * left) @ members / leavers, at_exit @ members / counts,
        (chosen + 1).double() @ members / counts, cost @ members / counts, (float(at_exit.mean()), float(cost.mean())),
    )  # fmt: skip


@dataclass(frozen=True)
class BudgetByGroup:
    """One budget of many.

    Attributes:
        flops: Mean over all rows.
        average: Accuracy over all rows.
        worst: Accuracy of the worst group; None if all groups are too small.
        group: Its name; "" likewise.
        group_flops: Mean FLOPs of each group, [G].
    """

    flops: float
    average: float
    worst: float | None
    group: str
    group_flops: Tensor


def budgets_by_group(
    outputs: ExitOutputs, chosen: Sequence[Tensor], groups: Groups, *, split: str, smallest: int = SMALLEST
) -> list[BudgetByGroup]:
    """The worst group of `smallest` rows or more under each budget, by the exits [N] that rows leave at."""
    found = []
    for exits in chosen:
        table = exits_by_group(outputs, exits, groups, split=split)
        name, worst = table.worst(smallest) or ("", None)
        found.append(BudgetByGroup(table.average[1], table.average[0], worst, name, table.flops))
    return found


# ---------------------------------------------------------------- what a change of model does

ALL = "all rows"
RESAMPLES = 10_000


@dataclass(frozen=True)
class GroupChange:
    """The change of accuracy of one group.

    Attributes:
        name: Of the group, or `ALL`.
        n: Its rows.
        before: Accuracy of the first model.
        after: Accuracy of the second.
        low: Lower end of the interval of the change.
        high: Upper end.
    """

    name: str
    n: int
    before: float
    after: float
    low: float
    high: float

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0; if not, no difference was shown."""
        return self.low > 0 or self.high < 0


def group_changes(
    before: Tensor, after: Tensor, groups: Groups, *, split: str, seed: int = 0, units: Tensor | None = None
) -> list[GroupChange]:
    """Changes on the same rows, with paired percentile bootstrap intervals at 95 %.

    A resampled mean depends only on how many units of each kind are drawn, so these numbers are drawn, from their
    multinomial distribution; a kind is a sum of differences in {-1, 0, 1} and a number of rows.

    Args:
        before: Whether the first model is right, [N], bool.
        after: Whether the second is, [N], bool.
        groups: Of the N rows.
        split: Its name, for messages.
        seed: Of the draws.
        units: Rows with the same number are drawn together, such as renderings of one thing, [N]; None: each alone.

    Returns:
        The change over all rows, then of each group.

    Raises:
        ValueError: A group has no row, or numbers of rows differ.
    """
    if before.shape != after.shape or before.shape != (groups.rows,):
        raise ValueError(
            f"verdicts have shapes {list(before.shape)} and {list(after.shape)}; one for each of {groups.rows} rows is "
            "needed"
        )
    groups.require_rows(split)
    draw = np.random.default_rng(seed)
    everyone = torch.ones_like(before, dtype=torch.bool)
    found = []
    for name, inside in ((ALL, everyone), *zip(groups.names, groups.members.T, strict=True)):
        one, other = before[inside].double().numpy(), after[inside].double().numpy()
        of = torch.arange(len(one)) if units is None else units[inside]
        low, high = np.quantile(_resampled(other - one, of.numpy(), draw), [0.025, 0.975])
        found.append(GroupChange(name, len(one), float(one.mean()), float(other.mean()), float(low), float(high)))
    return found


def _resampled(
    differences: NDArray[np.float64], units: NDArray[np.int64], draw: np.random.Generator
) -> NDArray[np.float64]:
    """Means of the differences of as many units drawn with replacement, [RESAMPLES]."""
    _, place = np.unique(units, return_inverse=True)
    of_units = np.stack([np.bincount(place, differences), np.bincount(place)], axis=1)  # [units, sum and rows]
    kinds, counts = np.unique(of_units, axis=0, return_counts=True)
    n = len(of_units)
    sums, rows = (draw.multinomial(n, counts / n, size=RESAMPLES) @ kinds).T
    found: NDArray[np.float64] = sums / rows
    return found

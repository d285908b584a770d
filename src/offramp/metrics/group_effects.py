"""What methods do to each group: whom weights favour, who is made to wait or dropped early, what a student changes.

Weights: how many rows they touch, whom they favour, and whether they find the minority; and whether the readout they
come from has learnt anything, and how many rows its gate takes: else they are noise.
A change of model is that from teacher to student, or from one student to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.metrics.calibration import auroc
from offramp.metrics.groups import SMALLEST, Groups, mean_of
from offramp.metrics.intervals import binomial
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


# ---------------------------------------------------------------- what weights do


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
TOO_FEW = 0.005
"""Share of reweighted rows below which a readout has no errors left to weight."""


@dataclass(frozen=True)
class WeightDiagnostics:
    """The weights of one epoch.

    Attributes:
        reweighted: Share of the rows that weigh more than the lightest: a gate leaves all others at the same weight,
            which is 1, or less after a division by the mean.
        mean: Of all weights.
        quantiles: Of all weights, at `QUANTILES`.
        by_group: Mean weight of each group, by name; NaN for a group without rows; empty if groups are unknown.
        minority: Share of the rows that are minority; None: unknown, and so are the rest.
        precision: Share of the reweighted rows that are minority; None also if there are none.
        recall: Share of the minority that is reweighted; None also if there is none.
        auroc: Probability that a minority row weighs more than another, ties counting half; None also if all rows are
            minority, or none is.
    """

    reweighted: float
    mean: float
    quantiles: tuple[float, ...]
    by_group: dict[str, float]
    minority: float | None
    precision: float | None
    recall: float | None
    auroc: float | None

    @property
    def too_few(self) -> bool:
        """Whether so few rows are reweighted that weights do nothing: the readout is too deep or too strong."""
        return self.reweighted < TOO_FEW


def weight_diagnostics(
    weights: Tensor, groups: Groups | None = None, minority: Tensor | None = None
) -> WeightDiagnostics:  # fmt: skip
    """Look at weights.

    Args:
        weights: Of the N training rows, [N]; only their ratios count but for the mean and quantiles.
        groups: Of these rows; None: unknown.
        minority: Whether a row is of the minority, [N], bool, such as by `minority_rows`; None: unknown.

    Returns:
        The diagnostics.

    Raises:
        ValueError: There are no weights, one is negative or not finite, or numbers of rows differ.
    """
    if weights.ndim != 1 or not len(weights):
        raise ValueError(f"weights have shape {list(weights.shape)}; one per row is needed")
    bad = ~weights.isfinite() | (weights < 0)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"the weight of row {row} is {float(weights[row])}; a finite number from 0 on is needed")
    for what, rows in (("groups", groups and groups.rows), ("minority", None if minority is None else len(minority))):
        if rows is not None and rows != len(weights):
            raise ValueError(
                f"{what} are given for {rows} rows, weights for {len(weights)}; give those of the same rows"
            )
    w = weights.double()
    touched = w > w.min()
    quantiles = np.quantile(w.numpy(), QUANTILES)  # torch's takes at most 2^24 numbers
    by_group = {}
    if groups is not None:
        means = (w @ groups.members.double()) / groups.counts
        by_group = dict(zip(groups.names, means.tolist(), strict=True))
    share = precision = recall = area = None
    if minority is not None:
        minority = minority.bool()
        share = float(minority.double().mean())
        precision, recall = mean_of(minority[touched]), mean_of(touched[minority])
        area = auroc(w.numpy(), minority.double().numpy())
    return WeightDiagnostics(
        float(touched.double().mean()),
        float(w.mean()),
        tuple(quantiles.tolist()),
        by_group,
        share,
        precision,
        recall,
        area,
    )


def minority_rows(labels: Tensor, attribute: Tensor) -> Tensor:
    """Rows for which the shortcut from attribute to label, [N] from 0 on, fails, as far as counts tell.

    A class with a value of the attribute is minority if it has fewer rows than it would have if label and attribute
    were independent, and less than an equal share of its class: landbirds on water and waterbirds on land; entailed
    and neutral hypotheses with negation, but not contradictions without it. Unknown attributes, -1, never are.

    Returns:
        [N], bool.
    """
    known = attribute >= 0
    counts = torch.zeros(int(labels.max()) + 1, int(attribute.max()) + 1, dtype=torch.float64)
    counts.index_put_(
        (labels[known], attribute[known]), torch.ones(int(known.sum()), dtype=torch.float64), accumulate=True
    )
    expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum()
    values = (counts.sum(0) > 0).sum()
    minority = (counts < expected - 1e-9) & (counts < counts.sum(1, keepdim=True) / values)
    return known & minority[labels, attribute.clamp(min=0)]


# ---------------------------------------------------------------- the readout that weights come from


TOO_MANY = 1 - TOO_FEW
"""Share of gated rows above which a gate tells no rows apart."""


@dataclass(frozen=True)
class ReadoutDiagnostics:
    """A readout of one epoch.

    Attributes:
        accuracy: Share of the training rows, which it was taught on, that it answers rightly.
        chance: What that share would be if its answers, as often as it gives each, had nothing to do with the labels;
            of a constant answer the share of that class.
        batch: Rows of a step of the student, in which its weights act.
        gated: Share of the training rows that its gate takes; None: the gate takes all.
        empty: Whether all of its sets of classes were empty, so that all rows weigh 1; None: there are no sets.
    """

    accuracy: float
    chance: float
    batch: int
    gated: float | None
    empty: bool | None = None

    @property
    def near_chance(self) -> bool:
        """Whether in a batch it could not be told from chance, by Wilson's 95 % interval of so many rows."""
        share = binomial(round(self.accuracy * self.batch), self.batch, method="wilson")
        return bool(share.low <= self.chance)

    @property
    def too_many(self) -> bool:
        """Whether the gate takes nearly all rows, so that weights change the step's size and little else."""
        return self.gated is not None and self.gated > TOO_MANY

    @property
    def flags(self) -> tuple[str, ...]:
        """What is wrong with its weights, in words."""
        found = {"near chance": self.near_chance, "nearly all gated": self.too_many, "sets empty": bool(self.empty)}
        return tuple(words for words, holds in found.items() if holds)


def readout_diagnostics(
    answers: Tensor, labels: Tensor, batch: int, gated: Tensor | None, empty: bool | None = None
) -> ReadoutDiagnostics:  # fmt: skip
    """Look at answers [N] of a readout, labels [N], and the rows its gate takes, [N]; a step has `batch` rows."""
    classes = int(torch.maximum(answers.max(), labels.max())) + 1
    said, true = (torch.bincount(each, minlength=classes).double() / len(labels) for each in (answers, labels))
    share = None if gated is None else float(gated.double().mean())
    return ReadoutDiagnostics(float((answers == labels).double().mean()), float(said @ true), batch, share, empty)

"""What instance weights do: how many rows they touch, whom they favour, and whether they find the minority.

And whether the readout they come from has learnt anything, and how many rows its gate takes: else they are noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offramp.metrics.calibration import auroc
from offramp.metrics.groups import Groups, mean_of
from offramp.metrics.intervals import binomial

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

"""One threshold for all exits of a classifier that keeps a promise on what rows lose by leaving early.

P( mean loss of new rows <= `tolerance` ) >= 1 - `failure` over the draw of the calibration rows, which must be
independent, like the new ones, and used for nothing else. It is a promise about rows on average: not per class, per
group or per row; `certify_groups` makes one per group. Losses come from `offramp.risk.losses`, or are any
matrix of one per setting and row, such as "the set misses the class".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.risk import CRC, Promised, search
from offramp.risk.losses import checked, exits_under, losses_under
from offramp.runs.results import Result
from offramp.values import choice

NAMES = ("wsr", "hoeffding-bentkus", "binomial", CRC)
"""Bounds by name."""
SCHEMA = "offramp/classifier-certificate/2"

# ---------------------------------------------------------------- what is promised


@dataclass(frozen=True)
class RowPromise(Promised):
    """What is to hold for new rows.

    Attributes:
        loss: What the losses are called, such as "consistency": for the record.
        reference: What rows lose against, in words, such as "the network's own last exit"; None: the loss needs none,
            or it is the last setting's own.
        tolerance: What their mean is to stay below, in (0, 1).
        failure: Probability with which that may fail, in (0, 1); no part of conformal risk control.
        bound: One of `NAMES`. Only "wsr" lets rows that gain make up for others: the rest clip losses at 0, which
            keeps the promise and gives much away. "binomial" is exact, for losses that are 0 or 1.
    """

    loss: str
    tolerance: float = 0.05
    failure: float = 0.05
    bound: str = "wsr"
    reference: str | None = None

    def __post_init__(self) -> None:
        self.check_levels()
        choice("bound", self.bound, NAMES)

    def losses(self, trials: Trials) -> tuple[NDArray[np.float64], bool]:
        """Losses [Λ, N] for the bound, and whether some below 0 were clipped; a ValueError for NaN or above 1."""
        losses = checked(trials.losses, -math.inf, 1, ndim=2)
        clipped = self.bound != "wsr" and bool((losses < 0).any())
        return (np.maximum(losses, 0) if clipped else losses), clipped


# ---------------------------------------------------------------- what is known about settings


@dataclass(frozen=True)
class Trials:
    """Settings tried on rows, from safe to bold; the first is "never leave early".

    Attributes:
        thresholds: Threshold of each setting, [Λ], descending; the first is infinity.
        losses: Loss of each setting and row, [Λ, N], at most 1.
        exits: Where each row leaves, [Λ, N], 0..E-1.
        costs: FLOPs of a row that leaves at each exit, [E].
        full_cost: FLOPs of a row in the plain full network, which costs are relative to; None: what the last exit
            costs.
    """

    thresholds: tuple[float, ...]
    losses: Tensor
    exits: Tensor
    costs: Tensor
    full_cost: float | None = None

    def __post_init__(self) -> None:
        size = len(self.thresholds)
        if self.losses.ndim != 2 or len(self.losses) != size or self.exits.shape != self.losses.shape:
            raise ValueError(
                f"losses have shape {list(self.losses.shape)} and exits {list(self.exits.shape)}; {size} thresholds "
                "(settings) x rows are needed"
            )
        if not size or self.thresholds[0] != math.inf:
            raise ValueError(
                f"thresholds begin with {self.thresholds[:1]}; the first setting must be infinity, never leave early"
            )

    def take(self, rows: Tensor | NDArray[np.int64]) -> Trials:
        """The same settings on some of the rows."""
        rows = torch.as_tensor(rows)
        return Trials(self.thresholds, self.losses[:, rows], self.exits[:, rows], self.costs, self.full_cost)

    def cost(self, setting: int) -> float:
        """Cost of a row on average over that of the plain full network; above 1 where heads cost more than is saved."""
        full = float(self.costs[-1]) if self.full_cost is None else self.full_cost
        return float(self.costs.double()[self.exits[setting]].mean()) / full

    def shares(self, setting: int) -> list[float]:
        """Share of the rows that leave at each exit, [E]."""
        counts = torch.bincount(self.exits[setting], minlength=len(self.costs))
        return (counts.double() / self.exits.shape[1]).tolist()


def try_thresholds(
    thresholds: Sequence[float], confidences: Tensor, losses: Tensor, costs: Tensor, full_cost: float | None = None
) -> Trials:  # fmt: skip
    """What every threshold would do; "never leave early" is put first.

    Args:
        thresholds: Descending, chosen without a look at these rows (see `threshold_grid`).
        confidences: Confidence of each exit and row, [E, N].
        losses: Loss of each exit and row, [E, N], from `offramp.risk.losses`.
        costs: FLOPs of a row that leaves at each exit, [E].
        full_cost: FLOPs of a row in the plain full network; None: what the last exit costs.

    Returns:
        The settings with losses and exits.

    Raises:
        ValueError: The thresholds do not descend, or a confidence is NaN.
    """
    settings = (math.inf, *(t for t in thresholds if t != math.inf))
    exits = exits_under(settings, confidences)
    return Trials(settings, losses_under(losses, exits), exits, costs, full_cost)


def threshold_grid(confidences: Tensor, count: int = 50) -> tuple[float, ...]:
    """Thresholds at evenly spread ranks of other rows' confidences at the exits before the last.

    Args:
        confidences: [E, N], of the tune or threshold split, never of the rows that calibrate.
        count: How many, at most.

    Returns:
        Descending; under the last one all of these rows leave at the first exit.

    Raises:
        ValueError: There are fewer than 2 exits, no rows, or less than 2 thresholds are asked for.
    """
    if confidences.ndim != 2 or len(confidences) < 2 or not confidences.shape[1] or count < 2:
        raise ValueError(
            f"confidences have shape {list(confidences.shape)} and count is {count}; at least 2 exits, 1 row and 2 "
            "thresholds are needed"
        )
    ranked = confidences[:-1].flatten().sort(descending=True).values
    places = torch.linspace(0, len(ranked) - 1, count).round().long()
    lowest = torch.nextafter(ranked[-1], ranked.new_tensor(-math.inf))
    return tuple(dict.fromkeys([*ranked[places[:-1]].tolist(), float(lowest)]))


# ---------------------------------------------------------------- the certificate


@dataclass(frozen=True)
class RowCertificate(Result):
    """What is certified, and how it was found.

    Attributes:
        promise: What holds.
        certified: Whether anything does, if only for never leaving early.
        threshold: Rows leave at the first exit whose confidence is above; infinity: never early.
        index: Which setting that is; 0: never leave early.
        n: Calibration rows.
        seed: Seed of their order, which matters to betting.
        tests: Settings that were looked at: threshold (None: infinity), mean loss, p-value (for conformal risk control
            what is compared with the tolerance), cost over the plain full network's, passed.
        saving: 1 - cost over that of the plain full network, on the calibration rows; below 0 where it costs more.
        exit_shares: Share of the calibration rows that leave at each exit, [E].
        clipped: Whether negative losses were clipped at 0, for a bound that knows none.
        needed: If no early leaving is certified, about how many rows would certify the safest, with losses like these
            (`RowPromise.needed_like`); None: no number would, or none within reason.
    """

    schema = SCHEMA

    promise: RowPromise
    certified: bool
    threshold: float
    index: int
    n: int
    seed: int
    tests: tuple[dict[str, Any], ...]
    saving: float
    exit_shares: tuple[float, ...]
    clipped: bool
    needed: int | None

    def __repr__(self) -> str:
        p = self.promise
        found = f"rows leave above {self.threshold:g}" if self.index else "rows never leave early"
        return (
            f"RowCertificate({p.loss} loss at most {p.tolerance:g}, {self.n} rows, certified={self.certified}: {found})"
        )

    def table(self) -> str:
        """`words`: what is certified is a sentence."""
        return self.words()

    def _rows(self) -> Iterable[Any]:
        """A row per setting that was looked at."""
        return self.tests

    def to_dict(self) -> dict[str, Any]:
        """JSON values; infinity is None, and conformal risk control has no failure probability."""
        values = super().to_dict()
        if self.promise.bound == CRC:
            values["promise"]["failure"] = None
        return values

    def words(self) -> str:
        """The statement in plain English."""
        p = self.promise
        against = "" if p.reference is None else f" against {p.reference}"
        wanted = f"a mean {p.loss} loss of at most {p.tolerance:g}{against}"
        if not self.index:
            state = "only for never leaving early" if self.certified else "for no setting, so rows never leave early"
            hint = (
                "no number of rows would change that" if self.needed is None else f"about {self.needed} rows would do"
            )
            words = f"By {self.n} rows {wanted} is certified {state}: {hint}, if the safest threshold's loss stays."
            return words if self.certified or not self.loss_of_never else f"{words} {NOT_EVEN}"
        how = (
            "on average over calibrations, while a single one may exceed it"
            if p.bound == CRC
            else f"with probability at least {1 - p.failure:g} over the draw of the {self.n} calibration rows"
        )
        return (
            f"New rows that leave at the first exit with confidence above {self.threshold:.6g} have {wanted}, {how} "
            f"(bound {p.bound}). On the calibration rows that {costs_words(1 - self.saving)}."
        )

    @property
    def loss_of_never(self) -> float:
        """Mean loss of never leaving early on the calibration rows; above 0 if the last exit is not the reference."""
        return float(self.tests[0]["loss"]) if self.tests else 0.0


NOT_EVEN = (
    "That the rows never leave early is not certified either: the posterior's last exit is an ensemble or another "
    "distribution than the one it is compared with. Take a posterior without the ensemble, or promise against it."
)
"""Behind a certificate of nothing, where the last exit itself loses something."""


def costs_words(cost: float) -> str:
    """What a cost over the plain full network's means, as the rest of a sentence."""
    if cost <= 1:
        return f"saves {1 - cost:.1%} of the plain full network's FLOPs"
    return f"costs {cost - 1:.1%} more than the plain full network's FLOPs"


def certify(trials: Trials, promise: RowPromise, *, seed: int = 0) -> RowCertificate:
    """The boldest threshold for which the promise holds.

    One sequence of `offramp.risk.search`, of thresholds from safe to bold: the last that passed is taken, which is the
    cheapest of them, never one behind a gap.

    Args:
        trials: Settings on the calibration rows; chosen, like the probabilities, without a look at these rows.
        promise: What is to hold.
        seed: Seed of the order of rows.

    Returns:
        The threshold and what is known about it.

    Raises:
        ValueError: A loss is outside of what the bound knows.
    """
    losses, clipped = promise.losses(trials)
    losses = losses[:, np.random.default_rng(seed).permutation(losses.shape[1])]
    outcome = search([range(len(losses))], losses.__getitem__, lambda setting: -setting, promise)
    index = outcome.selected or 0
    tests = tuple(
        {
            "threshold": None if threshold == math.inf else threshold, "loss": test.loss, "p_value": test.p_value,
            "cost": trials.cost(test.setting), "passed": test.passed,
        }
        for test in outcome.tests
        for threshold in [trials.thresholds[test.setting]]
    )  # fmt: skip
    safest = losses[min(1, len(losses) - 1)]
    return RowCertificate(
        promise, outcome.selected is not None, trials.thresholds[index], index, losses.shape[1], seed, tests,
        1 - trials.cost(index), tuple(trials.shares(index)), clipped,
        None if index else promise.needed_like(promise.failure, safest, seed),
    )  # fmt: skip


def certify_groups(trials: Trials, groups: Tensor, promise: RowPromise, *, seed: int = 0) -> dict[int, RowCertificate]:
    """A certificate per group of rows, all of which hold together with probability 1 - failure.

    Args:
        trials: As for `certify`.
        groups: A number per row, [N].
        promise: What is to hold in each group.
        seed: Seed of the order of rows.

    Returns:
        By group; each has its own threshold, and its promise its share of `failure`.
    """
    found = sorted(set(groups.tolist()))
    share = replace(promise, failure=promise.failure / len(found))
    return {g: certify(trials.take((groups == g).nonzero()[:, 0]), share, seed=seed) for g in found}

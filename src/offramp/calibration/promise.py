"""What is promised: how much prompts may lose by leaving early, in which sense, and how sure that is to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from offramp.evaluation.record_file import Record
from offramp.metrics.text import METRICS
from offramp.risk import (
    BOUNDS,
    Bound,
    risk_consistency,
    samples_needed,
    samples_needed_like,
    tail,
    textual_consistency,
    wsr,
)
from offramp.risk.bounds import check_level
from offramp.values import listed

CRC = "crc"
KINDS = {"risk": "hoeffding-bentkus", "textual": "hoeffding-bentkus", "signed": "wsr", "tail": "binomial"}
"""Kinds of losses, and the bound that suits each."""
NAMES = ("hoeffding", "hoeffding-bentkus", "binomial", "wsr", CRC)
"""Bounds by name; "crc" is conformal risk control, which bounds the mean and promises no failure probability."""
UNITS = ("prompt", "group")
_BISECTIONS = 40


@dataclass(frozen=True)
class Promise:
    """The statement that a policy is to be certified for: P(E[loss of a new prompt] <= tolerance) >= 1 - failure.

    Attributes:
        metric: Which metric losses are made of: 1 - metric is a loss in [0, 1].
        tolerance: What the mean loss of new prompts is to stay below, in (0, 1).
        failure: Probability with which that may fail, over the draw of the certification prompts, in (0, 1).
        kind: "risk" (how much worse than the full model's the answer is against references, clipped at 0 prompt by
            prompt), "signed" (the same without clipping), "tail" (whether it is worse by more than `margin`), or
            "textual" (how far the answer is from the full model's; no references needed).
        margin: Of "tail", in [0, 1).
        bound: One of `NAMES`; None: the one that suits the kind.
        unit: What is drawn independently: each "prompt", or "group"s of prompts (questions on one article), whose mean
            losses then count as one loss each.
    """

    metric: str
    tolerance: float = 0.05
    failure: float = 0.05
    kind: str = "risk"
    margin: float | None = None
    bound: str | None = None
    unit: str = "prompt"

    def __post_init__(self) -> None:
        check_level("tolerance", self.tolerance)
        check_level("failure", self.failure)
        for name, value, allowed in (
            ("metric", self.metric, METRICS), ("kind", self.kind, KINDS), ("unit", self.unit, UNITS),
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed are {listed(value, allowed)}")
        if self.bound is None:
            object.__setattr__(self, "bound", KINDS[self.kind])
        if (self.kind == "tail") != (self.margin is not None):
            raise ValueError(
                f"margin is {self.margin} and kind is {self.kind!r}; 'tail', and only that, needs a margin"
            )
        if self.margin is not None and not 0 <= self.margin < 1:
            raise ValueError(f"margin is {self.margin}; allowed are values in [0, 1)")
        self._check_bound()

    def _check_bound(self) -> None:
        allowed = ("wsr", "hoeffding") if self.kind == "signed" else NAMES
        if self.bound not in allowed:
            raise ValueError(f"bound is {self.bound!r}; allowed for {self.kind!r} losses are {', '.join(allowed)}")
        coins = (self.kind == "tail" or self.metric == "exact_match") and self.unit == "prompt"
        if self.bound == "binomial" and not coins:
            raise ValueError(
                "the binomial bound is for losses that are 0 or 1: kind 'tail' or metric exact_match, prompt by prompt;"
                " use hoeffding-bentkus or wsr"
            )

    # ------------------------------------------------------------ losses

    def losses(self, early: Sequence[Record], full: Sequence[Record]) -> NDArray[np.float64]:
        """The loss of each example.

        Args:
            early: Records under a policy.
            full: Records of the full model, of the same examples in the same order.

        Returns:
            [N], in [0, 1]; for "signed" in [-1, 1].

        Raises:
            ValueError: The records do not belong together, or a score is outside [0, 1].
        """
        if [record.id for record in early] != [record.id for record in full]:
            raise ValueError("the records are of different examples; compare the same ones")
        if self.kind == "textual":
            return textual_consistency([self._distance(a.text, b.text) for a, b in zip(early, full, strict=True)])
        mine, theirs = ([1 - record.scores[self.metric] for record in records] for records in (early, full))
        if self.kind == "tail":
            assert self.margin is not None
            return tail(mine, theirs, self.margin)
        return risk_consistency(mine, theirs, signed=self.kind == "signed")

    def _distance(self, text: str, other: str) -> float:
        """1 - metric; equal texts are at distance 0 even where the metric finds nothing to compare."""
        return 0.0 if text == other else 1 - METRICS[self.metric](text, [other])

    def unit_of(self, groups: Sequence[str]) -> NDArray[np.intp]:
        """The unit of each example, counted from 0: every prompt is one, or every group.

        Args:
            groups: Of each example.

        Returns:
            [N].
        """
        if self.unit == "prompt":
            return np.arange(len(groups))
        return np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]

    def units(self, losses: NDArray[np.float64], groups: Sequence[str], seed: int) -> NDArray[np.float64]:
        """One loss for each independent draw, in an order that the losses have no part in.

        Args:
            losses: Of each example, [N].
            groups: Of each example.
            seed: Of the order, which matters to betting (`wsr`).

        Returns:
            [N], or for groups one mean per group.
        """
        index = self.unit_of(groups)
        losses = np.bincount(index, losses) / np.bincount(index)
        return losses[np.random.default_rng(seed).permutation(len(losses))]

    # ------------------------------------------------------------ tests

    def bound_at(self, level: float) -> Bound:
        """The p-value, for a test at `level`. Conformal risk control has none; Hoeffding-Bentkus stands for it."""
        if self.bound == "wsr":
            return partial(wsr, failure=level)
        if self.kind == "signed":
            return BOUNDS["hoeffding-signed"]
        return BOUNDS["hoeffding-bentkus" if self.bound == CRC else str(self.bound)]

    def needed(self, level: float, mean: float = 0.0) -> int | None:
        """How many draws certify a setting whose mean loss turns out to be `mean`; None if no number does.

        Args:
            level: Of the test.
            mean: Mean loss; 0: the fewest that can certify anything.

        Returns:
            The number.
        """
        if self.bound != CRC:
            return samples_needed(self.bound_at(level), self.tolerance, level, mean)
        if mean >= self.tolerance:
            return None
        return math.ceil((1 - self.tolerance) / (self.tolerance - mean) - 1e-9)  # (n · mean + 1) / (n + 1) <= tolerance

    def needed_like(self, level: float, losses: NDArray[np.float64], seed: int) -> int | None:
        """About how many draws certify a setting whose losses stay like the ones observed; None if no number does.

        Args:
            level: Of the test.
            losses: Of the draws there are. Betting (`wsr`) looks at all of them, see
                `offramp.risk.samples_needed_like`; other bounds at their mean only.
            seed: Of the shuffles of the former.

        Returns:
            The number.
        """
        if self.bound == "wsr":
            return samples_needed_like(self.bound_at(level), losses, self.tolerance, level, seed=seed)
        return self.needed(level, float(losses.mean()))

    def upper_limit(self, losses: NDArray[np.float64]) -> float:
        """What the mean loss of new prompts is below with probability 1 - failure, by these losses and the same bound.

        Args:
            losses: Of draws that had no part in choosing the policy.

        Returns:
            The smallest tolerance they would certify, found by bisection; 1 if none.
        """
        bound, low, high = self.bound_at(self.failure), 0.0, 1.0
        for _ in range(_BISECTIONS):  # p-values fall as the tolerance grows
            middle = (low + high) / 2
            low, high = (low, middle) if bound(losses, middle) <= self.failure else (middle, high)
        return high

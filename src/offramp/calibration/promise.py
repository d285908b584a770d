"""What is promised: how much prompts may lose by leaving early, in which sense, and how sure that is to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.evaluation.record_file import Record
from offramp.metrics.text import METRICS
from offramp.risk import CRC, Promised, risk_consistency, tail, textual_consistency
from offramp.values import choice

KINDS = {"risk": "hoeffding-bentkus", "textual": "hoeffding-bentkus", "signed": "wsr", "tail": "binomial"}
"""Kinds of losses, and the bound that suits each."""
NAMES = ("hoeffding", "hoeffding-bentkus", "binomial", "wsr", CRC)
"""Bounds by name; "crc" is conformal risk control, which bounds the mean and promises no failure probability."""
UNITS = ("prompt", "group")


@dataclass(frozen=True)
class Promise(Promised):
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
        self.check_levels()
        for name, value, allowed in (
            ("metric", self.metric, METRICS), ("kind", self.kind, KINDS), ("unit", self.unit, UNITS),
        ):  # fmt: skip
            choice(name, value, allowed)
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

    @property
    def is_signed(self) -> bool:
        """Whether losses are in [-1, 1]."""
        return self.kind == "signed"

    # ------------------------------------------------------------ losses

    def losses(self, early: Sequence[Record], full: Sequence[Record]) -> NDArray[np.float64]:
        """The loss of each example, [N], in [0, 1], of "signed" in [-1, 1]; a ValueError for other examples."""
        if [record.id for record in early] != [record.id for record in full]:
            raise ValueError("the records are of different examples; compare the same ones")
        if self.kind == "textual":
            return textual_consistency([self.distance(a.text, b.text) for a, b in zip(early, full, strict=True)])
        mine, theirs = ([1 - record.scores[self.metric] for record in records] for records in (early, full))
        if self.kind == "tail":
            assert self.margin is not None
            return tail(mine, theirs, self.margin)
        return risk_consistency(mine, theirs, signed=self.kind == "signed")

    def distance(self, text: str, other: str) -> float:
        """1 - metric of two texts, in [0, 1]; equal ones are at 0 even where the metric finds nothing to compare."""
        return 0.0 if text == other else 1 - METRICS[self.metric](text, [other])

    def unit_of(self, groups: Sequence[str]) -> NDArray[np.intp]:
        """The unit of each of N examples, counted from 0, [N]: every prompt is one, or every group."""
        if self.unit == "prompt":
            return np.arange(len(groups))
        return np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]

    def units(self, losses: NDArray[np.float64], groups: Sequence[str], seed: int) -> NDArray[np.float64]:
        """One loss per independent draw (of a group its mean), in an order by the seed in which losses have no part."""
        index = self.unit_of(groups)
        losses = np.bincount(index, losses) / np.bincount(index)
        return losses[np.random.default_rng(seed).permutation(len(losses))]

"""What is asked of a calibration: the promise, the cost to minimise, and whether there is anything to lose.

A promise says how much prompts may lose by leaving early, in which sense, and how sure that is to be. Costs are over
the full model's on the same prompts, of records made of both. Per generated token, a cost is what was spent behind the
prompt over the tokens generated there, so that neither short prompts nor short answers save anything: only exits do.
All are ratios of sums over prompts, not means of ratios.

A loss is never larger than what the full model scores: wherever it scores 0, or the metric cannot read the texts, every
policy "loses nothing". The room of a prompt is the most that any policy can lose on it. A promise is made only if it is
sure that the mean room of prompts is above the tolerance, so that a worthless policy would break it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from offramp.evaluation.record_file import Record
from offramp.evaluation.summary import later_flops, later_seconds, later_tokens, turns
from offramp.metrics.text import METRICS, reads, tokenisers
from offramp.risk import CRC, Promised, hoeffding_bentkus, risk_consistency, tail, textual_consistency
from offramp.values import choice

if TYPE_CHECKING:
    from offramp.tasks import Example

KINDS = ("risk", "textual", "signed", "tail")
"""Kinds of losses."""
NAMES = ("hoeffding", "hoeffding-bentkus", "binomial", "wsr", CRC)
"""Bounds by name; "crc" is conformal risk control, which bounds the mean and promises no failure probability."""
UNITS = ("prompt", "group")
MEASURES = {
    "flops-per-token": "FLOPs per generated token",
    "flops": "FLOPs, prompts included",
    "seconds-per-token": "seconds per generated token",
    "seconds": "seconds, prompts included",
}
"""What can be minimised, in words."""
PER_TOKEN = "flops-per-token"
NO_LESS = 1.0
"""The cost of never leaving early: a policy at this cost or above does not pay."""


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
        bound: One of `NAMES`; None: "binomial" where losses are 0 or 1 (kind "tail" or metric exact_match, prompt by
            prompt), for which it is exact, "wsr" for "signed", else "hoeffding-bentkus".
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
            suited = "wsr" if self.is_signed else "binomial" if self._tosses else "hoeffding-bentkus"
            object.__setattr__(self, "bound", suited)
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
        if self.bound == "binomial" and not self._tosses:
            raise ValueError(
                "the binomial bound is for losses that are 0 or 1: kind 'tail' or metric exact_match, prompt by prompt;"
                " use hoeffding-bentkus or wsr"
            )

    @property
    def _tosses(self) -> bool:
        """Whether losses are 0 or 1."""
        return (self.kind == "tail" or self.metric == "exact_match") and self.unit == "prompt" and not self.is_signed

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


@dataclass(frozen=True)
class Spent:
    """What each prompt cost under a setting, and what the sums of that are divided by.

    Attributes:
        amounts: FLOPs or seconds, [N].
        counts: Tokens that amounts are per, [N]; ones where they are per prompt.
    """

    amounts: NDArray[np.float64]
    counts: NDArray[np.float64]

    def over(self, full: Spent, rows: NDArray[np.intp] | slice = slice(None)) -> float:
        """This over the full model's cost of these rows, each as often as named; 1 if one has no token of its own."""
        mine, theirs = ((s.amounts[rows].sum(), s.counts[rows].sum()) for s in (self, full))
        if not (mine[1] and theirs[0] and theirs[1]):
            return NO_LESS
        return float(mine[0] * theirs[1] / (mine[1] * theirs[0]))


def is_timed(measure: str) -> bool:
    """Whether a measure is of seconds, which compare only between arms that took turns."""
    return measure.startswith("seconds")


def spent(records: Sequence[Record], measure: str) -> Spent:
    """Amounts and counts that records of one setting have of a measure, one of `MEASURES`."""
    counts = np.ones(len(records))
    if measure == "flops":
        return Spent(np.array([float(r.flops) for r in records]), counts)
    if measure == "seconds":
        return Spent(np.array([r.seconds for r in records]), counts)
    later = later_flops if measure == PER_TOKEN else later_seconds
    return Spent(np.array([later(r) for r in records]), np.array([float(later_tokens(r)) for r in records]))


def cost(records: Sequence[Record], full: Sequence[Record], measure: str) -> float:
    """What a setting costs over the full model's; a ValueError for seconds that were not measured in turns."""
    rows: NDArray[np.intp] | slice = slice(None)
    if is_timed(measure):
        used = turns(records, full)
        if used is None:
            raise ValueError(
                f"the seconds of {records[0].arm} were not measured in turns with the full model's, so that they do "
                "not compare (answers of another calibration are in the folder); give another folder"
            )
        rows = np.flatnonzero(used)
    return spent(records, measure).over(spent(full, measure), rows)


@dataclass(frozen=True)
class Room:
    """What policies can lose on the certification prompts.

    Attributes:
        mean: Mean of the most that a prompt (or group, as the promise counts) can lose.
        none: Share of the prompts on which nothing can be lost.
        unread: Share of the prompts whose references (for textual losses and without references, whose answer by the
            full model) the metric cannot read, see `offramp.metrics.text.reads`.
        p_value: Of "the mean room of new prompts is at most the tolerance".
        tokeniser: What divides texts for the metric; None: it looks at characters or whole texts.
    """

    mean: float
    none: float
    unread: float
    p_value: float
    tokeniser: str | None

    def suffices(self, promise: Promise) -> bool:
        """Whether a worthless policy would break the promise, as far as these prompts can tell."""
        return self.p_value <= promise.failure

    @staticmethod
    def tested(mean: float, n: int, promise: Promise) -> float:
        """The p-value of "the mean room of new prompts is at most the tolerance", from that of n draws."""
        return hoeffding_bentkus(np.full(n, 1 - mean), 1 - promise.tolerance)

    def words(self, promise: Promise) -> str:
        """What there is to lose, in one sentence."""
        p = promise
        if p.kind == "textual":
            what = f"The full model's answer is empty, or not a text that {p.metric} can read,"
            text = f"{what} on {self.none:.1%} of the certification prompts."
        elif p.kind == "tail":
            text = f"The full model scores at most {p.margin} of {p.metric}, so that no policy can lose more, on "
            text += f"{self.none:.1%} of the certification prompts."
        else:
            text = f"The full model itself scores {self.mean:.3g} of {p.metric}, the most that any policy can lose; on "
            text += f"{self.none:.1%} of the certification prompts it scores 0."
        return text

    def refusal(self, promise: Promise) -> str:
        """Why nothing is promised, and what to do."""
        p, found = promise, self.words(promise)
        loses = f"lose {self.mean:.3g} on average" if p.kind != "tail" else f"lose that much on {self.mean:.1%} of them"
        why = f"{found} A policy whose answers are worth nothing would {loses}, which is not shown to be more than the "
        why += f"tolerance of {p.tolerance:g}: every policy would keep such a promise."
        if self.unread > 0.5:
            other = "chrf, which reads every script and sign" if p.metric != "chrf" else "examples with a text in them"
            return (
                f"{why} {p.metric} cannot read the texts of {self.unread:.0%} of the prompts (such a text does not "
                f"even match itself): use another metric, such as {other}."
            )
        if p.kind == "textual":
            return f"{why} Give prompts that the full model answers, or another metric."
        return (
            f"{why} Give prompts that the full model answers well, a model trained for the task, a metric it scores "
            "in, or a smaller tolerance; or ask for --kind textual, which compares with the full model's own answers."
        )


def room_of(promise: Promise, full: Sequence[Record], examples: Sequence[Example], seed: int) -> Room:
    """The room that the full model's answers to these examples, in their order, leave."""
    texts = [
        example.references if example.references and promise.kind != "textual" else (record.text,)
        for record, example in zip(full, examples, strict=True)
    ]
    read = np.array([any(reads(promise.metric, text) for text in some) for some in texts])
    if promise.kind == "textual":
        most = (read & np.array([record.text.strip() != "" for record in full])).astype(float)
    else:
        scores = np.array([record.scores[promise.metric] for record in full])
        most = scores if promise.margin is None else (scores > promise.margin).astype(float)
    units = promise.units(most, [record.group for record in full], seed)
    mean = float(units.mean())
    return Room(
        mean=mean,
        none=float((most <= 0).mean()),
        unread=float((~read).mean()),
        p_value=Room.tested(mean, len(units), promise),
        tokeniser=tokenisers([promise.metric], [text for some in texts for text in some]).get(promise.metric),
    )

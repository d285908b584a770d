"""Is the promise kept? Calibrations repeated over random splits, from answers that are already there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.promise import Promise, Spent
from offramp.metrics.intervals import binomial
from offramp.risk import CRC
from offramp.risk.search import judged, recalibrated
from offramp.runs.results import Result
from offramp.tasks import split_groups

if TYPE_CHECKING:
    from offramp.tasks import Example

Floats = NDArray[np.float64]


SCHEMA = "offramp/calibrate-validation/2"
"""Version 1 had no draws with replacement: its count over the pool was of splits, see `docs/evaluation.md`."""


@dataclass(frozen=True)
class Validation(Result):
    """Counts over repeated calibrations: from draws with replacement, which test the promise, and from splits.

    Attributes:
        promise: What was promised each time.
        repeats: Calibrations R of each sort.
        pool: Examples that were drawn from, and divided.
        drawn: Units of the promise (prompts or groups) drawn from the pool, independently and with replacement, for
            each calibration of the first sort. The pool is the population of these draws.
        exceeded_population: Calibrations of the first sort whose policy's mean loss over the pool is above the
            tolerance: promised for at most the share `failure` in the long run.
        uncertified_drawn: Calibrations of the first sort that certified nothing that is cheaper than the full model.
        loss_population: Mean over the first sort of their policies' mean losses over the pool, with 0 where nothing was
            certified: what conformal risk control promises about.
        certifying: Examples that certified in a split, on average; the rest of the pool was held out.
        exceeded_held_out: Splits whose policy's mean loss over the held-out part is above the tolerance. Nothing is
            promised about it: it has the noise of the held-out part too, which is unlucky where the other is lucky.
        uncertified: Splits that certified nothing, likewise; the full model exceeds nothing.
        loss: Mean of the splits' held-out mean losses; 0 of those that certified nothing.
        flops_ratio: Mean of the splits' held-out costs over the full model's; 1 of those that certified nothing.
        chosen: In how many splits each setting was selected, by its number.
        cost: What costs are, in words.
    """

    schema = SCHEMA

    promise: Promise
    repeats: int
    pool: int
    drawn: int
    exceeded_population: int
    uncertified_drawn: int
    loss_population: float
    certifying: float
    exceeded_held_out: int
    uncertified: int
    loss: float
    flops_ratio: float
    chosen: dict[int, int]
    cost: str = "FLOPs"

    def __repr__(self) -> str:
        return (
            f"Validation({self.repeats} calibrations by {self.drawn} {self.promise.unit}s from a pool of {self.pool})"
        )

    def table(self) -> str:
        """`words`: there are two counts only."""
        return self.words()

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the exact intervals of both counts."""
        intervals = {
            f"{name}_interval": binomial(getattr(self, name), self.repeats).ends
            for name in ("exceeded_population", "exceeded_held_out")
        }
        return {**super().to_dict(), **intervals}

    def words(self) -> str:
        """The counts next to the promise, and how to read them."""
        p, held_out = self.promise, self.pool - self.certifying
        if p.bound == CRC:
            promised, average = "nothing is promised", f" (promised: at most {p.tolerance:g})"
        else:
            promised, average = f"promised: at most {p.failure:.1%}", ""
        return "\n".join(
            [
                f"{self.repeats} calibrations by {self.drawn} {p.unit}s drawn with replacement from the pool of "
                f"{self.pool} prompts:",
                f"  mean loss of the pool above {p.tolerance:g}: {self._share(self.exceeded_population)}; {promised}",
                f"  nothing certified: {self.uncertified_drawn} of {self.repeats}",
                f"  mean loss of the pool, on average {self.loss_population:.3g}{average}",
                f"{self.repeats} calibrations by random splits of the pool, about {self.certifying:.0f} prompts to "
                f"certify and {held_out:.0f} held out:",
                f"  mean loss of the held-out part above {p.tolerance:g}: {self._share(self.exceeded_held_out)}",
                f"  nothing certified: {self.uncertified} of {self.repeats}",
                f"  mean loss held out {self.loss:.3g}; {self.cost} {self.flops_ratio:.3f} of the full model's",
                READING.format(held_out=held_out),
            ]
        )

    def _share(self, count: int) -> str:
        low, high = binomial(count, self.repeats).ends
        return f"{count} of {self.repeats} ({count / self.repeats:.1%}, exact 95 % interval {low:.1%} to {high:.1%})"


READING = (
    "The first count is what the promise is about, with the pool in the place of all prompts there are: draws with "
    "replacement are independent and like the pool. It says nothing of prompts unlike the pool. The second has the "
    "noise of {held_out:.0f} held-out prompts too, and a split that is lucky in certifying leaves the unlucky prompts "
    "to be held out: it may be larger with the promise kept. The splits share their prompts, so its interval is about "
    "the splitting, not about other data."
)
"""How both counts are to be read."""


def validate(
    examples: Sequence[Example],
    losses: Sequence[Floats],
    spent: Sequence[Spent],
    full: Spent,
    sequences: Sequence[Sequence[int]],
    promise: Promise,
    *,
    share: float,
    repeats: int,
    seed: int = 0,
    below: float = math.inf,
    cost: str = "FLOPs",
) -> Validation:
    """Repeat a calibration over draws with replacement and over random splits. What the tuning part chose stays.

    Args:
        examples: The pool of N, divided by group.
        losses: Of each setting, [S][N]. Settings in no sequence are not looked at.
        spent: What each setting cost, of N examples.
        full: Of the full model.
        sequences: As for `offramp.risk.search`.
        promise: What each calibration is to certify.
        share: Of the examples that certify, in (0, 1); as many units are drawn with replacement as this share of them.
        repeats: Calibrations of each sort.
        seed: Of the draws and the splits.
        below: As for `offramp.risk.search`.
        cost: What was spent, in words.

    Returns:
        The counts.

    Raises:
        ValueError: No repeats, or fewer than two groups.
    """
    if repeats < 1:
        raise ValueError(f"{repeats} repeats were asked for; ask for at least 1 (200 or more tell something)")
    pool = _Pool(examples, losses, spent, full, sequences, promise, below)
    return Validation(
        promise=promise, repeats=repeats, pool=len(examples), cost=cost, **pool.draws(share, repeats, seed),
        **pool.splits(share, range(seed, seed + repeats)),
    )  # fmt: skip


@dataclass(frozen=True)
class _Pool:
    """What calibrations are repeated on; the fields are arguments of `validate`."""

    examples: Sequence[Example]
    losses: Sequence[Floats]
    spent: Sequence[Spent]
    full: Spent
    sequences: Sequence[Sequence[int]]
    promise: Promise
    below: float

    def draws(self, share: float, repeats: int, seed: int) -> dict[str, Any]:
        """Units drawn independently from the pool, which then is the population."""
        index = self.promise.unit_of([example.group for example in self.examples])
        settings = sorted({setting for sequence in self.sequences for setting in sequence})
        size = np.bincount(index)
        losses = {s: np.bincount(index, self.losses[s]) / size for s in settings}
        whole, spent = _by_unit(self.full, index), {s: _by_unit(self.spent[s], index) for s in settings}
        drawn, generator = max(1, round(share * len(size))), np.random.default_rng(seed)
        selected = recalibrated(
            (generator.integers(len(size), size=drawn) for _ in range(repeats)),  # also the order that betting goes by
            self.sequences, lambda s, part: losses[s][part], lambda s, part: spent[s].over(whole, part), self.promise,
            below=self.below,
        )  # fmt: skip
        kept = judged(selected, [0.0 if s is None else float(losses[s].mean()) for s in selected], self.promise)
        return {
            "drawn": drawn, "exceeded_population": kept.above, "uncertified_drawn": kept.nothing,
            "loss_population": kept.loss,
        }  # fmt: skip

    def splits(self, share: float, seeds: Sequence[int]) -> dict[str, Any]:
        """Parts of the pool that certify, judged by the rest."""
        place = {example.id: index for index, example in enumerate(self.examples)}
        divided = [
            [
                np.array([place[example.id] for example in some])
                for some in split_groups(self.examples, [share, 1 - share], seed)
            ]
            for seed in seeds
        ]
        selected = recalibrated(
            [(part, seed) for (part, _), seed in zip(divided, seeds, strict=True)], self.sequences,
            lambda s, part: self._units(s, *part), lambda s, part: self.spent[s].over(self.full, part[0]), self.promise,
            below=self.below,
        )  # fmt: skip
        rests = [(s, rest) for s, (_, rest) in zip(selected, divided, strict=True)]
        kept = judged(
            selected, [0.0 if s is None else float(self._units(s, rest, 0).mean()) for s, rest in rests], self.promise
        )
        return {
            "certifying": sum(len(part) for part, _ in divided) / len(seeds),
            "exceeded_held_out": kept.above, "uncertified": kept.nothing, "loss": kept.loss,
            "flops_ratio": float(
                np.mean([1.0 if s is None else self.spent[s].over(self.full, rest) for s, rest in rests])
            ),
            "chosen": dict(sorted(Counter(s for s in selected if s is not None).items())),
        }  # fmt: skip

    def _units(self, setting: int, part: NDArray[np.intp], seed: int) -> Floats:
        groups = [self.examples[place].group for place in part]
        return self.promise.units(self.losses[setting][part], groups, seed)


def _by_unit(spent: Spent, index: NDArray[np.intp]) -> Spent:
    amounts, counts = (np.bincount(index, column).astype(np.float64) for column in (spent.amounts, spent.counts))
    return Spent(amounts, counts)

"""Is the promise kept? Calibrations repeated over random splits, from answers that are already there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.promise import CRC, Promise
from offramp.calibration.search import search
from offramp.risk.intervals import exact_interval as exact_interval
from offramp.tasks import split_groups

if TYPE_CHECKING:
    from offramp.tasks import Example

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Validation:
    """Counts over repeated calibrations.

    Attributes:
        promise: What was promised each time.
        repeats: Calibrations R.
        pool: Examples that were divided anew each time.
        certifying: How many of them certified, on average.
        exceeded_pool: Calibrations whose policy's mean loss over the whole pool is above the tolerance.
        exceeded_held_out: Calibrations whose policy's mean loss over the held-out part is above it.
        uncertified: Calibrations that certified nothing; the full model exceeds nothing.
        loss: Mean of the held-out mean losses; 0 of calibrations that certified nothing.
        flops_ratio: Mean of the held-out FLOPs over the full model's; 1 of calibrations that certified nothing.
        chosen: How often each setting was selected, by its number.
    """

    promise: Promise
    repeats: int
    pool: int
    certifying: float
    exceeded_pool: int
    exceeded_held_out: int
    uncertified: int
    loss: float
    flops_ratio: float
    chosen: dict[int, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the exact intervals of both counts."""
        intervals = {
            f"{name}_interval": exact_interval(getattr(self, name), self.repeats)
            for name in ("exceeded_pool", "exceeded_held_out")
        }
        return {"schema": "offramp/calibrate-validation/1", **asdict(self), **intervals}

    def words(self) -> str:
        """The counts next to the promise, and how to read them."""
        p, held_out = self.promise, self.pool - self.certifying
        promised = "none is promised" if p.bound == CRC else f"promised: at most {p.failure:.1%}"
        average = f" (promised on the mean: at most {p.tolerance:g})" if p.bound == CRC else ""
        return "\n".join(
            [
                f"{self.repeats} calibrations over random splits of {self.pool} prompts, about {self.certifying:.0f} "
                f"to certify and {held_out:.0f} held out:",
                f"  mean loss of the whole pool above {p.tolerance:g}: {self._share(self.exceeded_pool)}; {promised}",
                f"  mean loss of the held-out part above {p.tolerance:g}: {self._share(self.exceeded_held_out)}",
                f"  nothing certified: {self.uncertified} of {self.repeats}",
                f"  mean loss held out {self.loss:.3g}{average}; FLOPs {self.flops_ratio:.3f} of the full model's",
                "The first count takes the pool for all prompts there are, and is what the promise is about. The "
                f"second adds the noise of {held_out:.0f} prompts, and a split that is lucky in certifying leaves the "
                "unlucky prompts to be held out: it may be larger with the promise kept. The splits share their "
                "prompts, so the intervals are about the splitting, not about other data.",
            ]
        )

    def _share(self, count: int) -> str:
        low, high = exact_interval(count, self.repeats)
        return f"{count} of {self.repeats} ({count / self.repeats:.1%}, exact 95 % interval {low:.1%} to {high:.1%})"


def validate(
    examples: Sequence[Example],
    losses: Sequence[Floats],
    flops: Sequence[Floats],
    full_flops: Floats,
    sequences: Sequence[Sequence[int]],
    promise: Promise,
    *,
    share: float,
    repeats: int,
    seed: int = 0,
) -> Validation:
    """Repeat a calibration over random splits. What was chosen on the tuning part stays.

    Args:
        examples: The pool of N, divided by group.
        losses: Of each setting, [S][N]. Settings in no sequence are not looked at.
        flops: Of each setting, [S][N].
        full_flops: Of the full model, [N].
        sequences: As for `offramp.calibration.search`.
        promise: What each calibration is to certify.
        share: Of the examples that certify, in (0, 1).
        repeats: Calibrations.
        seed: Of the splits.

    Returns:
        The counts.

    Raises:
        ValueError: No repeats, or fewer than two groups.
    """
    if repeats < 1:
        raise ValueError(f"{repeats} repeats were asked for; ask for at least 1 (200 or more tell something)")
    place = {example.id: index for index, example in enumerate(examples)}
    groups = np.array([example.group for example in examples])
    pool = {s: promise.units(losses[s], groups.tolist(), 0).mean() for sequence in sequences for s in sequence}
    above_pool = above_held_out = uncertified = certifying = 0
    held_out_losses, ratios, chosen = [], [], dict[int, int]()
    for repeat in range(repeats):
        part, rest = (
            np.array([place[example.id] for example in some])
            for some in split_groups(examples, [share, 1 - share], seed + repeat)
        )
        selected = search(
            sequences,
            lambda s, part=part, repeat=repeat: promise.units(losses[s][part], groups[part].tolist(), seed + repeat),  # type: ignore[misc]
            lambda s, part=part: float(flops[s][part].sum() / full_flops[part].sum()),  # type: ignore[misc]
            promise,
        ).selected
        certifying += len(part)
        if selected is None:
            uncertified += 1
            held_out_losses.append(0.0)
            ratios.append(1.0)
            continue
        chosen[selected] = chosen.get(selected, 0) + 1
        held_out_losses.append(float(promise.units(losses[selected][rest], groups[rest].tolist(), 0).mean()))
        ratios.append(float(flops[selected][rest].sum() / full_flops[rest].sum()))
        above_pool += bool(pool[selected] > promise.tolerance)
        above_held_out += held_out_losses[-1] > promise.tolerance
    return Validation(
        promise, repeats, len(examples), certifying / repeats, above_pool, above_held_out, uncertified,
        float(np.mean(held_out_losses)), float(np.mean(ratios)), dict(sorted(chosen.items())),
    )  # fmt: skip

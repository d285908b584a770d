"""Whether a stand-in can tell methods apart: plain training must fail a group, and an oracle must be clearly better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from offramp.metrics.intervals import CHANGES, Paired, Spread, paired, spread
from offramp.runs.tables import markdown
from offramp.tasks.group_sets import GroupedSet

WORST = (0.50, 0.75)
"""Where the worst group of plain training has to be."""
GAIN = 0.08
"""By how much the oracle's worst group has to be better."""
AVERAGE = 0.95
"""Adjusted average of plain training, for images."""
SEEDS, TRAIN_ROWS, TEST_ROWS = 5, 20, 200

Train = Callable[[GroupedSet, bool, int], ArrayLike]
"""A set, whether the oracle is to be trained (with group labels: balanced over groups, or GroupDRO) and a seed ->
accuracies of the test groups, [G]."""


@dataclass(frozen=True)
class Difficulty:
    """What was found.

    Attributes:
        name: Of the set.
        average: Adjusted average of plain training over seeds.
        erm: Worst group of plain training over seeds.
        oracle: Worst group of the oracle over seeds.
        gain: The oracle's worst group against plain training's, paired.
        failures: What is not as it should be, in words; empty: the set can be used for claims.
    """

    name: str
    average: Spread
    erm: Spread
    oracle: Spread
    gain: Paired
    failures: tuple[str, ...]

    @property
    def passes(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures

    def table(self) -> str:
        """One row for a terminal, Markdown as well, and what is wrong."""
        found = [
            self.name, *(f"{s.mean:.1%} ± {s.sd:.1%}" for s in (self.average, self.erm, self.oracle)),
            f"{self.gain.difference.mean:+.1%} ({self.gain.low:+.1%} to {self.gain.high:+.1%})", str(self.gain.seeds),
        ]  # fmt: skip
        head = ["set", "ERM, adjusted average", "ERM, worst group", "oracle, worst group", "gain", "seeds"]
        return "\n".join([markdown(head, [found]), *(f"- {failure}" for failure in self.failures)])


def check_difficulty(
    make: Callable[[int], GroupedSet], train: Train, seeds: Sequence[int] = range(SEEDS), *, images: bool = True
) -> Difficulty:  # fmt: skip
    """Train plainly and as an oracle on the sets of seeds; `images`: whether the average is judged too."""
    erm, oracle, averages, few = [], [], [], []
    for seed in seeds:
        data = make(seed)
        data.require_groups("train", "test")
        rows, tests = (torch.tensor(list(data.counts()[split].values())) for split in ("train", "test"))
        few += [("training", int(rows.min()), TRAIN_ROWS), ("test", int(tests.min()), TEST_ROWS)]
        plain, informed = (np.asarray(train(data, balanced, seed), dtype=np.float64) for balanced in (False, True))
        averages.append(float(plain @ rows.double().numpy() / rows.sum()))
        erm.append(float(plain.min()))
        oracle.append(float(informed.min()))
    gain, worst, average = paired(oracle, erm, bounds=CHANGES), spread(erm), spread(averages)
    failures = [
        f"a group has {count} {what} rows; {least} are needed"
        for what, count, least in sorted(set(few))
        if count < least
    ]
    if len(seeds) < SEEDS:
        failures.append(f"{len(seeds)} seeds are too few for a verdict; {SEEDS} are needed")
    if not WORST[0] <= worst.mean <= WORST[1]:
        failures.append(
            f"plain training's worst group is at {worst.mean:.1%}; {WORST[0]:.0%} to {WORST[1]:.0%} is useful"
        )
    if gain.difference.mean < GAIN or gain.low <= 0:
        failures.append(
            f"the oracle gains {gain.difference.mean:.1%}, interval from {gain.low:.1%}; {GAIN:.0%} and an interval "
            "above 0 are needed"
        )
    if images and average.mean < AVERAGE:
        failures.append(f"plain training's adjusted average is {average.mean:.1%}; {AVERAGE:.0%} is needed for images")
    return Difficulty(data.name, average, worst, spread(oracle), gain, tuple(failures))

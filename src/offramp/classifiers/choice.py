"""Which posterior helps: candidates compared with none on rows that they were not fitted on, with an interval.

The rows are those of the tune split, cross-fitted: each is judged by posteriors of the other folds. So thresholds,
guarantees and the report have rows of their own, as with a posterior that was asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.metrics import calibration
from offramp.metrics.calibration import grade
from offramp.metrics.intervals import Interval
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.posterior import PosteriorConfig

NONE = "vanilla"
"""The network's own softmax: no posterior."""
CANDIDATES = (NONE, "temperature", "mie", "mie+temperature")
"""What is compared: all that needs the tune split alone."""
FOLDS = 5
RESAMPLES = 1000


@dataclass(frozen=True)
class Effect:
    """What a posterior does to the negative log predictive density, on rows it was not fitted on.

    Attributes:
        nlpd: Its NLPD less that of the network's own softmax, in nats, the mean over rows and exits with a 95 %
            bootstrap interval over rows; below 0: it helps.
        exits: The same of each exit.
        rows: How many.
    """

    nlpd: Interval
    exits: tuple[Interval, ...]
    rows: int

    @property
    def helps(self) -> bool:
        """Whether all of the interval is below 0."""
        return self.nlpd.high is not None and self.nlpd.high < 0

    @property
    def hurts(self) -> bool:
        """Whether all of the interval is above 0."""
        return self.nlpd.low is not None and self.nlpd.low > 0

    def words(self, method: str) -> str:
        """The verdict, which no point estimate decides."""
        change = f"{self.nlpd.value:+.4f} ({self.nlpd.low:+.4f} to {self.nlpd.high:+.4f}), the mean over all exits"
        verdict = "helps" if self.helps else "HURTS" if self.hurts else "was not shown to help or to hurt"
        worse = [str(e) for e, change_ in enumerate(self.exits, 1) if change_.low is not None and change_.low > 0]
        where = f"; it raises that of exit {', '.join(worse)}" if worse else ""
        return f"{method} {verdict}: against none it changes the NLPD of {self.rows} rows by {change}{where}."


def effect(before: NDArray[np.float64], after: NDArray[np.float64], seed: int = 0) -> Effect:
    """Of the losses -ln p_y of the same rows without and with a posterior, [E, N] each."""
    change = after - before
    found = calibration.resampled_mean(
        np.concatenate([change.mean(0)[None], change]), calibration.resample(change.shape[1], RESAMPLES, seed)
    )
    return Effect(Interval.of(found[0]), tuple(map(Interval.of, found[1:])), change.shape[1])


def losses(probabilities: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """-ln p_y of each row at each exit, [E, N], from probabilities [E, N, C]."""
    return np.stack([grade(p, labels).nlpd for p in probabilities])


@dataclass(frozen=True)
class Choice:
    """Candidates compared, and the one taken.

    Attributes:
        method: The one with the lowest held-out NLPD among those shown to help; "vanilla" if none was.
        nlpd: Held-out NLPD of each, the mean over rows and exits, by name.
        effects: What each but "vanilla" does to it, by name.
    """

    method: str
    nlpd: dict[str, float]
    effects: dict[str, Effect]

    def words(self) -> str:
        """What was compared, and what was taken."""
        rows = next(iter(self.effects.values())).rows if self.effects else 0
        found = ", ".join(f"{name} {value:.4f}" for name, value in self.nlpd.items())
        why = (
            "no candidate was shown to help (95 % interval of its difference to none), so there is none"
            if self.method == NONE
            else "the lowest of those shown to help (95 % interval of its difference to none)"
        )
        return f"Posterior: {self.method}, {why}. NLPD of {rows} tune rows by the other folds: {found}."


def choose(config: PosteriorConfig, tune: ExitOutputs, methods: Sequence[str] = CANDIDATES) -> Choice:
    """Candidates compared with none on `tune`, in folds drawn by the seed; not Laplace, which needs other rows."""
    if wrong := [name for name in methods if replace(config, method=name).is_laplace]:
        raise ValueError(f"{wrong[0]} cannot be chosen from the tune split alone; name it as the posterior")
    fold = _folds(tune.labels, config.seed)
    found = {name: np.empty(tune.logits.shape[:2]) for name in dict.fromkeys([NONE, *methods])}
    for number in range(int(fold.max()) + 1):
        held_out, rest = tune.take((fold == number).nonzero()[:, 0]), tune.take((fold != number).nonzero()[:, 0])
        for name, kept in found.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of the final fit it is said
                posterior = replace(config, method=name).fit(rest, rest, shared=True)
            kept[:, (fold == number).numpy()] = losses(posterior.probabilities(held_out), held_out.labels)
    effects = {name: effect(found[NONE], kept, config.seed) for name, kept in found.items() if name != NONE}
    helping = [name for name, seen in effects.items() if seen.helps]
    nlpd = {name: float(kept.mean()) for name, kept in found.items()}
    return Choice(min(helping, key=nlpd.__getitem__, default=NONE), nlpd, effects)


def _folds(labels: Tensor, seed: int) -> Tensor:
    """A fold of each row, [N], with the classes in each as evenly as can be."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels)) % min(FOLDS, len(labels))
    return fold

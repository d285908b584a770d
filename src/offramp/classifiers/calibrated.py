"""The posterior of a classifier: which candidate helps, and one fitted, saved with what it takes to leave early by it.

A posterior is chosen by comparing candidates with none on rows that they were not fitted on, with an interval. The rows
are those of the tune split, cross-fitted: each is judged by posteriors of the other folds. So thresholds, guarantees
and the report have rows of their own, as with a posterior that was asked for.

What `offramp calibrate` writes is a folder:

posterior/   temperatures, prior variances, factors (`offramp.uncertainty.posterior`)
thresholds/  confidences of the threshold split, from which any budget gets its thresholds; maybe a certificate
sets/        maybe where conformal sets end

Thresholds and sets hold for the probabilities of one posterior, and name its fingerprint.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.classifiers.evaluate import charged
from offramp.metrics import calibration
from offramp.metrics.calibration import grade
from offramp.metrics.intervals import Interval
from offramp.risk import budgets
from offramp.runs import artefact
from offramp.uncertainty.nested_conformal import NestedConformal
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.posterior import Posterior, PosteriorConfig, load_posterior

NONE = "vanilla"
"""The network's own softmax: no posterior."""
CANDIDATES = (NONE, "temperature", "mie", "mie+temperature")
"""What is compared: all that needs the tune split alone."""
FOLDS = 5
RESAMPLES = 1000
SCHEMA = "offramp/classifier-thresholds/1"
POSTERIOR, THRESHOLDS, SETS = "posterior", "thresholds", "sets"


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


@dataclass(frozen=True)
class SetsOf:
    """Conformal sets as they are saved.

    Attributes:
        posterior: Fingerprint of the posterior whose probabilities they are sets of.
        ends: Where they end.
    """

    posterior: str
    ends: NestedConformal


@dataclass(frozen=True)
class Calibrated:
    """A posterior in use.

    Attributes:
        posterior: What makes probabilities.
        confidences: Largest probabilities of the threshold split's rows, [E, N], float64.
        costs: FLOPs of a row up to and including each exit, with the heads on the way and the posterior's own, [E].
        full_cost: FLOPs of a row of the threshold split in the plain full network, the backbone and the last exit's
            head: what shares are of. None: written by an earlier version, which did not know it.
        certificate: A `RowCertificate` as JSON values; None: none was asked for.
        sets: Where conformal sets end; None: none were asked for.
    """

    posterior: Posterior
    confidences: Tensor
    costs: Tensor
    full_cost: float | None = None
    certificate: dict[str, Any] | None = None
    sets: NestedConformal | None = None

    @classmethod
    def of(cls, posterior: Posterior, threshold: ExitOutputs) -> Calibrated:
        """From the outputs of the threshold split."""
        costs = charged(threshold.costs, posterior)
        return cls(posterior, posterior.probabilities(threshold).amax(-1), costs, threshold.full_cost)

    def budget(self, asked: float) -> budgets.Budget:
        """Thresholds for a budget.

        Args:
            asked: Share of the plain full network's FLOPs, or if more than all exits cost: FLOPs per row; on average.

        Returns:
            The budget, met on the threshold split.

        Raises:
            ValueError: It is below the first exit's cost or above the last one's; the message says what can be had. Or
                it is a share, and the full cost is unknown.
        """
        most = float(self.costs[-1]) / (self.full_cost or float(self.costs[-1]))
        given = {"share": asked} if asked <= max(1, most) else {"flops": asked}
        if self.full_cost is None and "share" in given:
            raise ValueError(
                f"a budget of {asked:g} is a share of the plain full network's FLOPs, which this calibration does not "
                "hold, since an earlier version wrote it; give FLOPs per row, or calibrate again"
            )
        q = budgets.q_of(self.costs, full=self.full_cost, **given)
        return budgets.fit(self.confidences, self.costs, q)

    @property
    def certified(self) -> float | None:
        """The certified threshold, infinity if rows never leave early; None without a certificate."""
        if self.certificate is None:
            return None
        threshold = self.certificate["threshold"]
        return math.inf if threshold is None else float(threshold)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a folder, over what an earlier calibration left there."""
        place = Path(folder)
        self.posterior.save(place / POSTERIOR)
        values = {"posterior": self.posterior.fingerprint, "certificate": self.certificate}
        tensors = {"confidences": self.confidences.contiguous(), "costs": self.costs}
        if self.full_cost is not None:
            tensors["full_cost"] = torch.tensor(self.full_cost, dtype=torch.float64)
        artefact.write(place / THRESHOLDS, SCHEMA, values, tensors)
        if self.sets is not None:
            artefact.save(SetsOf(self.posterior.fingerprint, self.sets), place / SETS)
        elif (place / SETS).is_dir():
            for name in artefact.STATE.names:
                (place / SETS / name).unlink(missing_ok=True)
            (place / SETS).rmdir()


def load_calibrated(folder: str | os.PathLike[str], network: str) -> Calibrated:
    """What `save` wrote, for the classifier of this fingerprint; a ValueError if it was changed or is another's."""
    place = Path(folder).expanduser()
    if not (place / POSTERIOR).is_dir():
        raise ValueError(f"{place} holds no posterior of a classifier; give a folder that offramp calibrate wrote")
    posterior = load_posterior(place / POSTERIOR, {"network": network})
    values, tensors = artefact.read(place / THRESHOLDS, SCHEMA)
    if values["posterior"] != posterior.fingerprint:
        raise ValueError(f"the thresholds in {place} are of another posterior; calibrate again")
    sets = _sets(place / SETS, posterior) if (place / SETS).is_dir() else None
    full = float(tensors["full_cost"]) if "full_cost" in tensors else None
    return Calibrated(posterior, tensors["confidences"], tensors["costs"], full, values["certificate"], sets)


def _sets(place: Path, posterior: Posterior) -> NestedConformal:
    """The sets in a folder, if they are this posterior's."""
    try:
        found = artefact.load(SetsOf, place)
    except ValueError as error:
        raise ValueError(f"the sets of this posterior cannot be read ({error}); calibrate again") from error
    if found.posterior != posterior.fingerprint:
        raise ValueError(f"the sets in {place} are of another posterior; calibrate again")
    return found.ends


class Recorded:
    """A posterior that also keeps the probabilities of every exit a row came to; for sets, which look at all of them.

    Args:
        posterior: What makes the probabilities.
        rows: N.
    """

    def __init__(self, posterior: Posterior, rows: int) -> None:
        self.posterior = posterior
        self.seen = torch.full((len(posterior.exits), rows, posterior.classes), 1 / posterior.classes).double()
        """[E, N, C]; uniform at exits that were not come to."""

    def at(self, exit: int, features: Tensor, logits: Tensor, carried: Any = None) -> tuple[Tensor, Any]:
        """As `Posterior.at`; which rows are left is carried along."""
        inner, rows = (None, torch.arange(len(logits))) if carried is None else carried
        p, inner = self.posterior.at(exit, features, logits, inner)
        self.seen[exit, rows.cpu()] = p.cpu()
        return p, (inner, rows.to(logits.device))

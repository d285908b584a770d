"""A fitted posterior with what it takes to leave early by it: a folder that `offramp calibrate` writes.

posterior/   temperatures, prior variances, factors (`offramp.uncertainty.posterior`)
thresholds/  confidences of the threshold split, from which any budget gets its thresholds; maybe a certificate
sets/        maybe where conformal sets end

Thresholds and sets hold for the probabilities of one posterior, and name its fingerprint.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.classifiers.evaluate import charged
from offramp.risk import budgets
from offramp.runs import artefact
from offramp.uncertainty.nested_conformal import NestedConformal
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.posterior import Posterior, load_posterior

SCHEMA = "offramp/classifier-thresholds/1"
POSTERIOR, THRESHOLDS, SETS = "posterior", "thresholds", "sets"


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

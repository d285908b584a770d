"""Confidence sequences over exits for a class: the logits as evidence of a Dirichlet distribution.

Jazbec et al. (2024), "Early-Exit Neural Networks with Nested Prediction Sets", section 5. With evidence a_{e,y} (the
centred logit if it is at least τ_e and positive, else none) and π_e ~ Dir(a_e) over the classes with evidence,

    R_{e,y} = Π_{l<=e} (a_{l,y} / Σ_j a_{l,j}) / π_{l,y},   C_e = {y : R_{e,y} <= 1/α}

and a class without evidence at some exit never comes back. Nested (after `running()`) with a model-based coverage
target, which τ is tuned for; a guarantee needs `nested_conformal`. Deviates from the paper in centring the logits,
whose offset is arbitrary, in tuning τ on the running intersection, in draws that belong to rows, not to batches, and in
leaving out the first exits where asked to: a class that has no evidence at a poor exit is lost for all later ones. Of
two classes only one is above the mean, so that no set holds both, and coverage is at most the accuracy.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.sets import ClassSets
from offramp.values import check_level


@dataclass(frozen=True)
class AVCSClassificationConfig:
    """What evidence is, and how its threshold is tuned.

    Attributes:
        alpha: One minus the coverage that is aimed at, in (0, 1).
        centre: Subtract the mean over the classes from the logits.
        start: τ of every exit to begin with.
        step: By how much it is raised.
        seed: Of the draws; sets of the same seed and row id are the same.
        first_exit: Exits before it, counted from 0, are not looked at: their sets hold everything.
    """

    alpha: float = 0.05
    centre: bool = True
    start: float = 1.0
    step: float = 0.5
    seed: int = 0
    first_exit: int = 0

    def __post_init__(self) -> None:
        check_level("alpha", self.alpha)
        if not self.step > 0 or self.seed < 0:
            raise ValueError(f"step is {self.step}, seed {self.seed}; a positive step and a seed >= 0 are needed")
        if self.first_exit < 0:
            raise ValueError(f"first_exit is {self.first_exit}; exits count from 0")


@dataclass(frozen=True)
class AVCSClassification:
    """The tuned thresholds.

    Attributes:
        thresholds: τ of each exit, [E], float64; of exits before the first that is looked at, the start.
        coverage: Of the running intersection on the tuning rows, [E]: in-sample, so an optimist's.
        rows: Tuning rows.
        config: How they were tuned.
    """

    thresholds: Tensor
    coverage: Tensor
    rows: int
    config: AVCSClassificationConfig


def fit(
    given: ExitOutputs | Tensor,
    labels: Tensor | None = None,
    config: AVCSClassificationConfig | None = None,
    *,
    ids: Sequence[str] = (),
) -> AVCSClassification:
    """Tune τ: exit by exit, raise it while coverage at every exit stays above 1 - α, then go back one step.

    Args:
        given: Outputs of the exits on a split that is neither calibrated nor tested on; or their logits, [E, N, C].
        labels: [N], int64, with logits only.
        config: How; the default aims at 0.95.
        ids: Of the rows, with logits only; the row numbers if none are given.

    Returns:
        The thresholds. If coverage is too low already at the start, they stay there, with a warning that says why.

    Raises:
        ValueError: Labels are missing or out of range, logits are not finite, or there is no first exit of that number.
    """
    config = config or AVCSClassificationConfig()
    if isinstance(given, ExitOutputs):
        logits, labels, ids = given.logits, given.labels, given.ids
    else:
        logits = given
    if labels is None:
        raise ValueError("labels are missing; give those of the tuning rows, or ExitOutputs")
    values = _evidence(logits, config)
    exits, rows, classes = values.shape
    if not rows or labels.shape != (rows,) or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"{rows} labels in 0..{classes - 1} are needed, at least one; their shape is {labels.shape}")
    if config.first_exit >= exits:
        raise ValueError(f"first_exit is {config.first_exit}; there are exits 0..{exits - 1}")
    gammas = _log_gammas(values, config.seed, _ids(ids, rows))
    thresholds = torch.full((exits,), config.start, dtype=torch.float64)

    def coverage() -> Tensor:
        sets = _sets(values, gammas, thresholds, config).running()
        return sets.contains(labels).double().mean(dim=1)

    if bool((coverage() <= 1 - config.alpha).any()):
        warnings.warn(_too_low(values, labels, float(coverage().min()), config), stacklevel=2)
    else:
        for place in range(config.first_exit, exits):
            while bool((coverage() > 1 - config.alpha).all()):
                thresholds[place] += config.step
            thresholds[place] -= config.step
    return AVCSClassification(thresholds, coverage(), rows, config)


def _too_low(values: Tensor, labels: Tensor, coverage: float, config: AVCSClassificationConfig) -> str:
    """What to say of a coverage that is too low before any τ is raised: how many rows each of the causes loses."""
    own = values.gather(-1, labels.expand(len(values), -1).unsqueeze(-1)).squeeze(-1)[config.first_exit :]
    none = (own <= 0).double().mean(dim=1)
    worst = int(none.argmax())
    poor = float((own <= 0).any(dim=0).double().mean())
    hard = float(((own <= 0) | (own < config.start)).any(dim=0).double().mean()) - poor
    return (
        f"with tau = {config.start:g} at all exits the sets cover {coverage:.4f} of the tuning rows, not more than "
        f"{1 - config.alpha:g}: tau stays there. At some exit {poor:.1%} of the rows have no evidence for their class, "
        f"a logit above {'the mean of all classes' if config.centre else '0'} (most at exit "
        f"{config.first_exit + worst + 1}: {float(none[worst]):.1%}): only a later first_exit or a larger alpha helps; "
        f"{hard:.1%} more have less than tau: give a lower start; {abs(1 - coverage - poor - hard):.1%} are lost by "
        "the draws, which spread widely where evidence is small"
    )


def apply(state: AVCSClassification, given: ExitOutputs | Tensor, *, ids: Sequence[str] = ()) -> ClassSets:
    """The sets C_e of every exit, of outputs or of logits [E, N, C]. They are not nested: `running()` of them is.

    Draws are keyed by the rows' ids. Without them (also in the outputs) the row numbers are, so a row's sets then
    depend on its place.

    Returns:
        The sets; report their running intersection.

    Raises:
        ValueError: The number of exits is another one than in the fit, or logits are not finite.
    """
    if isinstance(given, ExitOutputs):
        logits, ids = given.logits, given.ids
    else:
        logits = given
    if len(logits) != len(state.thresholds):
        raise ValueError(f"logits are those of {len(logits)} exits; tau was tuned for {len(state.thresholds)}")
    values = _evidence(logits, state.config)
    gammas = _log_gammas(values, state.config.seed, _ids(ids, logits.shape[1]))
    return _sets(values, gammas, state.thresholds, state.config)


def log_ratios(evidence: Tensor, log_gammas: Tensor) -> Tensor:
    """Ln R of every class, [E, N, C]; +inf from the first exit on at which the class has no evidence."""
    return log_steps(evidence, log_gammas).cumsum(dim=0)


def log_steps(evidence: Tensor, log_gammas: Tensor) -> Tensor:
    """What each exit multiplies R with, ln (a_y / Σ a) - ln π_y, [..., C]; +inf where a class has no evidence.

    Args:
        evidence: a, [..., C], float64; 0 where there is none.
        log_gammas: Logs of draws of Gamma(a), [..., C]: over their sum, they are the Dirichlet draw.

    Returns:
        [..., C].
    """
    support = evidence > 0
    drawn = log_gammas.masked_fill(~support, -torch.inf).log_softmax(dim=-1)
    steps = evidence.log() - evidence.sum(dim=-1, keepdim=True).log() - drawn
    return steps.masked_fill(~support, torch.inf)


def _sets(
    values: Tensor, log_gammas: Tensor, thresholds: Tensor, config: AVCSClassificationConfig
) -> ClassSets:  # fmt: skip
    first = config.first_exit
    evidence = values.masked_fill(values < thresholds[:, None, None], 0.0)[first:]
    members = log_ratios(evidence, log_gammas[first:]) <= -math.log(config.alpha)
    return ClassSets(torch.cat([torch.ones_like(values[:first], dtype=torch.bool), members]))


def _evidence(logits: Tensor, config: AVCSClassificationConfig) -> Tensor:
    """Positive logits, [E, N, C], float64, 0 elsewhere, before any threshold; a ValueError if they are not finite."""
    if logits.ndim != 3:
        raise ValueError(f"logits have shape {list(logits.shape)}; exits x rows x classes are needed")
    wrong = ~logits.isfinite().all(dim=-1).all(dim=0)
    if bool(wrong.any()):
        raise ValueError(f"logits of row {int(wrong.nonzero()[0])} are not finite; leave the row out")
    values = logits.double()
    if config.centre:
        values = values - values.mean(dim=-1, keepdim=True)
    return values.clamp(min=0.0)


def _ids(ids: Sequence[str], rows: int) -> Sequence[str]:
    if ids and len(ids) != rows:
        raise ValueError(f"there are {len(ids)} ids for {rows} rows")
    return ids or [str(row) for row in range(rows)]


def _log_gammas(values: Tensor, seed: int, ids: Sequence[str]) -> Tensor:
    """Draws of Gamma(a) for every a > 0, each row's keyed by seed, exit and row id.

    Gamma(a) is Gamma(a + 1)·U^(1/a), which does not underflow in logs. A threshold only restricts the support, so all
    thresholds share these draws.

    Returns:
        Their logs, [E, N, C]; -inf where a = 0.
    """
    shapes = values.numpy(force=True)
    drawn = np.full(shapes.shape, -np.inf)
    for row, name in enumerate(ids):
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
        for place in range(len(shapes)):
            shape, random = shapes[place, row], np.random.default_rng([seed, place, key])
            uniform = 1.0 - random.random(len(shape))  # in (0, 1]
            some = shape > 0
            drawn[place, row, some] = (
                np.log(random.standard_gamma(shape[some] + 1)) + np.log(uniform[some]) / shape[some]
            )
    return torch.from_numpy(drawn)

"""Calibrate the exits of one classifier: a posterior, and if asked for a certified threshold and conformal sets.

Each step reads a split of its own: factors "train" (or "tune"), temperatures and prior variances "tune", thresholds
"threshold", guarantees "calibrate"; "test" only tells whether they were kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.classifiers.calibrated import NONE, Calibrated, Choice, Effect, choose, effect, losses
from offramp.classifiers.certify import (
    RowCertificate,
    RowPromise,
    Trials,
    certify,
    costs_words,
    threshold_grid,
    try_thresholds,
)
from offramp.metrics.calibration import grade
from offramp.metrics.calibration import scores as scores_of
from offramp.metrics.sets import SetSummary, summarise
from offramp.risk.losses import brier_gap, consistency, performance_gap
from offramp.runs.codec import encode
from offramp.runs.files import write_json, write_text
from offramp.runs.results import Shown
from offramp.runs.tables import Table
from offramp.uncertainty import nested_conformal
from offramp.uncertainty.nested_conformal import NestedConformal, NestedConformalConfig
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.posterior import Posterior, PosteriorConfig
from offramp.values import choice

SCHEMA = "offramp/classifier-calibration/2"
EARLIER = "offramp/classifier-calibration/1"
"""Promises were against the posterior's last exit, savings of a network that computes the heads of all exits."""
RESULT, TABLE = "result.json", "table.md"
FIT_ON = ("train", "tune")
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "consistency": (lambda p, labels, reference: consistency(p, reference), "binomial"),
    "gap": (performance_gap, "wsr"),
    "brier": (brier_gap, "wsr"),
    "brier-consistency": (lambda p, labels, reference: brier_gap(p, None, reference), "wsr"),
}
"""Losses of probabilities [E, N, C], labels [N] and a reference [N, C] by name, with the bound that suits them: exact
for 0 and 1, else betting."""
REFERENCES = {
    "last-exit": "the network's own last exit, without the posterior",
    "posterior": "the last exit with the posterior",
}
"""What a promise may be against, in words: the plain full network as it would be deployed, or its calibrated end."""
ENSEMBLE = "the ensemble of all exits that the posterior makes of the last"
"""The second of these, with a model-internal ensemble."""


@dataclass(frozen=True)
class CalibrationConfig:
    """What to fit.

    Attributes:
        posterior: The posterior; with candidates its method has no say.
        candidates: Posteriors of which the one that helps is taken, see `offramp.classifiers.calibrated`; empty:
            `posterior` as it is.
        fit_on: Which split gives a Laplace approximation its factors: "train", as published, without augmentation; or
            "tune", rows the network has not seen, which then also tune it.
        promise: What a threshold is to keep, its loss one of `LOSSES`; None: no certificate.
        reference: What it is to keep it against, one of `REFERENCES`.
        alpha: Probability that conformal sets of some exit miss the right class; None: no sets.
        bins: Bins of the calibration error.
        seed: Seed of the order of rows in the certificate.
    """

    posterior: PosteriorConfig = field(default_factory=PosteriorConfig)
    fit_on: str = "train"
    promise: RowPromise | None = None
    alpha: float | None = None
    bins: int = 15
    seed: int = 0
    reference: str = "last-exit"
    candidates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("fit_on", FIT_ON), ("reference", REFERENCES)):
            choice(name, getattr(self, name), allowed)
        if self.promise is not None:
            choice("the loss", self.promise.loss, LOSSES)
        if self.bins < 1 or self.seed < 0:
            raise ValueError(f"bins is {self.bins} and seed {self.seed}; they count from 1 and 0")
        if self.alpha is not None:
            NestedConformalConfig(alpha=self.alpha)


def fit_posterior(
    config: PosteriorConfig, fit_on: str, outputs: Callable[[str], ExitOutputs], network: str
) -> Posterior:
    """A posterior from the splits it is meant for; what there is to warn of stands in its `messages`."""
    tune = outputs("tune")
    shared = fit_on == "tune" or not config.is_laplace
    fit = tune if shared else outputs(fit_on)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=__name__)
        return config.fit(fit, tune, network=network, shared=shared)


# ---------------------------------------------------------------- the result


@dataclass(frozen=True)
class ClassifierCalibration(Shown):
    """What was fitted, and how good it is.

    Attributes:
        calibrated: What later steps use.
        before: Metrics of each exit's softmax on the threshold split, by name.
        after: The same of the posterior.
        rows: Rows of the threshold split.
        certificate: The certified threshold; None: none was asked for.
        kept: On the test split under the certificate: its rows; the mean loss, and by reference; the saving of the
            plain full network's FLOPs, and of those with the heads of all exits; None: no certificate.
        sets: Sets of the test split; None: none were asked for.
        config: What was asked for; of candidates the posterior that was taken.
        conditions: What was held fixed, and versions; JSON values.
        effect: What the posterior does to the NLPD of the threshold split; None: it is none.
        choice: How it was chosen; None: it was asked for.
    """

    calibrated: Calibrated
    before: tuple[dict[str, float | None], ...]
    after: tuple[dict[str, float | None], ...]
    rows: int
    certificate: RowCertificate | None
    kept: dict[str, Any] | None
    sets: SetSummary | None
    config: CalibrationConfig
    conditions: dict[str, Any]
    effect: Effect | None = None
    choice: Choice | None = None

    def __repr__(self) -> str:
        posterior = self.calibrated.posterior
        promised = "" if self.certificate is None else f", {self.certificate!r}"
        return f"ClassifierCalibration({posterior.config.method}, {len(posterior.exits)} exits{promised})"

    def _rows(self) -> Iterable[Any]:
        """A row per exit: its setting, cost, and metrics before and after, as "before.nlpd"."""
        exits = self.to_dict()["exits"]
        return ({"exit": number, **values} for number, values in enumerate(exits, 1))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        posterior = self.calibrated.posterior
        exits = [
            {
                "before": self.before[e], "after": self.after[e], "temperature": exit.temperature, "omega": exit.omega,
                "edges": list(exit.tuned.edges), "cost": float(self.calibrated.costs[e]),
                "overhead": posterior.overhead(e)._asdict(),
            }
            for e, exit in enumerate(posterior.exits)
        ]  # fmt: skip
        certificate = self.certificate and {**self.certificate.to_dict(), "words": self.certificate.words()}
        return {
            "schema": SCHEMA, "config": encode(self.config), "conditions": self.conditions, "rows": self.rows,
            "exits": exits, "messages": list(posterior.messages), "certificate": certificate, "kept": self.kept,
            "sets": self.sets and encode(self.sets), "full_cost": self.calibrated.full_cost,
            "effect": self.effect and {**encode(self.effect), "words": self.effect.words(self.config.posterior.method)},
            "choice": self.choice and {**encode(self.choice), "words": self.choice.words()},
        }  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write what later steps use, result.json and table.md."""
        self.calibrated.save(folder)
        write_json(folder / RESULT, self.to_dict())
        write_text(folder / TABLE, self.table() + "\n")

    # ------------------------------------------------------------ in words

    def table(self) -> str:
        """Tables for a terminal that are Markdown as well, and what else to know."""
        posterior = self.calibrated.posterior
        verdicts = [f"exit {e + 1}: {x.comparison.words()}" for e, x in enumerate(posterior.exits) if x.comparison]
        if verdicts:
            verdicts.insert(0, "On the rows of the tune split, on which both were tuned:")
        blocks = [
            str(exit_table(self.to_dict())),
            f"Softmax -> {posterior.config.method}, on the {self.rows} rows of the threshold split; cost in FLOPs over "
            f"the plain full network's ({self.calibrated.full_cost:.4g}, the backbone and its last exit's head).",
            *([self.choice.words()] if self.choice else []),
            *([self.effect.words(posterior.config.method)] if self.effect else []),
            *([HURTS] if self.effect and self.effect.hurts else []),
            *(f"* {message}" for message in posterior.messages),
            *verdicts,
        ]
        if self.certificate is not None:
            blocks.append(self.certificate.words())
        if self.kept is not None:
            blocks.append(kept_words(self.kept, self.config.reference, self.config.posterior))
        if self.sets is not None:
            blocks += [
                str(set_table(encode(self.sets))),
                f"Nested conformal sets on the {self.sets.rows} test rows, asked to hold the right class at all exits "
                f"with probability {1 - (self.config.alpha or 0):g}.",
            ]
        return "\n\n".join(blocks)


def exit_table(values: Mapping[str, Any]) -> Table:
    """A row per exit, * where a setting sits on the end of its grid, from the JSON values of a calibration."""
    exits = values["exits"]
    laplace = any(exit["omega"] is not None for exit in exits)
    full = values.get("full_cost") or exits[-1]["cost"]  # an earlier version did not know the plain network's
    rows = []
    for e, exit in enumerate(exits, 1):
        before, after, added = exit["before"], exit["after"], exit["overhead"]
        pairs = [f"{before[name]:.4f} -> {after[name]:.4f}" for name in ("top1", "nlpd", "ece")]
        omega = [f"{exit['omega']:.3g}"] if laplace else []
        more = f" (published formula {added['formula']})" if added["formula"] else ""
        rows.append([
            f"{e}{'*' if exit['edges'] else ''}", f"{exit['cost'] / full:.3f}", *pairs, f"{exit['temperature']:.3g}",
            *omega, f"{added['counted']}{more}",
        ])  # fmt: skip
    return Table(["exit", "cost", "accuracy", "NLPD", "ECE", "T", *(["ω"] if laplace else []), "added FLOPs"], rows)


def set_table(sets: Mapping[str, Any]) -> Table:
    """A row per exit, from the JSON values of a calibration's sets."""
    rows = []
    for e, exit in enumerate(sets["exits"], 1):
        covered, all_covered, empty = (exit[name] for name in ("coverage", "simultaneous", "empty"))
        interval = f"{all_covered['value']:.3f} ({all_covered['low']:.3f} to {all_covered['high']:.3f})"
        size, small = f"{exit['size']:.2f}", f"{exit['small']:.3f}"
        rows.append([f"{e}", size, f"{covered['value']:.3f}", interval, f"{empty['value']:.3f}", small])
    return Table(["exit", "mean size", "holds the class", "so far at all exits", "empty", "one class"], rows)


HURTS = "Take another: --posterior auto compares with none and takes what helps."
"""Behind the verdict on a posterior that was asked for and hurts."""


def kept_words(kept: Mapping[str, Any], reference: str, posterior: PosteriorConfig) -> str:
    """What a certificate came to on the test rows, against what was promised and against the other."""
    other = next(name for name in REFERENCES if name != reference)
    against = {name: f"{kept['losses'][name]:.4f} against {_reference(name, posterior)}" for name in REFERENCES}
    more = "" if posterior.method == NONE else f" ({against[other]})"
    words = f"On the {kept['rows']} test rows: mean loss {against[reference]}{more}; it "
    words += costs_words(1 - kept["saving"])
    if abs(kept["saving"] - kept["saving_with_heads"]) > 5e-4:
        words += f" ({kept['saving_with_heads']:.1%} of those with the heads of all exits, which nobody would run)"
    return f"{words}."


def _reference(name: str, posterior: PosteriorConfig) -> str:
    return ENSEMBLE if name == "posterior" and posterior.is_ensemble else REFERENCES[name]


# ---------------------------------------------------------------- the steps


def calibrate(
    outputs: Callable[[str], ExitOutputs],
    config: CalibrationConfig,
    folder: Path,
    *,
    network: str,
    conditions: dict[str, Any] | None = None,
) -> ClassifierCalibration:
    """Fit everything, and write it into a folder.

    Args:
        outputs: From the name of a split to what all exits say about it, such as `CachedOutputs.outputs`; splits that
            are not needed are not asked for.
        config: What to fit.
        folder: Where to; what an earlier calibration left there is replaced.
        network: Fingerprint of the classifier.
        conditions: What else result.json should say.

    Returns:
        What was fitted.

    Raises:
        ValueError: Splits share rows, a class or all but one is missing, or numbers are not finite.
        FileExistsError: The folder holds something else.
    """
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds something else than a calibration; name a new folder")
    choice = None
    if config.candidates:
        choice = choose(config.posterior, outputs("tune"), config.candidates)
        config = replace(config, posterior=replace(config.posterior, method=choice.method))
    posterior = fit_posterior(config.posterior, config.fit_on, outputs, network)
    threshold = outputs("threshold")
    calibrated = Calibrated.of(posterior, threshold)
    certificate = kept = sets = summary = None
    if config.promise is not None:
        certificate, kept = _certify(config, config.promise, calibrated, outputs)
    if config.alpha is not None:
        sets, summary = _sets(config.alpha, posterior, outputs)
    calibrated = replace(calibrated, certificate=None if certificate is None else certificate.to_dict(), sets=sets)
    plain, fitted = threshold.logits.double().softmax(-1), posterior.probabilities(threshold)
    before, after = (
        tuple(scores_of(grade(one, threshold.labels), bins=config.bins) for one in p) for p in (plain, fitted)
    )
    seen = None
    if config.posterior.method != NONE:
        seen = effect(losses(plain, threshold.labels), losses(fitted, threshold.labels), config.seed)
    result = ClassifierCalibration(
        calibrated, before, after, threshold.rows, certificate, kept, summary, config, conditions or {}, seen, choice
    )
    result.save(folder)
    return result


def _certify(
    config: CalibrationConfig, promise: RowPromise, calibrated: Calibrated, outputs: Callable[[str], ExitOutputs]
) -> tuple[RowCertificate, dict[str, Any]]:
    """The certificate, and what it comes to on the test split."""
    loss = LOSSES[promise.loss][0]
    thresholds = threshold_grid(calibrated.confidences)

    def tried(split: str) -> dict[str, Trials]:
        """Against each reference."""
        rows = outputs(split)
        p = calibrated.posterior.probabilities(rows)
        references = {"last-exit": rows.logits[-1].double().softmax(-1), "posterior": p[-1]}
        return {
            name: try_thresholds(
                thresholds, p.amax(-1), loss(p, rows.labels, against), calibrated.costs, calibrated.full_cost
            )
            for name, against in references.items()
        }

    promise = replace(promise, reference=_reference(config.reference, config.posterior))
    found = certify(tried("calibrate")[config.reference], promise, seed=config.seed)
    test, at = tried("test"), found.index
    means = {name: float(trials.losses[at].mean()) for name, trials in test.items()}
    trials = test[config.reference]
    return found, {
        "rows": trials.losses.shape[1], "loss": means[config.reference], "losses": means,
        "saving": 1 - trials.cost(at), "saving_with_heads": 1 - replace(trials, full_cost=None).cost(at),
    }  # fmt: skip


def _sets(
    alpha: float, posterior: Posterior, outputs: Callable[[str], ExitOutputs]
) -> tuple[NestedConformal, SetSummary]:
    """Conformal sets of the posterior's probabilities, and what they come to on the test split."""

    def calibrated(split: str) -> ExitOutputs:
        rows = outputs(split)
        return replace(rows, logits=posterior.probabilities(rows).clamp(min=torch.finfo(torch.float64).tiny).log())

    state = nested_conformal.fit_classes(
        calibrated("calibrate"), NestedConformalConfig(alpha=alpha), tune=calibrated("tune")
    )
    test = outputs("test")
    found = nested_conformal.apply_classes(state, posterior.probabilities(test))
    return state, summarise(found, test.labels)

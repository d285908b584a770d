"""How sure, or unsure, an early readout is of a row: numbers in [0, 1] that instance weights are made of."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

from offramp.classifiers.confidence import gap as margin
from offramp.distillation.readout import ReadoutOutputs
from offramp.uncertainty import avcs_classification, nested_conformal, predictive
from offramp.uncertainty.avcs_classification import AVCSClassificationConfig
from offramp.uncertainty.laplace import Factors, damping
from offramp.uncertainty.nested_conformal import NestedConformalConfig
from offramp.uncertainty.one_exit import Laplace
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.posterior import PosteriorConfig
from offramp.values import choice

CONFIDENCES = ("margin", "laplace_margin", "set_sharpness")
"""Signals that are large where the readout is sure; they go with a gate that asks whether it is wrong."""
UNCERTAINTIES = ("entropy", "laplace_entropy", "laplace_mi", "laplace_variance", "distance", "loss", "set_size")
"""Signals that are large where it is unsure, or far from what it knows."""
SIGNALS = (*CONFIDENCES, *UNCERTAINTIES, "set_miss")
SETS = ("nested", "avcs")


@dataclass(frozen=True)
class Evidence:
    """What is known about the training rows at the readout; each part is worked out when it is asked for.

    Attributes:
        reading: Outputs of the training rows.
        tune: Outputs of rows outside training, for sets and for a prior variance that is tuned; None: there are none.
        n_mc: Draws of Laplace's logits.
        prior_variance: ω; None: tuned by the likelihood of `tune`.
        sets: Which sets of classes, one of `SETS`.
        miss: One minus the coverage that sets aim at.
        seed: Seed of the draws.
    """

    reading: ReadoutOutputs
    tune: ReadoutOutputs | None = None
    n_mc: int = 50
    prior_variance: float | None = 1.0
    sets: str = "nested"
    miss: float = 0.05
    seed: int = 0

    @cached_property
    def map(self) -> Tensor:
        """Probabilities of the readout itself, [N, C], float64."""
        return self.reading.logits.double().softmax(-1)

    @cached_property
    def _laplace(self) -> tuple[Laplace, float]:
        """Last-layer Laplace of the readout, in closed form, and its temperature."""
        reading, classes = self.reading, self.reading.logits.shape[1]
        if self.prior_variance is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an edge of the grid, every epoch anew
                config = PosteriorConfig(method="laplace", n_mc=self.n_mc, seed=self.seed)
                fitted = config.fit(_outputs(reading), _outputs(self._tune())).exits[0]
            assert fitted.laplace is not None
            return fitted.laplace, fitted.temperature
        factors = Factors.empty(reading.features.shape[1], classes).update(reading.features, reading.logits)
        damped = damping(factors, "factored", name="the readout")(self.prior_variance)
        return Laplace(factors, damped, damped.directions(predictive.draws(self.n_mc, classes, self.seed))), 1.0

    @cached_property
    def spread(self) -> Tensor:
        """s(x), the variance that Laplace gives the logits, [N]."""
        return self._laplace[0].spread(self.reading.features, 2**28)[:, 0]

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of Laplace's drawn probabilities: mean [N, C], mean entropy [N], summed variance [N]."""
        laplace, temperature = self._laplace
        config = PosteriorConfig(method="laplace", n_mc=self.n_mc)
        return laplace.noisy(config, self.spread[:, None], self.reading.logits).moments(temperature)

    @cached_property
    def members(self) -> Tensor:
        """Sets of classes, [N, C], bool; fitted on rows outside training, else nearly all would hold one class."""
        tune, logits = self._tune(), self.reading.logits[None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # coverage too low at the start, every epoch anew
            if self.sets == "avcs":
                config = AVCSClassificationConfig(alpha=self.miss, seed=self.seed)
                state = avcs_classification.fit(tune.logits[None], tune.labels, config, ids=tune.ids)
                return avcs_classification.apply(state, logits, ids=self.reading.ids).members[0]
            plain = NestedConformalConfig(alpha=self.miss, equalise=False)
            fitted = nested_conformal.fit_classes(_outputs(tune), plain)
            return nested_conformal.apply_classes(fitted, logits.double().softmax(-1)).members[0]

    @property
    def all_empty(self) -> bool:
        """Whether no row's set holds a class, so that sets tell no rows apart."""
        return not bool(self.members.any())

    def _tune(self) -> ReadoutOutputs:
        if self.tune is None:
            raise ValueError("sets and a tuned prior variance need rows outside training; give a share of them (tune)")
        if self.tune.epoch != self.reading.epoch:
            raise ValueError(
                f"the tuning rows were read after epoch {self.tune.epoch}, the training rows after epoch "
                f"{self.reading.epoch}; read both with the same readout"
            )
        return self.tune


def signal(name: str, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """A signal of `SIGNALS`, in [0, 1], [N], float64; and the most probable class under its distribution, [N]."""
    choice("the signal", name, SIGNALS)
    p, labels = evidence.map, evidence.reading.labels
    classes = p.shape[1]
    if name == "margin":
        u = margin(p)
    elif name == "entropy":
        u = torch.special.entr(p).sum(-1) / math.log(classes)
    elif name == "loss":
        u = share_of_rank(F.cross_entropy(evidence.reading.logits.double(), labels, reduction="none"))
    elif name == "distance":
        u = share_of_rank(evidence.spread)
    elif name.startswith("laplace_"):
        p, entropy, variance = evidence.moments
        total = torch.special.entr(p).sum(-1)
        u = {
            "laplace_margin": margin(p), "laplace_entropy": total / math.log(classes),
            "laplace_mi": (total - entropy) / math.log(classes), "laplace_variance": variance / (1 - 1 / classes),
        }[name]  # fmt: skip
    else:
        sizes = evidence.members.sum(-1).double()
        u = (sizes - 1) / (classes - 1)
        u = {"set_size": u, "set_sharpness": 1 - u, "set_miss": 1.0 - _holds(evidence).double()}[name]
        if name != "set_miss":
            u = u.masked_fill(sizes == 0, 1.0)  # nothing is left: as conspicuous as it gets
    return u.clamp(0, 1), p.argmax(-1)


def excluded(evidence: Evidence) -> Tensor:
    """Rows whose label is not in their set, [N], bool."""
    return ~_holds(evidence)


def share_of_rank(values: Tensor) -> Tensor:
    """Ranks from 0 (smallest) to 1, equal values sharing the mean of theirs: [N] -> [N]."""
    ranks = torch.from_numpy(rankdata(values.double().numpy())) - 1
    return ranks / max(len(values) - 1, 1)


def _holds(evidence: Evidence) -> Tensor:
    return evidence.members.gather(1, evidence.reading.labels[:, None])[:, 0]


def _outputs(reading: ReadoutOutputs) -> ExitOutputs:
    return ExitOutputs([reading.features], reading.logits[None], reading.labels, torch.ones(1), reading.ids)

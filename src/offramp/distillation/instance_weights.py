"""Weights of training rows from what an early readout says of them: signal x gate x map.

A signal is how sure, or unsure, the readout is of a row: a number in [0, 1]. DEDIER (Tiwari et al., WACV 2024) weights
exp(β cm^α) the rows its readout gets wrong, by their confidence margin cm. The uncertainty variants follow arXiv
2505.01070, which leaves open what scalar is used, where, and through which map: these presets are our reading of it.
Every row gets a new weight each time, so one that turns right goes back to 1.

An empty set is as conspicuous as it gets, one row among others. Where the sets of all rows are empty they say nothing
of any, and as in decoding, where an empty set is no set, all rows weigh 1: the same large weight for all would change
the size of the steps and nothing else.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from functools import cached_property

import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

from offramp.classifiers.batches import Rows
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.exits import gap as margin
from offramp.distillation.readout import ReadoutConfig, ReadoutOutputs, read, states_at, teach
from offramp.metrics.group_effects import ReadoutDiagnostics, readout_diagnostics
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
GATES = ("wrong", "all", "correct", "excluded", "uncertain")
MAPS = ("power", "linear", "rank")
TERMS = ("kd", "ce", "both")
NORMALISATIONS = ("none", "mean", "clip")
CONTROLS = ("none", "permuted", "mean-matched", "gate-matched", "oracle")
DOUBT = 0.5
"""Margin below which a readout is uncertain."""


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


@dataclass(frozen=True)
class InstanceWeights:
    """Weight = map(signal) where the gate holds, else 1. The defaults are DEDIER's, for Waterbirds.

    Attributes:
        signal: One of `offramp.distillation.instance_weights.SIGNALS`.
        gate: "wrong": the answer is not the label; "all"; "correct"; "excluded": the label is not in the set;
            "uncertain": the readout's largest probability is less than `DOUBT` above its second (ours; knows no label).
        map: "power": exp(β u^α); "linear": 1 + β u; "rank": exp(β rank(u)), ranks from 0 to 1.
        alpha: A power; 0 leaves the gate alone. Near 0.05 the weight is almost the same for all rows it touches.
        beta: The weight of u = 1 is exp(β), with "linear" 1 + β.
        weight_on: The term that is weighted: "kd", "ce" or "both".
        normalise: "none", as published; "mean": divided by their mean; "clip": at most `largest`.
        largest: With "clip".
        every: L, epochs between two readouts.
        warmup: Epochs before the first.
        control: "permuted": the same weights in another order; "mean-matched": their mean for every row;
            "gate-matched": for every row that weighs more than 1 the mean of those, so that gate and scale are the same
            and the signal says nothing; "oracle": exp(β) for the rows that true groups call minority, which uses group
            labels.
        readout: The readout.
        n_mc: Draws of Laplace's logits.
        prior_variance: Prior variance of Laplace; None: tuned on rows outside training.
        sets: "nested" (conformal) or "avcs".
        miss: One minus the coverage that sets aim at.

    Raises:
        ValueError: A value out of range.
    """

    signal: str = "margin"
    gate: str = "wrong"
    map: str = "power"
    alpha: float = 0.05
    beta: float = 4.0
    weight_on: str = "kd"
    normalise: str = "none"
    largest: float | None = None
    every: int = 1
    warmup: int = 0
    control: str = "none"
    readout: ReadoutConfig = field(default_factory=ReadoutConfig)
    n_mc: int = 50
    prior_variance: float | None = 1.0
    sets: str = "nested"
    miss: float = 0.05

    def __post_init__(self) -> None:
        choices = {
            "signal": SIGNALS, "gate": GATES, "map": MAPS, "weight_on": TERMS, "normalise": NORMALISATIONS,
            "control": CONTROLS, "sets": SETS,
        }  # fmt: skip
        for name, allowed in choices.items():
            choice(f"{name} of the weights", getattr(self, name), allowed)
        if self.alpha < 0 or self.beta < 0:
            raise ValueError(f"alpha is {self.alpha} and beta {self.beta}; neither may be negative")
        if self.every < 1 or self.warmup < 0 or self.n_mc < 1:
            raise ValueError(
                f"every is {self.every}, warmup {self.warmup}, n_mc {self.n_mc}; they count from 1, 0 and 1"
            )
        if (self.normalise == "clip") != (self.largest is not None) or (self.largest or 1) < 1:
            raise ValueError(f"normalise is {self.normalise!r} and largest {self.largest}; clip needs one from 1 on")
        if self.prior_variance is not None and not self.prior_variance > 0:
            raise ValueError(f"prior_variance is {self.prior_variance}; it must be above 0, or None to tune it")

    @property
    def needs_tuning(self) -> bool:
        """Whether rows outside training are needed."""
        tuned = self.prior_variance is None and (self.signal.startswith("laplace_") or self.signal == "distance")
        return self.by_sets or tuned

    @property
    def by_sets(self) -> bool:
        """Whether sets of classes say which rows weigh more."""
        return self.signal.startswith("set_") or self.gate == "excluded"

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether there is a new readout behind an epoch, counted from 0, of so many."""
        return self.warmup <= epoch < epochs - 1 and (epoch - self.warmup) % self.every == 0


def mapped(u: Tensor, config: InstanceWeights) -> Tensor:
    """Weights of signals in [0, 1]: [N] -> [N]."""
    if config.map == "power":
        return (config.beta * u**config.alpha).exp()
    if config.map == "linear":
        return 1 + config.beta * u
    return (config.beta * share_of_rank(u)).exp()


def weights_of(evidence: Evidence, config: InstanceWeights) -> Tensor:
    """Weights of the training rows, before control and normalisation, [N], float64; 1 where the gate does not hold."""
    if config.by_sets and evidence.all_empty:
        return torch.ones(len(evidence.reading.labels), dtype=torch.float64)
    u, answers = signal(config.signal, evidence)
    return gated(u, answers == evidence.reading.labels, config, _asked(evidence, config))


def _asked(evidence: Evidence, config: InstanceWeights) -> Tensor | None:
    """Where a gate holds that asks for more than right or wrong, [N], bool."""
    if config.gate == "excluded":
        return excluded(evidence)
    return margin(evidence.map) < DOUBT if config.gate == "uncertain" else None


def gate_of(right: Tensor, config: InstanceWeights, open_: Tensor | None = None) -> Tensor:
    """Where the gate holds, [N], bool; arguments as for `gated`."""
    gate = {"wrong": ~right, "all": torch.ones_like(right), "correct": right}.get(config.gate, open_)
    assert gate is not None
    return gate


def gated(u: Tensor, right: Tensor, config: InstanceWeights, open_: Tensor | None = None) -> Tensor:
    """Weights [N] of a signal [N] where the gate holds (for "excluded" and "uncertain", where `open_` says), else 1."""
    return torch.where(gate_of(right, config, open_), mapped(u, config), 1.0)


def finished(weights: Tensor, config: InstanceWeights, seed: int, minority: Tensor | None = None) -> Tensor:
    """Control ("permuted" by the seed, "oracle" by the minority, [N], bool) and normalisation of weights, [N]."""
    if config.control == "permuted":
        order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed))
        weights = weights[order]
    elif config.control == "mean-matched":
        weights = torch.full_like(weights, float(weights.mean()))
    elif config.control == "gate-matched":
        heavy = weights > 1
        weights = torch.where(heavy, weights[heavy].mean(), weights)  # without such rows the mean is NaN, and unused
    elif config.control == "oracle":
        if minority is None:
            raise ValueError("the control 'oracle' weights by true groups, but those of training rows are unknown")
        weights = torch.where(minority, mapped(torch.ones_like(weights), config), 1.0)
    if config.normalise == "mean":
        return weights / weights.mean()
    return weights.clamp(max=config.largest) if config.normalise == "clip" else weights


def require_early(student: EarlyExitClassifier, config: InstanceWeights) -> None:
    """Raise a ValueError if the weights' readout would read after the student's last block; "oracle" has none."""
    depth, blocks = config.readout.depth, student.backbone.num_layers
    if config.control != "oracle" and depth >= blocks:
        raise ValueError(f"the readout reads after block {depth} of {blocks}; that is not early: lower depth")


def new_weights(
    student: EarlyExitClassifier,
    train: Rows,
    config: InstanceWeights,
    *,
    epoch: int,
    seed: int,
    tune: Rows | None = None,
    minority: Tensor | None = None,
    precision: str | None = None,
    batch: int = 64,
) -> tuple[Tensor, ReadoutDiagnostics | None]:
    """Teach a new readout on the student as it is, and weight all training rows by it.

    Args:
        student: Not changed in any way.
        train: The training rows, N.
        config: What weights; the readout's learning rate is given.
        epoch: That ended.
        seed: Seed of the run.
        tune: Rows outside training, for sets.
        minority: For the control "oracle".
        precision: "bf16": the student computes in bfloat16; None: as it is.
        batch: Rows of a step of the student.

    Returns:
        [N], float32, in the order of the rows; and how good the readout is, None without one ("oracle").

    Raises:
        ValueError: The readout is to read after the last block, or rows outside training or a minority are missing.
    """
    here = (seed << 12) + epoch
    if config.control == "oracle":
        return finished(torch.ones(len(train.data), dtype=torch.float64), config, here, minority).float(), None
    depth = config.readout.depth
    require_early(student, config)
    states = states_at(student, train, depth, precision)
    readout = teach(states, train.data.labels, student.num_classes, config.readout, here)
    reading = read(readout, states, train, epoch)
    other = None
    if tune is not None and config.needs_tuning:
        other = read(readout, states_at(student, tune, depth, precision), tune, epoch)
    evidence = Evidence(reading, other, config.n_mc, config.prior_variance, config.sets, config.miss, seed)
    return finished(weights_of(evidence, config), config, here, minority).float(), look_at(evidence, config, batch)


def look_at(evidence: Evidence, config: InstanceWeights, batch: int) -> ReadoutDiagnostics:
    """How good a readout is, by its own answers, and how many rows its gate takes; a step has `batch` of them.

    Returns:
        The diagnostics; of a gate on a signal's answers (Laplace's mean) by those.
    """
    own, labels = evidence.map.argmax(-1), evidence.reading.labels
    gate = None
    if config.gate != "all":
        answers = signal(config.signal, evidence)[1] if config.gate in ("wrong", "correct") else own
        gate = gate_of(answers == labels, config, _asked(evidence, config))
    return readout_diagnostics(own, labels, batch, gate, evidence.all_empty if config.by_sets else None)

"""One exit: its settings, its Laplace approximation if it has one, and how all exits are fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offramp.uncertainty import predictive, tuning
from offramp.uncertainty.laplace import Damped, Exact, Factored, Factors, damping
from offramp.uncertainty.outputs import ExitOutputs
from offramp.values import choice

# ---------------------------------------------------------------- settings

METHODS = ("vanilla", "temperature", "mie", "mie+temperature", "laplace", "mie+laplace")
"""From the network's own softmax to the published method; "mie" is the model-internal ensemble."""
UNTUNED = ("vanilla", "mie")
"""Those without a temperature, of which nothing is fitted."""


@dataclass(frozen=True)
class Settings:
    """What is fitted, and how.

    Attributes:
        method: One of `METHODS`; with "laplace", temperature and prior variance are tuned together.
        n_mc: Draws of the logits, the same in tuning and use.
        damping: "factored", as published, or "exact".
        predictive: "mc", means over draws, or "probit", none.
        grid: None: any temperature, prior variances from 1e-6 to 100; "meronen": the published 10 x 10.
        evidence: Multiplies the number of rows, in (0, 1]; below 1 where rows depend on each other.
        seed: Of the draws.
        memory: Bytes that the work on chunks of rows and draws may take.
        bias: Whether the exits' last layers have a bias.
    """

    method: str = "mie+laplace"
    n_mc: int = 50
    damping: str = "factored"
    predictive: str = "mc"
    grid: str | None = None
    evidence: float = 1.0
    seed: int = 0
    memory: int = 256 * 2**20
    bias: bool = True

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str | None, ...]] = {
            "method": METHODS, "damping": ("factored", "exact"), "predictive": ("mc", "probit"),
            "grid": (None, "meronen"),
        }  # fmt: skip
        for name, allowed in choices.items():
            choice(name, getattr(self, name), allowed)
        if self.n_mc < 1:
            raise ValueError(f"n_mc is {self.n_mc}; it must be at least 1 (50 are customary)")
        if not 0 < self.evidence <= 1:
            raise ValueError(f"evidence is {self.evidence}; it must be in (0, 1]")
        if self.memory < 1:
            raise ValueError(f"memory is {self.memory}; it is a number of bytes, such as {256 * 2**20}")

    @property
    def is_laplace(self) -> bool:
        """Whether there is a prior variance."""
        return self.method.endswith("laplace")

    @property
    def is_ensemble(self) -> bool:
        """Whether earlier exits have a say."""
        return self.method.startswith("mie")


# ---------------------------------------------------------------- state


@dataclass(frozen=True)
class Laplace:
    """The Laplace approximation of one exit, ready for use.

    Attributes:
        factors: Sums that more rows can be added to; then temperature and prior variance must be tuned again.
        damped: The damped Hessian at the chosen prior variance.
        basis: For "mc" the directions of the draws, [n_mc, C], for "probit" `Damped.centred`, [k, C].
    """

    factors: Factors
    damped: Damped
    basis: Tensor

    def predict(self, config: Settings, features: Tensor, logits: Tensor) -> predictive.Predictive:
        """What it says about rows [B, D], [B, C]."""
        spread = self.spread(features, config.memory)
        if config.predictive == "probit":
            return predictive.Shrunk(logits, spread @ self.basis)
        return self.noisy(config, spread, logits)

    def noisy(self, config: Settings, spread: Tensor, logits: Tensor) -> predictive.Noisy:
        """The rows' logits with their noise."""
        return predictive.Noisy(logits, spread.sqrt(), self.basis, self.damped, config.memory)

    def spread(self, features: Tensor, memory: int) -> Tensor:
        """Of rows [B, D], in chunks, [B, k]."""
        rows = max(1, memory // (predictive.ARRAYS * 8 * (features.shape[1] + 1)))
        return torch.cat([self.damped.spread(features[i : i + rows]) for i in range(0, max(len(features), 1), rows)])


@dataclass(frozen=True)
class ExitPosterior:
    """One exit: its settings, how they were found, and its Laplace approximation if it has one."""

    tuned: tuning.Tuned
    laplace: Laplace | None = None
    comparison: tuning.Comparison | None = None

    def predict(self, config: Settings, features: Tensor, logits: Tensor) -> predictive.Predictive:
        """What the exit alone says about rows [B, D], [B, C]."""
        return predictive.Plain(logits) if self.laplace is None else self.laplace.predict(config, features, logits)

    @property
    def temperature(self) -> float:
        """T."""
        return self.tuned.temperature

    @property
    def omega(self) -> float | None:
        """Prior variance ω; None: no prior."""
        return self.tuned.omega

    def messages(self) -> list[str]:
        """What a user should know."""
        jitters = () if self.laplace is None else zip(("feature", "class"), self.laplace.damped.jitters, strict=True)
        return [*self.tuned.edges] + [
            f"its {name} factor was singular, and {jitter:g} of the mean diagonal was added to it"
            for name, jitter in jitters if jitter
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """All but tensors, as JSON values."""
        tuned, laplace = self.tuned, self.laplace
        return {
            "temperature": tuned.temperature,
            "omega": tuned.omega,
            "nlpd": tuned.nlpd,
            "surface": [list(point) for point in tuned.surface],
            "edges": list(tuned.edges),
            "comparison": None if self.comparison is None else asdict(self.comparison),
            "laplace": None
            if laplace is None
            else {
                "rows": laplace.factors.rows,
                "bias": laplace.factors.bias,
                "jitters": list(laplace.damped.jitters),
                "damping": "exact" if isinstance(laplace.damped, Exact) else "factored",
            },
        }

    def tensors(self) -> dict[str, Tensor]:
        """By name; none without a Laplace approximation."""
        if self.laplace is None:
            return {}
        factors, damped = self.laplace.factors, self.laplace.damped
        named = {"factors.features": factors.features, "factors.classes": factors.classes, "basis": self.laplace.basis}
        named |= {f"damped.{name}": getattr(damped, name) for name in _tensor_fields(type(damped))}
        return {name: tensor.contiguous() for name, tensor in named.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExitPosterior:
        """From what `to_dict` and `tensors` gave."""
        tuned = tuning.Tuned(
            values["temperature"], values["omega"], values["nlpd"], tuple(map(tuple, values["surface"])),
            tuple(values["edges"]),
        )  # fmt: skip
        comparison = values["comparison"] and tuning.Comparison(**values["comparison"])
        if (about := values["laplace"]) is None:
            return cls(tuned, None, comparison)
        kind = Exact if about["damping"] == "exact" else Factored
        damped = kind(
            **{name: tensors[f"damped.{name}"] for name in _tensor_fields(kind)},
            bias=about["bias"],
            jitters=tuple(about["jitters"]),
        )
        factors = Factors(tensors["factors.features"], tensors["factors.classes"], about["rows"], about["bias"])
        return cls(tuned, Laplace(factors, damped, tensors["basis"]), comparison)


def _tensor_fields(kind: type) -> list[str]:
    return [field.name for field in fields(kind) if field.type == "Tensor"]


# ---------------------------------------------------------------- fit


def fit_exits(
    config: Settings, fit: ExitOutputs, tune: ExitOutputs, draws: Tensor | None
) -> list[ExitPosterior]:  # fmt: skip
    """All E exits: factors from `fit`, temperatures and prior variances from `tune`; draws [n_mc, C] or None."""
    weights = predictive.ensemble_weights(tune.costs) if config.is_ensemble else None
    tuned = partial(tuning.tune_all, exits=tune.exits, weights=weights)

    def plain(exit: int, omega: float | None) -> tuning.Rows:
        return partial(predictive.Plain(tune.logits[exit]).log_probabilities, tune.labels)

    vanilla = tuned(plain, space=tuning.Space())
    if config.method in UNTUNED:
        return [ExitPosterior(t) for t in vanilla]
    tempered = tuned(plain, space=tuning.temperatures(config.grid))
    if not config.is_laplace:
        return [ExitPosterior(t) for t in tempered]

    laplace = [_at_prior(config, fit, exit, draws) for exit in range(fit.exits)]

    def noisy(exit: int, omega: float | None) -> tuning.Rows:
        rows = laplace[exit](omega).predict(config, tune.features[exit], tune.logits[exit])
        return partial(rows.log_probabilities, tune.labels)

    found = tuned(noisy, space=tuning.with_prior(config.grid))
    return [
        ExitPosterior(chosen, at(chosen.omega), tuning.compare(v.losses, t.losses, chosen.losses))
        for chosen, at, v, t in zip(found, laplace, vanilla, tempered, strict=True)
    ]


def _at_prior(
    config: Settings, fit: ExitOutputs, exit: int, draws: Tensor | None
) -> Callable[[float | None], Laplace]:  # fmt: skip
    """The approximation of an exit for any prior variance."""
    features, logits = fit.features[exit], fit.logits[exit]
    factors = Factors.empty(features.shape[1], fit.classes, bias=config.bias)
    rows = max(1, config.memory // (predictive.ARRAYS * 8 * (features.shape[1] + fit.classes + 1)))
    for i in range(0, fit.rows, rows):
        factors = factors.update(features[i : i + rows], logits[i : i + rows])
    damped = damping(factors, config.damping, evidence=config.evidence, name=f"exit {exit + 1}")

    def at(omega: float | None) -> Laplace:
        assert omega is not None
        noise = damped(omega)
        return Laplace(factors, noise, noise.centred() if draws is None else noise.directions(draws))

    return at

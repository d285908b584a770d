"""What calibration on text adds to exits: posteriors over the head, and sets of tokens, behind three confidences.

"laplace" averages each exit's probabilities over a posterior of the head (`offramp.uncertainty.candidates`);
"conformal" and "avcs" keep a set of tokens that shrinks from exit to exit (`offramp.uncertainty.token_sets`). A
`Posterior` belongs to the exits it was fitted for and is saved with them: tensors beside their weights, and settings.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.uncertainty import candidates, token_sets
from offramp.uncertainty.candidates import LaplaceConfig, TokenLaplace, shortlist
from offramp.uncertainty.token_sets import ConformalSets, EvidenceSets, Running, TokenSets
from offramp.uncertainty.tuning import TokensTuned

if TYPE_CHECKING:
    from offramp.core.confidence import Confidence, Reading
    from offramp.core.plan import Plan
    from offramp.core.policy import ExitPolicy

METHODS = ("laplace", "conformal", "avcs")
"""Confidences that need a posterior."""
SETS = ("conformal", "avcs")
"""Those that keep sets of tokens."""


class Posterior(nn.Module):
    """Fitted confidences of exits; made by `Posterior.of` or from what was saved.

    Args:
        settings: As JSON values: "layers" and "methods" there are, "candidates" (k), "sizes" (tokens scored at each
            layer, null for all) and "pruning" (null, or the fields of a policy) it was fitted for, one entry per
            method, and how it came about.
        tensors: By name: "draws" [n_MC, V]; of each layer "spread_LAYER" [V] and "root_LAYER" [m, m], or
            "directions_LAYER" [m, ρ] and "gains_LAYER" [ρ + 1]; "knots_LAYER" [2, m].

    Raises:
        ValueError: The settings and tensors do not belong together.
    """

    digest: Tensor

    def __init__(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.settings = dict(settings)
        tensors = dict(tensors)
        expected = _digest(self.settings)
        if not torch.equal(tensors.pop("digest", expected).cpu(), expected):
            raise ValueError("the posterior's settings are not those its tensors were saved with")
        self.register_buffer("digest", expected)  # so that the exits' fingerprint covers the settings
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._check()

    def _check(self) -> None:
        """See that nothing is missing, before decoding needs it."""
        try:
            layers, methods = self.layers, self.methods
            if not set(methods) <= set(METHODS) or not layers:
                raise ValueError(f"its methods are {methods}")
            for method in methods:
                if method == "laplace":
                    for layer in layers:
                        self.laplace(layer)
                else:
                    self.sets(method)
            int(self.settings["candidates"]), {int(layer): size for layer, size in self.settings["sizes"].items()}
            self.settings["pruning"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the posterior is incomplete ({error})") from error

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Any],
        *,
        laplace: Mapping[int, tuple[TokenLaplace, TokensTuned]] | None = None,
        config: LaplaceConfig | None = None,
        conformal: ConformalSets | None = None,
        avcs: EvidenceSets | None = None,
    ) -> Posterior:
        """Put fitted parts together, of Laplace by layer; settings without "methods" and their entries."""
        tensors: dict[str, Tensor] = {}
        parts: dict[str, Any] = {}
        for layer, (state, tuned) in (laplace or {}).items():
            tensors["draws"] = state.draws
            for name in ("spread", "root", "directions", "gains"):
                if (tensor := getattr(state, name)) is not None:
                    tensors[f"{name}_{layer}"] = tensor
            found = {"jitter": state.jitter, **asdict(tuned)}
            parts.setdefault("laplace", {**asdict(config or LaplaceConfig()), "exits": {}})["exits"][str(layer)] = found
        if conformal is not None:
            tensors |= {f"knots_{layer}": knots for layer, knots in conformal.knots.items() if knots.shape[1]}
            limit = conformal.limit if math.isfinite(conformal.limit) else "inf"
            parts["conformal"] = {"alpha": conformal.alpha, "limit": limit}
        if avcs is not None:
            thresholds = {str(layer): tau for layer, tau in avcs.thresholds.items()}
            parts["avcs"] = {
                "alpha": avcs.alpha, "seed": avcs.seed, "thresholds": thresholds, "coverage": avcs.coverage
            }  # fmt: skip
        record = json.loads(json.dumps({**settings, "methods": list(parts), **parts}))
        return cls(record, {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()})

    # ------------------------------------------------------------ what is there

    @property
    def layers(self) -> tuple[int, ...]:
        """Exits it was fitted for, ascending."""
        return tuple(self.settings["layers"])

    @property
    def methods(self) -> tuple[str, ...]:
        """Confidences it serves."""
        return tuple(self.settings["methods"])

    @property
    def candidates(self) -> int:
        """k, the tokens that are uncertain, or in a set, at most."""
        return int(self.settings["candidates"])

    def laplace(self, layer: int) -> TokenLaplace:
        """The posterior of one exit."""
        settings = self.settings["laplace"]
        tuned = settings["exits"][str(layer)]
        exact = settings["rank"] is None
        return TokenLaplace(
            getattr(self, f"root_{layer}") if exact else None,
            None if exact else getattr(self, f"directions_{layer}"),
            None if exact else getattr(self, f"gains_{layer}"),
            getattr(self, f"spread_{layer}"),
            self.get_buffer("draws"),
            float(tuned["temperature"]),
            bool(settings["rest_as_rival"]),
            float(tuned["jitter"]),
        )

    def sets(self, kind: str) -> TokenSets:
        """The calibrated sets of a kind in `SETS`."""
        settings = self.settings[kind]
        if kind == "avcs":
            thresholds = {int(layer): float(tau) for layer, tau in settings["thresholds"].items()}
            return EvidenceSets(settings["alpha"], thresholds, settings["seed"], settings.get("coverage"))
        knots = {layer: getattr(self, f"knots_{layer}", None) for layer in self.layers}
        return ConformalSets(
            settings["alpha"], float(settings["limit"]), {e: k for e, k in knots.items() if k is not None}
        )

    def policy(self, policy: ExitPolicy) -> ExitPolicy:
        """A policy with the pruning it was fitted for, tested at its exits."""
        pruning = self.settings["pruning"] or {"vocabulary": None, "vocabulary_size": None}
        return replace(policy, min_layer=None, exit_layers=self.layers, **pruning)

    def confidence(self, name: str, plan: Plan) -> Confidence:
        """One of the confidences it serves; a ValueError if it was fitted for other exits or another pruning."""
        if name not in self.methods:
            raise ValueError(
                f"confidence {name!r} needs a posterior fitted on text, but theirs has only {', '.join(self.methods)}; "
                f"fit one with: offramp calibrate MODEL --posterior {name}"
            )
        if plan.thresholds:
            self._require(name, plan)
        return Laplace(self) if name == "laplace" else NestedSets(self, name)

    def _require(self, method: str, plan: Plan) -> None:
        """Raise a ValueError unless it was fitted for what a plan asks for."""
        if lacking := [layer for layer in plan.thresholds if layer not in self.layers]:
            raise ValueError(
                f"confidence {method!r} is asked for after layer {lacking[0]}, but it was fitted after layers "
                f"{', '.join(map(str, self.layers))} only; name some of these as exit_layers, or fit again"
            )
        first = next(iter(plan.thresholds))
        pruned = self.settings["pruning"] is not None
        if first != self.layers[0] and (pruned or method in SETS):
            raise ValueError(
                f"confidence {method!r} was fitted for tokens chosen at its first exit, after layer {self.layers[0]}, "
                f"but the first test is after layer {first}; test there, or fit again"
            )
        if plan.frequent:
            raise ValueError(
                f"confidence {method!r} is fitted for readouts whose first test scores all tokens, but vocabulary is "
                f"{plan.policy.vocabulary!r}; use vocabulary=None, or another confidence"
            )
        adaptive = plan.pruning is not None and plan.pruning.kind == "adaptive"
        sizes = dict.fromkeys(plan.thresholds) if plan.pruning is None else plan.pruning.sizes(list(plan.thresholds))
        if adaptive or any(self.settings["sizes"][str(layer)] != size for layer, size in sizes.items()):
            asked = "vocabulary=None" if plan.pruning is None else f"vocabulary={plan.pruning.kind!r} of other sizes"
            have = "all tokens" if not pruned else ", ".join(f"{k}={v!r}" for k, v in self.settings["pruning"].items())
            raise ValueError(
                f"confidence {method!r} was fitted for {have}, but the policy has {asked}; use what it was fitted for, "
                "or fit again"
            )


@dataclass(frozen=True)
class Laplace:
    """Gap of the two largest probabilities, averaged over a last-layer Laplace posterior, in [0, 1].

    p̄_(1) - p̄_(2) over the candidates, as Meronen et al. (arXiv 2302.06359) for classifiers; see
    `offramp.uncertainty.candidates`. It changes when a token leaves, not which one: that is the trained head's best.
    """

    posterior: Posterior

    def __call__(self, reading: Reading) -> Tensor:
        """One gap per row, [A]; NaN for logits that are not finite."""
        state = self.posterior.laplace(reading.layer)
        short = shortlist(reading.logits, self.posterior.candidates, reading.ids)
        k, n = short.ids.shape[1], len(state.draws)
        reading.bill(candidates.flops(state, k), 4 * candidates.size(state), 4 * k * (n + 1))
        return candidates.gap(state, reading.input, short)


@dataclass(frozen=True)
class NestedSets:
    """1 / n of the n tokens in the running set, 0 for an empty one: any threshold in [1/2, 1) asks for a single token.

    The set is the intersection over the exits of a token, see `offramp.uncertainty.token_sets`. A threshold of
    1 / (n + 1) lets a token leave as soon as at most n are left, of which it emits the best. Whose set is empty goes
    through all layers.

    Attributes:
        posterior: What was fitted.
        kind: "conformal" or "avcs".
    """

    posterior: Posterior
    kind: str

    def __call__(self, reading: Reading) -> Tensor:
        """The confidence at a token's first exit, [A]."""
        return self.begin()(reading)

    def begin(self) -> RunningSet:
        """The set of all candidates, before a token's first exit."""
        return RunningSet(self.posterior, self.posterior.sets(self.kind))


@dataclass
class RunningSet:
    """The tokens that are still possible, from exit to exit of one token."""

    posterior: Posterior
    sets: TokenSets
    running: Running | None = None
    restricts: bool = True

    def __call__(self, reading: Reading) -> Tensor:
        """One value per row, [A], in [0, 1]; NaN for logits that are not finite."""
        normaliser = reading.logits.logsumexp(-1)
        if self.running is None:
            self.running = token_sets.start(shortlist(reading.logits, self.posterior.candidates, reading.ids).ids)
        logits = reading.of(self.running.ids)
        self.running = self.sets.step(self.running, reading.layer, logits, normaliser, reading.position)
        size = self.running.active.sum(-1).float().masked_fill(~normaliser.isfinite(), torch.nan)
        # Rounded down: in float32, 1/3 is above a threshold of 1/3.
        return torch.where(size > 1, torch.nextafter(1 / size.clamp(min=1), size.new_zeros(())), size)

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.running = None if self.running is None else self.running.select(rows)

    def among(self, scores: Tensor, rows: Tensor) -> Tensor:
        """Scores [n, V] of `rows`, with -inf outside a row's set unless that is empty."""
        assert self.running is not None
        return self.running.select(rows).among(scores)


def _digest(settings: Mapping[str, Any]) -> Tensor:
    """SHA-256 of settings, uint8 [32]."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)

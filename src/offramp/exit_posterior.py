"""What calibration on text adds to exits: posteriors over the head, and sets of tokens, behind three confidences.

"laplace" averages each exit's probabilities over a posterior of the head (`offramp.uncertainty.token_laplace`);
"conformal" and "avcs" keep a set of tokens that shrinks from exit to exit (`offramp.uncertainty.token_sets`). A
`Posterior` belongs to the exits it was fitted for and is saved with them: tensors beside their weights, and settings.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.uncertainty.token_laplace import LaplaceConfig, TokenLaplace
from offramp.uncertainty.token_sets import ConformalSets, EvidenceSets, TokenSets
from offramp.uncertainty.token_tuning import Tuned

if TYPE_CHECKING:
    from offramp.exits import Exits
    from offramp.plan import Plan
    from offramp.policy import ExitPolicy

METHODS = ("laplace", "conformal", "avcs")
"""Confidences that need a posterior."""
SETS = ("conformal", "avcs")
"""Those that keep sets of tokens."""
_FIT = "fit one with: offramp calibrate MODEL --posterior "


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
        laplace: Mapping[int, tuple[TokenLaplace, Tuned]] | None = None,
        config: LaplaceConfig | None = None,
        conformal: ConformalSets | None = None,
        avcs: EvidenceSets | None = None,
    ) -> Posterior:
        """Put fitted parts together.

        Args:
            settings: See the class, without "methods" and their entries.
            laplace: By layer.
            config: Of these.
            conformal: Sets for all layers.
            avcs: Likewise.

        Returns:
            The posterior.
        """
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


def require_posterior(exits: Exits | None, method: str, plan: Plan | None = None) -> Posterior:
    """The posterior of exits, for a confidence in `METHODS`.

    Args:
        exits: Those of the model.
        method: The confidence.
        plan: Where it is to be tested; None: unknown.

    Returns:
        The posterior.

    Raises:
        ValueError: There is none, or it was fitted for other exits or another pruning.
    """
    posterior = None if exits is None else exits.posterior
    if posterior is None or method not in posterior.methods:
        what = "the model's exits have none" if posterior is None else f"theirs has only {', '.join(posterior.methods)}"
        what = "the model has no exits" if exits is None else what
        raise ValueError(f"confidence {method!r} needs a posterior fitted on text, but {what}; {_FIT}{method}")
    if plan is None:
        return posterior
    if lacking := [layer for layer in plan.thresholds if layer not in posterior.layers]:
        raise ValueError(
            f"confidence {method!r} is asked for after layer {lacking[0]}, but it was fitted after layers "
            f"{_listed(posterior.layers)} only; name some of these as exit_layers, or fit again"
        )
    first = next(iter(plan.thresholds))
    pruned = posterior.settings["pruning"] is not None
    if first != posterior.layers[0] and (pruned or method in SETS):
        raise ValueError(
            f"confidence {method!r} was fitted for tokens chosen at its first exit, after layer {posterior.layers[0]}, "
            f"but the first test is after layer {first}; test there, or fit again"
        )
    adaptive = plan.pruning is not None and plan.pruning.kind == "adaptive"
    sizes = dict.fromkeys(plan.thresholds) if plan.pruning is None else plan.pruning.sizes(list(plan.thresholds))
    if adaptive or any(posterior.settings["sizes"][str(layer)] != size for layer, size in sizes.items()):
        asked = "vocabulary=None" if plan.pruning is None else f"vocabulary={plan.pruning.kind!r} of other sizes"
        have = "all tokens" if not pruned else ", ".join(f"{k}={v!r}" for k, v in posterior.settings["pruning"].items())
        raise ValueError(
            f"confidence {method!r} was fitted for {have}, but the policy has {asked}; use what it was fitted for, or "
            "fit again"
        )
    return posterior


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))


def _digest(settings: Mapping[str, Any]) -> Tensor:
    """SHA-256 of settings, uint8 [32]."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)

"""The settings that may be certified, and orders to go through them that no calibration prompt has a part in."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from offramp.core.plan import resolve
from offramp.core.policy import ExitPolicy
from offramp.core.vocabulary import rule_of
from offramp.evaluation.arms import tested_from

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel

THRESHOLDS = (
    0.999, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0,
)  # fmt: skip
"""From safe to bold; finer near 1, where the confidences of language models pile up. For every measure."""
SHARES = (1.0, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""From safe to bold: shares of the wrong early tokens that thresholds of their own for each layer keep in."""
NEVER = ExitPolicy(threshold=None)
"""What is left when nothing is certified: the full model."""

LayerThresholds = Callable[[ExitPolicy, Sequence[float]], Sequence[tuple[float, ...]]]
"""(policy, shares) -> for each share one threshold per exit (see `offramp.calibration.layer_thresholds`)."""


@dataclass(frozen=True)
class Grid:
    """What is tried, all combinations of it.

    Attributes:
        thresholds: Of the confidence, in any order; None: `THRESHOLDS`. With `per_layer` shares, None: `SHARES`.
        min_layers: First layers tested; None: that of the policy.
        vocabulary_sizes: Tokens kept by a policy that prunes; None: those of the policy.
        per_layer: A threshold for each exit layer: a family with one parameter, the share of wrong tokens kept in.
    """

    thresholds: tuple[float, ...] | None = None
    min_layers: tuple[int, ...] | None = None
    vocabulary_sizes: tuple[int, ...] | None = None
    per_layer: bool = False

    def __post_init__(self) -> None:
        for name in ("thresholds", "min_layers", "vocabulary_sizes"):
            if getattr(self, name) == ():
                raise ValueError(f"{name} is empty; give at least one value, or None for the default")
        if self.per_layer and not all(0 <= share <= 1 for share in self.knobs):
            raise ValueError(f"thresholds are {self.knobs}; with per_layer they are shares in [0, 1]")

    @property
    def knobs(self) -> tuple[float, ...]:
        """Thresholds or shares, from safe to bold."""
        return tuple(sorted(set(self.thresholds or (SHARES if self.per_layer else THRESHOLDS)), reverse=True))

    def chains(self, base: ExitPolicy) -> int:
        """Combinations of minimum layer and vocabulary size, each with its own sequence of thresholds."""
        if base.confidence == "static":
            return 1  # a sequence of layers
        return len(set(self.min_layers or (0,))) * len(set(self.vocabulary_sizes or (0,)))

    def size(self, base: ExitPolicy) -> int:
        """Number of settings."""
        return len(set(self.min_layers or (0,))) if base.confidence == "static" else self.chains(base) * len(self.knobs)


@dataclass(frozen=True)
class Setting:
    """One point of a grid.

    Attributes:
        name: In words, different from all others of the grid.
        policy: What it is.
        knob: Its threshold, or its share; None for static exits.
        chain: Which combination of minimum layer and vocabulary size it belongs to, counted from the safest.
        boldness: Mean of its relative places along the grid's dimensions, from 0 (safest) to 1.
    """

    name: str
    policy: ExitPolicy
    knob: float | None
    chain: int
    boldness: float

    @property
    def file_name(self) -> str:
        """The name in the alphabet of file names."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower().replace("-", "minus ")).strip("-.")


def settings_of(
    lm: LanguageModel, base: ExitPolicy, grid: Grid, layer_thresholds: LayerThresholds | None = None
) -> list[Setting]:
    """The grid, chain by chain, each from safe to bold. A static policy has no threshold: one chain of layers.

    Args:
        lm: The model.
        base: All that the grid leaves open.
        grid: What is tried.
        layer_thresholds: Makes the thresholds of `per_layer`, from other examples than those that certify.

    Returns:
        Settings, all of which fit the model.

    Raises:
        ValueError: A value that `ExitPolicy` or the model does not allow, sizes for a policy that does not prune, or a
            policy that cannot be calibrated.
    """
    _check(base, grid)
    static = base.confidence == "static"
    layers: list[int | None] = [*sorted(set(grid.min_layers or ()), reverse=True)] or [None]
    sizes: list[int | None] = [*sorted(set(grid.vocabulary_sizes or ()), reverse=True)] or [None]
    knobs: list[float | None] = [None] if static else [*grid.knobs]
    places = list(product(enumerate(layers), enumerate(sizes)))
    policies = [_at(lm, base, layer, size) for (_, layer), (_, size) in places]
    settings: list[Setting] = []
    for chain, (((at, layer), (kept, size)), policy) in enumerate(zip(places, policies, strict=True)):
        values = _thresholds(policy, grid, layer_thresholds)
        for place, (knob, threshold) in enumerate(zip(knobs, values, strict=True)):
            spots = [(at, len(layers)), (kept, len(sizes)), (place, len(knobs))]
            steps = [spot / (count - 1) for spot, count in spots if count > 1]
            settings.append(
                Setting(
                    _name(policy, knob, layer, size, grid),
                    policy if knob is None else replace(policy, threshold=threshold),
                    knob,
                    0 if static else chain,
                    sum(steps) / len(steps) if steps else 0.0,
                )  # fmt: skip
            )
    return settings


def path_of(settings: Sequence[Setting]) -> list[int]:
    """One sequence through the grid, by boldness; of equals the deeper minimum layer and the larger size first."""
    return sorted(range(len(settings)), key=lambda i: settings[i].boldness)


def chains_of(settings: Sequence[Setting]) -> list[list[int]]:
    """One sequence per minimum layer and vocabulary size."""
    groups: dict[int, list[int]] = {}
    for index, setting in enumerate(settings):
        groups.setdefault(setting.chain, []).append(index)
    return list(groups.values())


def _check(base: ExitPolicy, grid: Grid) -> None:
    if not isinstance(base.confidence, str):
        raise ValueError(f"the confidence {base.confidence!r} has no name to save; calibrate a policy with a named one")
    if getattr(base, "adaptive", False):
        raise ValueError(
            "an adaptive threshold moves with the traffic, so its losses are not independent and nothing can be "
            "certified; freeze it first: replace(policy, threshold=…, adaptive=False)"
        )
    if grid.vocabulary_sizes and rule_of(base.vocabulary) is None:
        raise ValueError(
            "vocabulary sizes are given, but the policy does not prune after its first test (vocabulary "
            f"{base.vocabulary!r}); choose fixed, decaying or adaptive"
        )
    if base.confidence == "static" and (grid.thresholds or grid.per_layer or grid.vocabulary_sizes):
        raise ValueError("a static exit has no threshold and does not prune; give minimum layers only")


def _at(lm: LanguageModel, base: ExitPolicy, layer: int | None, size: int | None) -> ExitPolicy:
    """The policy from a minimum layer on, with a size."""
    changes: dict[str, object] = {} if size is None else {"vocabulary_size": size}
    if layer is not None and base.confidence == "static":
        changes["min_layer"] = layer
    elif layer is not None and base.exit_layers is not None:
        exits = tuple(exit for exit in base.exit_layers if exit >= layer)
        if not exits:
            raise ValueError(f"min_layer is {layer}, but the policy's last exit is after layer {base.exit_layers[-1]}")
        changes |= {"min_layer": layer, "exit_layers": exits}
    elif layer is not None:
        changes |= tested_from(lm, layer)
    if base.confidence != "static":
        changes["threshold"] = 1.0  # for now
    policy = replace(base, **changes)  # type: ignore[arg-type]
    resolve(policy, lm.num_layers, lm.vocabulary, lm.split.exit_layers)
    return policy


def _thresholds(
    policy: ExitPolicy, grid: Grid, layer_thresholds: LayerThresholds | None
) -> Sequence[float | tuple[float, ...] | None]:
    if policy.confidence == "static":
        return [None]
    if not grid.per_layer:
        return grid.knobs
    if layer_thresholds is None:
        raise ValueError("thresholds for each layer are made from a tuning part; give layer_thresholds")
    return layer_thresholds(policy, grid.knobs)


def _name(policy: ExitPolicy, knob: float | None, layer: int | None, size: int | None, grid: Grid) -> str:
    what = "" if knob is None else f", share {knob!r} per layer" if grid.per_layer else f" > {knob!r}"
    where = "" if layer is None else f", from {layer}"
    return f"{policy.confidence}{what}{where}{'' if size is None else f', {size} kept'}"

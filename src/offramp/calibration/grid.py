"""The settings that may be certified, and orders to go through them that no calibration prompt has a part in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from offramp.core.policy import ExitPolicy
from offramp.core.readout import require_fit
from offramp.core.vocabulary import rule_of
from offramp.evaluation.arms import short_prompt, tested_from

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel

THRESHOLDS = (
    0.999, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0,
)  # fmt: skip
"""From safe to bold; finer near 1, where the confidences of language models pile up. For every measure."""
SHARES = (1.0, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""From safe to bold: shares of the wrong early tokens that thresholds of their own for each layer keep in."""
GAINS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
"""From safe to bold: shares of tokens that may be wrong for each full token's FLOPs that leaving saves."""
NEVER, FULL_DEPTH = ExitPolicy(threshold=None), "full depth"
"""The full model: cost 1 and no loss, certified without a test, unless losses are those against another number format.
What is left where nothing else is, or pays."""
PLAIN = "plain"
"""The family of settings that test nothing: what a policy has to beat."""

LayerThresholds = Callable[[ExitPolicy, Sequence[float], str], Sequence[tuple[float, ...]]]
"""(policy, knobs, rule) -> for each knob one threshold per exit (see `offramp.calibration.layer_thresholds`)."""


@dataclass(frozen=True)
class Grid:
    """What is tried, all combinations of it, beside settings that test nothing.

    Attributes:
        thresholds: Of the confidence, in any order; None: `THRESHOLDS`. With `per_layer` shares, None: `SHARES`. Empty:
            none, so that only settings that test nothing are tried, such as full depth in another number format.
        min_layers: First layers tested; None: that of the policy.
        vocabulary_sizes: Tokens kept by a policy that prunes; None: those of the policy.
        per_layer: A threshold for each exit layer: a family with one parameter, the share of wrong tokens kept in.
        static_layers: Static exits tried beside the policy; None: `static_layers_of`.
        vocabularies: Kinds of pruning, None among them for all tokens; None: that of the policy.
        skipped: What happens to keys and values of skipped layers; None: that of the policy.
        gains: Prices of thresholds by gain, one for each exit layer, tried beside the `thresholds`; None: none.
        accepts: Under "verify", shares from which on a drafted token stands (`ExitPolicy.accept`), in any order: nested
            like thresholds, a smaller share is bolder; None: that of the policy.
        plain: Whether settings that test nothing are tried beside the policy at all.
        full_depth: Whether never exiting has to be tested, before all else, since losses are those against the full
            model in another number format.
    """

    thresholds: tuple[float, ...] | None = None
    min_layers: tuple[int, ...] | None = None
    vocabulary_sizes: tuple[int, ...] | None = None
    per_layer: bool = False
    static_layers: tuple[int, ...] | None = None
    vocabularies: tuple[str | None, ...] | None = None
    skipped: tuple[str, ...] | None = None
    gains: tuple[float, ...] | None = None
    accepts: tuple[float, ...] | None = None
    plain: bool = True
    full_depth: bool = False

    def __post_init__(self) -> None:
        for name in ("min_layers", "vocabulary_sizes", "vocabularies", "skipped", "gains", "accepts"):
            if getattr(self, name) == ():
                raise ValueError(f"{name} is empty; give at least one value, or None for the default")
        if self.per_layer and not all(0 <= share <= 1 for share in self.knobs):
            raise ValueError(f"thresholds are {self.knobs}; with per_layer they are shares in [0, 1]")
        if self.gains and min(self.gains) < 0:
            raise ValueError(f"gains are {self.gains}; they are prices from 0 on, such as 0.1")

    @property
    def knobs(self) -> tuple[float, ...]:
        """Thresholds or shares, from safe to bold."""
        default = SHARES if self.per_layer else THRESHOLDS
        return tuple(sorted(set(default if self.thresholds is None else self.thresholds), reverse=True))

    def families(self, base: ExitPolicy) -> dict[str, tuple[float, ...]]:
        """Values from safe to bold of what is varied within a combination, by what it is; of static exits, nothing."""
        if base.confidence == "static":
            return {"static": ()}
        gains = {"gain": tuple(sorted(set(self.gains)))} if self.gains else {}
        return ({"share" if self.per_layer else "threshold": self.knobs} if self.knobs else {}) | gains

    def places(self, base: ExitPolicy) -> list[Place]:
        """Combinations of all but thresholds, from safe to bold in each of them."""
        layers: list[int | None] = [*sorted(set(self.min_layers or ()), reverse=True)] or [None]
        kinds = sorted(dict.fromkeys(self.vocabularies or (None,)), key=lambda kind: kind is not None)
        skipped: list[str | None] = [*sorted(set(self.skipped or ()), key=SAFE_FIRST.index)] or [None]
        return [
            Place(layer, kind, size, strategy, spots)
            for (layer, a), (kind, b), (strategy, c) in product(_spots(layers), _spots(kinds), _spots(skipped))
            for size, d in _spots(self._sizes(kind or base.vocabulary if self.vocabularies is None else kind))
            for spots in [tuple(spot for spot in (a, b, c, d) if spot is not None)]
        ]

    def _sizes(self, kind: str | None) -> list[int | None]:
        sizes: list[int | None] = [*sorted(set(self.vocabulary_sizes or ()), reverse=True)] if rule_of(kind) else []
        return sizes or [None]

    def chains(self, base: ExitPolicy) -> int:
        """Combinations of all but thresholds, with a sequence of thresholds of each family."""
        if base.confidence == "static":
            return 1  # a sequence of layers
        return len(self.places(base)) * len(self.families(base))

    def sequences(self, base: ExitPolicy, order: str) -> int:
        """In how many sequences the settings are tested; all share the failure probability."""
        beside = bool(self.tests_nothing(base).keys() - {FULL_DEPTH})
        of_policies = {"path": len(self.families(base)), "chains": self.chains(base)}
        return max(1, of_policies[order] + beside) if order in of_policies else 1

    def size(self, base: ExitPolicy) -> int:
        """Number of settings."""
        each = sum(len(knobs) or 1 for knobs in self.families(base).values())
        accepts = (len(self.accepted(place.skipped or base.skipped)) for place in self.places(base))
        return len(self.tests_nothing(base)) + each * sum(accepts)

    def accepted(self, skipped: str) -> list[float | None]:
        """Shares from which on drafts stand, from safe to bold; nothing is to be accepted where nothing is checked."""
        return [*sorted(set(self.accepts or ()), reverse=True)] if skipped == "verify" and self.accepts else [None]

    def tests_nothing(self, base: ExitPolicy) -> dict[str, ExitPolicy]:
        """Settings that test nothing, by name, from safe to bold: full depth, then those beside the policy."""
        never = {FULL_DEPTH: NEVER} if self.full_depth else {}
        return never | (plain_policies(base, self.static_layers or ()) if self.plain else {})


SAFE_FIRST = ("verify", "defer", "propagate")
"""What happens to keys and values of skipped layers: lossless, exact, approximate."""


def _spots(values: Sequence[Any]) -> list[tuple[Any, float | None]]:
    """Values with their relative places from 0 to 1; of a single one it says nothing."""
    last = len(values) - 1
    return [(value, at / last if last else None) for at, value in enumerate(values)]


@dataclass(frozen=True)
class Place:
    """One combination of all that a grid varies but thresholds; None: as the policy has it.

    Attributes:
        layer: Minimum layer.
        kind: Of pruning.
        size: Tokens kept.
        skipped: Of keys and values of skipped layers.
        spots: Relative places along the dimensions that have several values.
    """

    layer: int | None
    kind: str | None
    size: int | None
    skipped: str | None
    spots: tuple[float, ...]


@dataclass(frozen=True)
class Setting:
    """One point of a grid.

    Attributes:
        name: In words, different from all others of the grid.
        policy: What it is.
        knob: Its threshold, its share or its price; None for settings that test nothing.
        chain: Which combination it belongs to, counted from the safest; behind them those that test nothing.
        boldness: Mean of its relative places along the grid's dimensions, from 0 (safest) to 1.
        family: What its knob is; settings of one family are in one sequence of the order "path".
    """

    name: str
    policy: ExitPolicy
    knob: float | None
    chain: int
    boldness: float
    family: str = "threshold"

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
        layer_thresholds: Makes thresholds for each layer, from other examples than those that certify.

    Returns:
        Settings, all of which fit the model.

    Raises:
        ValueError: A value that `ExitPolicy` or the model does not allow, sizes for a policy that does not prune, or a
            policy that cannot be calibrated.
    """
    _check(base, grid)
    plain = grid.tests_nothing(base)
    never = plain.pop(FULL_DEPTH, None)
    for policy in plain.values():
        require_fit(lm.split, policy)
    places = grid.places(base)
    policies = [_at(lm, base, grid, place) for place in places]
    families = list(grid.families(base).items())
    settings = [
        setting
        for chain, ((family, knobs), (place, policy)) in enumerate(
            product(families, zip(places, policies, strict=True))
        )
        for setting in _chain(policy, place, grid, chain, family, knobs, layer_thresholds)
    ]
    if never is not None:  # the safest of all: it heads the first sequence
        settings.insert(0, Setting(FULL_DEPTH, never, None, 0, 0.0, settings[0].family if settings else PLAIN))
    if not settings and not plain:
        raise ValueError(
            "nothing is tried: no threshold, static exit or shorter prompt, and full depth needs no certificate where "
            "it is its own reference; give thresholds, or the reference's number format"
        )
    last = 1 + max((setting.chain for setting in settings if setting.family != PLAIN), default=-1)
    beside = [(name, plain[name], spot or 0.0) for name, spot in _spots(list(plain))]
    return settings + [Setting(name, policy, None, last, spot, PLAIN) for name, policy, spot in beside]


def _chain(
    policy: ExitPolicy, place: Place, grid: Grid, chain: int, family: str, knobs: Sequence[float],
    layer_thresholds: LayerThresholds | None,
) -> Iterator[Setting]:  # fmt: skip
    """The settings of one combination, from safe to bold."""
    if not knobs:
        yield Setting(_name(policy, "", place, grid), policy, None, 0, _mean(place.spots), family)
        return
    values = knobs if family == "threshold" else _per_layer(policy, knobs, family, layer_thresholds)
    tested = [(spot, knob, threshold) for (knob, spot), threshold in zip(_spots(knobs), values, strict=True)]
    found = []
    for (spot, knob, threshold), (accept, also) in product(tested, _spots(grid.accepted(policy.skipped))):
        what = f" > {knob!r}" if family == "threshold" else f", {family} {knob!r} per layer"
        changes: dict[str, Any] = {"threshold": threshold} | ({} if accept is None else {"accept": accept})
        at = replace(policy, **changes)
        name = _name(policy, what, place, grid) + ("" if accept is None else f", accept {accept!r}")
        boldness = _mean([*place.spots, *(each for each in (spot, also) if each is not None)])
        found.append(Setting(name, at, knob, chain, boldness, family))
    yield from sorted(found, key=lambda setting: setting.boldness)  # stable


def _mean(spots: Sequence[float]) -> float:
    return sum(spots) / len(spots) if spots else 0.0


def paths_of(settings: Sequence[Setting]) -> list[list[int]]:
    """One sequence through each family, by boldness; of equals the first, which has the deeper minimum layer."""
    return _grouped(sorted(range(len(settings)), key=lambda i: settings[i].boldness), lambda i: settings[i].family)


def chains_of(settings: Sequence[Setting]) -> list[list[int]]:
    """One sequence per combination."""
    return _grouped(range(len(settings)), lambda i: settings[i].chain)


def _grouped(order: Sequence[int], key: Callable[[int], Any]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for index in sorted(order, key=lambda i: key(i) == PLAIN):  # what tests nothing comes last
        groups.setdefault(key(index), []).append(index)
    return list(groups.values())


def _check(base: ExitPolicy, grid: Grid) -> None:
    if not isinstance(base.confidence, str):
        raise ValueError(f"the confidence {base.confidence!r} has no name to save; calibrate a policy with a named one")
    if base.adaptive:
        raise ValueError(
            "an adaptive threshold moves with the traffic, so its losses are not independent and nothing can be "
            "certified; freeze it first: replace(policy, threshold=…, adaptive=False)"
        )
    kinds = (base.vocabulary,) if grid.vocabularies is None else grid.vocabularies
    if grid.vocabulary_sizes and not any(map(rule_of, kinds)):
        raise ValueError(
            "vocabulary sizes are given, but the policy does not prune after its first test (vocabulary "
            f"{', '.join(map(repr, kinds))}); choose fixed, decaying or adaptive"
        )
    if grid.accepts and "verify" not in (grid.skipped or (base.skipped,)):
        raise ValueError(
            f"accepts are {grid.accepts}, but nothing is verified; give skipped 'verify', or leave them out"
        )
    beside = grid.vocabulary_sizes, grid.vocabularies, grid.skipped, grid.accepts
    if not grid.families(base) and (grid.per_layer or grid.min_layers or any(beside)):
        raise ValueError(
            "no thresholds are tried, so that shares per layer and accepts are of nothing, as are minimum layers, "
            "vocabularies and what is skipped; leave them out"
        )
    varied = grid.thresholds, grid.gains, *beside
    if base.confidence == "static" and (any(varied) or grid.per_layer or grid.static_layers):
        raise ValueError("a static exit has no threshold and does not prune; give minimum layers only")


def _at(lm: LanguageModel, base: ExitPolicy, grid: Grid, place: Place) -> ExitPolicy:
    """The policy at a combination."""
    layer, changes = place.layer, dict[str, Any]()
    if place.size is not None:
        changes["vocabulary_size"] = place.size
    if grid.vocabularies is not None:
        changes["vocabulary"] = place.kind
        if rule_of(place.kind) is None:
            changes["vocabulary_size"] = None
    if place.skipped is not None:
        changes["skipped"] = place.skipped
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
    policy = replace(base, **changes)
    require_fit(lm.split, policy)
    return policy


def _per_layer(
    policy: ExitPolicy, knobs: Sequence[float], rule: str, layer_thresholds: LayerThresholds | None
) -> Sequence[tuple[float, ...]]:
    if layer_thresholds is None:
        raise ValueError("thresholds for each layer are made from a tuning part; give layer_thresholds")
    return layer_thresholds(policy, knobs, rule)


def _name(policy: ExitPolicy, what: str, place: Place, grid: Grid) -> str:
    parts = [
        "" if place.layer is None else f"from {place.layer}",
        "" if grid.vocabularies is None else place.kind or "all tokens",
        "" if place.size is None else f"{place.size} kept",
        place.skipped or "",
    ]
    return ", ".join([f"{policy.confidence}{what}", *filter(None, parts)])


# ---------------------------------------------------------------- settings that test nothing

# "Never exit" is not among them: it costs what the full model costs and loses nothing, so it needs no certificate.
STATIC = 4
"""Static exits tried unless others are named, at most."""


def static_layers_of(lm: LanguageModel) -> tuple[int, ...]:
    """Static exits worth trying: a few of the trained exits, the deepest among them; without any, none."""
    layers = lm.split.exit_layers
    step = -(-len(layers) // STATIC) or 1
    return tuple(sorted(layers[::-1][::step]))


def plain_policies(base: ExitPolicy, static_layers: Sequence[int]) -> dict[str, ExitPolicy]:
    """Settings that test nothing, with the prompt of a policy: from safe to bold.

    Args:
        base: The policy; if it drafts, tokens are drafted at the static exits, too.
        static_layers: Layers of the static exits.

    Returns:
        Policies by name: that of the prompt alone where it stops early, then static exits, the deepest first. A prompt
        stops where a static exit is, if that is shallower.
    """
    stop, policies = base.prompt_layer, dict[str, ExitPolicy]()
    if stop is not None and base.threshold is not None:
        policies[f"prompt to {stop}"] = short_prompt(stop)
    for layer in sorted(set(static_layers), reverse=True):
        inner = stop is not None and stop < layer
        policies[f"static {layer}" + (f", prompt to {stop}" if inner else "")] = ExitPolicy(
            "static", min_layer=layer, prompt_layer=stop if inner else None,
            skipped=base.skipped if base.skipped == "verify" else "propagate", draft_length=base.draft_length,
            draft=base.draft, accept=base.accept if base.skipped == "verify" else 1.0,
        )  # fmt: skip
    return policies

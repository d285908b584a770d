"""Does a certificate follow from what it keeps? The search is gone through again, on the losses that are in it.

Each test keeps its losses, one per independent draw in the order they were tested in, packed as "0*37 0.25 1*3". From
these, the promise and the grid, everything that the statement says follows: means, p-values, level, which settings
passed, which was the cheapest of them, and the policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.grid import NEVER, Grid
from offramp.calibration.room import Room
from offramp.calibration.spending import NO_LESS, PER_TOKEN
from offramp.core.policy import ExitPolicy
from offramp.risk import Test, search

if TYPE_CHECKING:
    from offramp.calibration.account import Account

Losses = NDArray[np.float64]
_CLOSE = 1e-6
"""Relative difference up to which numbers worked out again, maybe elsewhere, are the same."""
_MOST = 10**7
"""Draws that no certificate has more of."""
_VARIED = ("threshold", "min_layer", "exit_layers", "vocabulary_size", "vocabulary", "skipped", "accept")
"""Fields of a policy that a grid fills in."""


def packed(losses: Sequence[float] | Losses) -> str:
    """Losses in their order, exactly; runs of equal ones are counted."""
    runs = ((value, len(list(run))) for value, run in groupby(float(loss) for loss in losses))
    return " ".join(repr(value).removesuffix(".0") + (f"*{count}" if count > 1 else "") for value, count in runs)


def unpacked(text: str, most: int) -> Losses:
    """The inverse of `packed`, [N], for up to `most` losses; a ValueError if there are more or it is no such text."""
    pairs = [(float(value), int(count or 1)) for value, _, count in (run.partition("*") for run in text.split())]
    if any(count < 1 for _, count in pairs) or sum(count for _, count in pairs) > min(most, _MOST):
        raise ValueError(f"there are losses of more than {min(most, _MOST)} draws")
    return np.repeat([value for value, _ in pairs], [count for _, count in pairs]).astype(np.float64)


def changes(policy: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Fields in which a setting's policy differs from the base, as JSON values."""
    return {name: value for name, value in policy.items() if value != base.get(name)}


def require_evidence(certificate: Account) -> None:
    """Raise a ValueError if a certificate of the present version says anything that its losses do not."""
    c, p = certificate, certificate.promise
    _require("n", c.n, c.splits["certification"][0 if p.unit == "prompt" else 1])
    room = Room(**c.room or {})
    _require("p-value of the room", room.p_value, Room.tested(room.mean, c.n, p))
    if not c.tests:
        if room.suffices(p) and not (c.must_pay and c.order == "pareto"):  # of which none paid on the tuning part
            raise ValueError("nothing was tested, though there was something to lose")
        _require_outcome(c, [], None, p.failure)
        return
    if not room.suffices(p):
        raise ValueError("settings were tested, though there was nothing to lose")
    grid, base = _grid(c), ExitPolicy.from_dict(c.base)
    losses = [unpacked(test["losses"], c.n) for test in c.tests]
    for test, values in zip(c.tests, losses, strict=True):
        _require(f"number of losses of {test['name']}", len(values), c.n)
        _require_setting(c, test, grid, base)
    sequences = _sequences(c.tests, grid.sequences(base, c.order))
    below = NO_LESS if c.must_pay else math.inf
    outcome = search(sequences, losses.__getitem__, lambda at: float(c.tests[at]["cost"]), p, below=below)
    _require_outcome(c, outcome.tests, outcome.selected, outcome.level)
    _require_estimates(c, None if outcome.selected is None else losses[outcome.selected])


def _grid(c: Account) -> Grid:
    """What was tried; earlier versions tried nothing beside the policy."""
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in c.grid.items()}
    return Grid(**(given if c.minimise is not None else {"plain": False, **given}))


def _sequences(tests: Sequence[Mapping[str, Any]], count: int) -> list[list[int]]:
    """Places of the tests of each chain."""
    chains = [test["chain"] for test in tests]
    if chains != sorted(chains) or set(chains) != set(range(count)):
        raise ValueError(f"the tests are of other sequences than the {count} there were")
    return [[at for at, chain in enumerate(chains) if chain == each] for each in range(count)]


def _require_setting(c: Account, test: Mapping[str, Any], grid: Grid, base: ExitPolicy) -> None:
    """The setting is one of the grid, with the cost that was minimised."""
    if c.minimise in (PER_TOKEN, "flops"):
        _require(f"cost of {test['name']}", test["cost"], test["flops" if c.minimise == "flops" else "flops_per_token"])
    if (plain := grid.tests_nothing(base).get(test["name"])) is not None:
        _require(f"policy of {test['name']}", ExitPolicy.from_dict({**c.base, **test["changes"]}), plain)
        return
    if strange := sorted(set(test["changes"]) - set(_VARIED)):
        raise ValueError(f"the setting {test['name']} changes {strange[0]} of the base, which the grid leaves alone")
    for name, allowed in (
        ("vocabulary", grid.vocabularies), ("skipped", grid.skipped), ("accept", grid.accepts),
    ):  # fmt: skip
        if name in test["changes"] and test["changes"][name] not in (allowed or ()):
            raise ValueError(f"the setting {test['name']} changes {name} of the base, which the grid leaves alone")
    threshold = {**c.base, **test["changes"]}["threshold"]
    families = {family: knobs for family, knobs in grid.families(base).items() if knobs}
    if test["knob"] is None:
        return
    if not any(test["knob"] in knobs for knobs in families.values()):
        raise ValueError(f"the setting {test['name']} is none of the grid")
    by_layer = isinstance(threshold, list) and families.keys() - {"threshold"}
    if not by_layer and threshold != test["knob"]:
        raise ValueError(f"the threshold of {test['name']} is {threshold}, not {test['knob']}")


def _require_outcome(c: Account, tests: Sequence[Test], selected: int | None, level: float) -> None:
    """The tests, the choice among them, and the policy."""
    _require("number of tests", len(c.tests), len(tests))
    for have, test in zip(c.tests, tests, strict=True):
        _require(f"mean loss of {have['name']}", have["loss"], test.loss)
        _require(f"p-value of {have['name']}", have["p_value"], test.p_value)
        _require(f"verdict on {have['name']}", have["passed"], test.passed)
    _require("level", c.level, level)
    _require("chosen setting", c.selected, selected)
    _require("verdict", c.certified, selected is not None)
    policy = NEVER if selected is None else ExitPolicy.from_dict({**c.base, **c.tests[selected]["changes"]})
    _require("policy", ExitPolicy.from_dict(c.policy), policy)
    if c.certified and c.needed is not None:
        raise ValueError("something was certified, but more draws are said to be needed")


def _require_estimates(c: Account, chosen: Losses | None) -> None:
    """Mean losses, and the upper limit by the held-out part."""
    for part, seen in c.estimates.items():
        examples, groups = c.splits[part]
        _require(f"number of {part} prompts", seen["examples"], examples)
        losses = unpacked(seen["losses"], examples if c.promise.unit == "prompt" else groups)
        if part == "certification" and chosen is not None:
            _require("losses of the chosen setting", packed(losses), packed(chosen))
        _require(f"mean loss on the {part} part", seen["loss"]["value"], float(losses.mean()))
        if "upper" in seen:
            _require(f"upper limit by the {part} part", seen["upper"], c.promise.upper_limit(losses))


def _require(what: str, have: Any, follows: Any) -> None:
    numbers = [value for value in (have, follows) if isinstance(value, float | int) and not isinstance(value, bool)]
    same = math.isclose(*numbers, rel_tol=_CLOSE, abs_tol=1e-12) if len(numbers) > 1 else have == follows
    if not same or isinstance(have, bool) != isinstance(follows, bool):
        raise ValueError(f"the {what} is {have!r:.80}, but {follows!r:.80} follows from its losses")

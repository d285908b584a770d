"""What a calibration found, as its certificate keeps it, and whether the certificate follows from that.

The search is gone through again, on the losses that are in it. Each test keeps its losses, one per independent draw in
the order they were tested in, packed as "0*37 0.25 1*3". From these, the promise and the grid, everything that the
statement says follows: means, p-values, level, which settings passed, which was the cheapest of them, and the policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.grid import NEVER, Grid
from offramp.calibration.promise import NO_LESS, PER_TOKEN, Promise, Room
from offramp.core.policy import ExitPolicy
from offramp.risk import Test, search

_RATIOS = {
    "flops-per-token": "flops_per_token_ratio", "flops": "flops_ratio",
    "seconds-per-token": "seconds_per_token_ratio", "seconds": "seconds_ratio",
}  # fmt: skip
"""Of `estimates`, by what is minimised."""
Losses = NDArray[np.float64]
_CLOSE = 1e-6
"""Relative difference up to which numbers worked out again, maybe elsewhere, are the same."""
_MOST = 10**7
"""Draws that no certificate has more of."""
_VARIED = ("threshold", "min_layer", "exit_layers", "vocabulary_size", "vocabulary", "skipped", "accept")
"""Fields of a policy that a grid fills in."""


@dataclass(frozen=True)
class Account:
    """What is known about a policy.

    Attributes:
        certified: Whether anything is promised of a policy that leaves early; if not, the policy never does, which is
            the full model and loses nothing: nothing else passed, or nothing that passed costs less.
        promise: Tolerance, failure, kind of loss, metric, margin, bound and unit.
        policy: The certified policy, as JSON values.
        order: "path", "chains" or "pareto": how the grid was gone through.
        n: Independent draws that certified: prompts, or groups of them.
        splits: Examples and groups by part, as [examples, groups].
        seed: Of the splits and of the order of draws.
        base: The policy whose open values the grid filled in.
        grid: What was tried.
        tests: The settings that were looked at, in their order: name, value on the grid (`knob`), what their policies
            change of the base, mean loss, p-value, passed, costs over the full model's (`cost` is what was minimised,
            `flops` and `flops_per_token` are those of the certification part; earlier versions have all FLOPs of those
            that passed as `cost`), and the losses, packed (`offramp.calibration.evidence`).
        selected: Which of them was chosen; None: none.
        level: At which each sequence was tested.
        needed: If nothing is certified, about how many draws would certify one of the settings that were looked at, if
            losses stay as they are: their mean, or for the bound "wsr" all of them, repeated and shuffled
            (`Promise.needed_like`). None: no number would, or none within reason.
        conditions: Model, its weights' and exits' fingerprints, dtype, task, chat template, decoding settings, batch
            size: what the promise holds for.
        data: Name and SHA-256 of the examples.
        estimates: By part, mean loss and costs with 95 % bootstrap intervals, and the histogram of exit layers. On the
            part "test", which nothing was chosen by, also an upper limit of the mean loss by the promise's bound.
        versions: Of offramp, torch and transformers.
        room: What there was to lose (`offramp.calibration.promise.Room`), as JSON values; None in earlier versions.
        reference: What losses and costs are relative to.
        exits: Where the tokens of each answer left (`offramp.calibration.drift.packed`), for `drift`: of the held-out
            part, or without one of the certification part. None: nothing was certified, prompts of one group may be
            alike, or the certificate is of an earlier version.
        minimise: Which cost the chosen setting has the smallest of (`offramp.calibration.promise.MEASURES`). None: an
            earlier version, that of all FLOPs.
        must_pay: Whether a policy that does not cost less than the full model was left out.
    """

    certified: bool
    promise: Promise
    policy: dict[str, Any]
    order: str
    n: int
    splits: dict[str, list[int]]
    seed: int
    base: dict[str, Any]
    grid: dict[str, Any]
    tests: list[dict[str, Any]]
    selected: int | None
    level: float
    needed: int | None
    conditions: dict[str, Any]
    data: dict[str, Any]
    estimates: dict[str, Any]
    versions: dict[str, str]
    room: dict[str, Any] | None = None
    reference: str = "the full model"
    exits: list[str] | None = None
    minimise: str | None = None
    must_pay: bool = False

    @property
    def keeps_losses(self) -> bool:
        """Whether the statement follows from what is kept; it does not in the first version."""
        return self.room is not None and all("losses" in test for test in self.tests)

    @property
    def other_format(self) -> bool:
        """Whether losses and costs are relative to the full model in another number format."""
        return bool(self.grid.get("full_depth"))

    @property
    def pays_nothing(self) -> bool:
        """Whether the policy never exits because nothing that may be used costs less than the full model."""
        if self.certified or not self.must_pay or self.room is None or not Room(**self.room).suffices(self.promise):
            return False
        return not self.tests or any(test["passed"] for test in self.tests)

    @property
    def paid(self) -> dict[str, Any] | None:
        """The cost that was minimised, over the full model's, with its 95 % interval, on the held-out part if any.

        None: an earlier version, or seconds that do not compare there (a part that was not answered in turns).
        """
        seen: dict[str, Any] = self.estimates.get("test", self.estimates["certification"])
        return seen.get(_RATIOS[self.minimise or "flops"])

    @property
    def saves(self) -> bool:
        """Whether the policy was certified and cost less than the full model, on the held-out part if any.

        By the cost that was minimised; seconds that do not compare there are those of the tuning part, by which the
        policy was chosen. What was found of some prompts, no promise: see `saving_is_sure`.
        """
        cost = self.paid
        if cost is not None or self.selected is None:
            return self.certified and cost is not None and bool(cost["value"] < 1)
        return self.certified and bool(self.tests[self.selected]["cost"] < 1)

    @property
    def saving_is_sure(self) -> bool:
        """Whether it `saves`, and the whole interval of its cost is below the full model's."""
        return self.saves and self.paid is not None and self.paid["high"] is not None and bool(self.paid["high"] < 1)


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

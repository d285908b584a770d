"""Which examples choose, which certify, and which judge; and whether there are enough of them to promise anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from offramp.calibration.promise import Promise
from offramp.tasks import split_groups

if TYPE_CHECKING:
    from offramp.tasks import Example

TUNING, CERTIFICATION, TEST = "tuning", "certification", "test"


def divide(examples: Sequence[Example], *, tuning: float, test: float, seed: int) -> dict[str, list[Example]]:
    """Part examples at random by whole groups: shares that choose and are held out, maybe 0; the rest certifies."""
    if min(tuning, test) < 0 or tuning + test >= 1 - 1e-9:
        raise ValueError(f"the tuning share is {tuning} and the test share {test}; they must leave some to certify")
    if len({example.id for example in examples}) < len(examples):
        raise ValueError("two examples have the same id; give each one of its own")
    shares = {TUNING: tuning, CERTIFICATION: 1 - tuning - test, TEST: test}
    given = {name: share for name, share in shares.items() if share}
    parts = dict(zip(given, split_groups(examples, list(given.values()), seed), strict=True))
    return {name: parts.get(name, []) for name in shares}


def sizes(parts: Mapping[str, Sequence[Example]]) -> dict[str, list[int]]:
    """[examples, groups] of each part, by its name; a ValueError if a group is in two parts."""
    groups = {name: {example.group for example in part} for name, part in parts.items()}
    if len(set().union(*groups.values())) < sum(map(len, groups.values())):
        raise ValueError("a group is in two parts; divide examples by group")
    return {name: [len(part), len(groups[name])] for name, part in parts.items()}


def require_enough(promise: Promise, parts: Mapping[str, Sequence[Example]], level: float) -> None:
    """Raise a ValueError, which says how many would do, if the certification part is too small with no loss at all."""
    have = {name: examples if promise.unit == "prompt" else groups for name, (examples, groups) in sizes(parts).items()}
    needed, n, total = promise.needed(level), have[CERTIFICATION], sum(have.values())
    if needed is None or n >= needed:
        return
    wanted = f"tolerance {promise.tolerance:g}" + (f" at level {level:.3g}" if promise.bound != "crc" else "")
    raise ValueError(
        f"{n} {promise.unit}s are too few to certify {wanted}: bound {promise.bound} needs at least {needed} even if "
        f"none loses anything; give about {math.ceil(total * needed / n)} in all (there are {total}: "
        f"{', '.join(f'{count} {name}' for name, count in have.items())}), or smaller shares to tuning and test, or "
        "ask for a larger tolerance or failure probability"
    )

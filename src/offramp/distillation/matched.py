"""Comparisons with plain distillation that are confounded: T or λ differ too, as between published KD and DEDIER.

DEDIER's reference code has T = 3 and λ = 1, published KD T = 4 and λ = 0.9. A difference between them is that of the
weights and of T and λ together; plain distillation with the same T and λ tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from offramp.distillation.results import Result

MATTERS = ("temperature", "fraction")
"""T and λ, by their names in a method."""


def confounded(methods: Mapping[str, Sequence[Result]], reference: str) -> dict[str, str]:
    """Methods that differ from plain distillation in T or λ and in something else.

    Those that differ in nothing else are about T and λ, and those with another loss have neither.

    Returns:
        By name of the method: what plain distillation with its T and λ is called, here or on the command line.
    """
    if reference not in methods:
        return {}
    plain = dict(methods[reference][0]["method"])
    found = {}
    for name, own in methods.items():
        made = own[0]["method"]
        if made["loss"] == plain["loss"] and _of(made) != _of(plain) and made != {**plain, **_of(made)}:
            found[name] = _matched(methods, {**plain, **_of(made)}, reference)
    return found


def note(methods: Mapping[str, Sequence[Result]], reference: str) -> tuple[str, ...]:
    """What to say of confounded comparisons, one sentence for each T and λ; nothing where there are none."""
    said = []
    by_match: dict[str, list[str]] = {}
    for name, match in confounded(methods, reference).items():
        by_match.setdefault(match, []).append(name)
    for match, names in by_match.items():
        ours, theirs = (_words(methods[name][0]["method"]) for name in (names[0], reference))
        where = "which is compared below" if match in methods else f"add --method {match} to the same command"
        said.append(
            f"Confounded: {', '.join(names)} {'has' if len(names) == 1 else 'have'} {ours}, {reference} has {theirs}; "
            f"a difference may be theirs. Plain distillation with the same T and λ is {match}: {where}."
        )
    return tuple(said)


def _of(method: Mapping[str, Any]) -> dict[str, Any]:
    return {name: method[name] for name in MATTERS}


def _matched(methods: Mapping[str, Sequence[Result]], plain: Mapping[str, Any], reference: str) -> str:
    for name, own in methods.items():
        if own[0]["method"] == plain:
            return name
    return f"{reference}+temperature={plain['temperature']:g}+fraction={plain['fraction']:g}"


def _words(method: Mapping[str, Any]) -> str:
    return f"T = {method['temperature']:g}, λ = {method['fraction']:g}"

"""Values that come from users and from files: each is what it should be, as a plain Python object, or is refused."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Collection, Iterable, Mapping

_LARGEST = 2**31 - 1  # of a count of layers or tokens: above it something is broken, and products leave 64 bits


class ArgumentError(ValueError):
    """Arguments that do not go together. Their names stand in backticks, for the command line to call them options."""


def idle(given: Mapping[str, tuple[object, object]], why: str) -> None:
    """Raise an `ArgumentError` for arguments, as (value, default) by name, that were given and would have no effect."""
    if names := [f"`{name}`" for name, (value, default) in given.items() if value != default]:
        raise ArgumentError(f"{', '.join(names)}: only {why}, or leave {'them' if len(names) > 1 else 'it'} out")


def choice(name: str, value: object, allowed: Collection[str | None]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`; a misspelt one is told the nearest."""
    if (value is None or isinstance(value, str)) and value in allowed:
        return
    near = nearest(value, filter(None, allowed))
    raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}{near}")


def nearest(word: object, known: Iterable[str]) -> str:
    """A question that ends a message, "; did you mean 'softmax'?", if a known word is near; else nothing."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.7) if isinstance(word, str) else []
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""


def listed(value: object, allowed: Iterable[object]) -> str:
    """What is allowed, with commas, and a question if a misspelt value is near to one of it."""
    words = [str(option) for option in allowed]
    return ", ".join(words) + nearest(value, words)


def check_level(name: str, value: float) -> None:
    """Raise a ValueError unless the value is a probability strictly between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}; allowed are values strictly between 0 and 1, e.g. 0.05")


def flag(name: str, value: object) -> bool:
    """True or False, and nothing that only passes for it."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; allowed are True and False")
    return value


def whole(name: str, value: object, least: int, most: int = _LARGEST, *, why: str = "") -> int:
    """A whole number in least..most, also one of numpy's.

    Args:
        name: What it is, for messages.
        value: The value.
        least: The smallest allowed.
        most: The largest allowed.
        why: What to say of smaller ones; "": the range.

    Returns:
        The number as a Python int.

    Raises:
        ValueError: It is no whole number, or outside.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    found = int(value)
    if not least <= found <= most:
        reason = why if why and found < least else f"allowed are {least}..{most}"
        raise ValueError(f"{name} is {found}; {reason}")
    return found


def number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, *, above: bool = False, why: str = ""
) -> float:
    """A finite number in [low, high], also one of numpy's.

    Args:
        name: What it is, for messages.
        value: The value.
        low: The smallest allowed.
        high: The largest allowed.
        above: Whether `low` itself is not allowed.
        why: What to say of numbers outside; "": the range.

    Returns:
        The number as a Python int or float.

    Raises:
        ValueError: It is no number, not finite, or outside.
    """
    found = plain(value)
    if found is None:
        raise ValueError(f"{name} is {value!r}; it must be a number")
    if not (math.isfinite(found) and low <= found <= high) or (above and found == low):
        interval = f"{'(' if above else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name} is {found}; {why or f'allowed are finite numbers in {interval}'}")
    return found


def plain(value: object) -> float | None:
    """A real number as a Python int or float, infinities and NaN included; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value)

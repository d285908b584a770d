"""SHA-256 of what is kept in files, so that damage and careless edits are seen when it is read.

A digest is no signature: whoever edits a file on purpose can work its digest out again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

CHUNK = 4096
"""Rows of a tensor that are hashed together."""


def of(values: Any, tensors: Iterable[Tensor] = ()) -> str:
    """Of JSON values and tensors, in this order.

    Args:
        values: JSON values.
        tensors: Of any shape and type but bfloat16; types and shapes count.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        rows = tensor.detach() if tensor.ndim else tensor.detach()[None]
        for start in range(0, len(rows), CHUNK):
            digest.update(rows[start : start + CHUNK].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def of_file(path: Path) -> str:
    """Of the bytes of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own digest behind it, under "digest"."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(values)))  # as it comes back: without tuples and other keys
    return {**plain, "digest": of(plain)}


def unsealed(values: Mapping[str, Any], place: object, advice: str) -> dict[str, Any]:
    """What `sealed` was given.

    Returns:
        The object without its digest. One of an earlier version, which has none, is taken with a warning.

    Raises:
        ValueError: The digest is another; the message says that of `place`, and the advice.
    """
    plain = {name: value for name, value in values.items() if name != "digest"}
    if "digest" not in values:
        warn_of_none(place)
    elif values["digest"] != of(plain):
        raise ValueError(
            f"{place} is not what was written: it was changed or is damaged (its digest differs); {advice}"
        )
    return plain


def warn_of_none(place: object) -> None:
    """Say that nothing is known of a file's integrity."""
    warnings.warn(
        f"{place} has no digest, as earlier versions wrote none: damage to it would not be noticed", stacklevel=3
    )

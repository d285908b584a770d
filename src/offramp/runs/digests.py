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

import torch
from torch import Tensor, nn

CHUNK = 4096
"""Rows of a tensor that are hashed together."""
ELEMENTS = 1 << 22
"""Weights that are hashed together."""


def of(values: Any, tensors: Iterable[Tensor] = ()) -> str:
    """64 hexadecimal digits of JSON values and tensors, in this order; types (but bfloat16) and shapes count."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        rows = tensor.detach() if tensor.ndim else tensor.detach()[None]
        for start in range(0, len(rows), CHUNK):
            digest.update(rows[start : start + CHUNK].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a model's weights, rounded to bfloat16.

    Rounding makes it the same for weights loaded in float32 and in bfloat16; a change below that precision is not seen.
    Every value counts: 135 million take about 0.4 s on one core. Weights shared by two names count once.

    Returns:
        64 hexadecimal digits.
    """
    digest, seen = hashlib.sha256(), set()
    for name, tensor in sorted(model.state_dict().items()):
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        for piece in tensor.detach().reshape(-1).split(ELEMENTS):
            rounded = piece.to(torch.bfloat16) if piece.is_floating_point() else piece
            digest.update(rounded.cpu().contiguous().view(torch.uint8).numpy())
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
    """What `sealed` was given; a ValueError if its digest is another, a warning if there is none (earlier versions)."""
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

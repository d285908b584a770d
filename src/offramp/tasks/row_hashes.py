"""Rows known again in other files, runs and divisions, by what they hold or are called."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from offramp.tasks.labelled import Labelled
from offramp.tasks.labelled_inputs import Inputs


def input_hashes(inputs: Inputs) -> Tensor | None:
    """What rows hold: texts letter by letter, images in memory value by value.

    Args:
        inputs: Of N rows.

    Returns:
        The first 64 bits of their SHA-256, [N], int64; None for images in files, which are not read for this.
    """
    if isinstance(inputs, tuple):
        return hashes(repr(text).encode() for text in inputs)
    if isinstance(inputs, np.ndarray):
        return hashes(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes() for image in inputs)
    return None


def row_hashes(rows: Labelled, name: str) -> Tensor:
    """Texts by what they hold; images by their ids, since one thing may be rendered anew for every division.

    Args:
        rows: N of them.
        name: Of their set, within which an id means one thing.

    Returns:
        The first 64 bits of their SHA-256, [N], int64.
    """
    if isinstance(rows.inputs, tuple) and (held := input_hashes(rows.inputs)) is not None:
        return held
    return hashes(f"{name} {id}".encode() for id in rows.ids)


def hashes(values: Iterable[bytes]) -> Tensor:
    """The first 64 bits of the SHA-256 of each, [N], int64."""
    found = b"".join(hashlib.sha256(value).digest()[:8] for value in values)
    return torch.from_numpy(np.frombuffer(found, "<i8").astype(np.int64))

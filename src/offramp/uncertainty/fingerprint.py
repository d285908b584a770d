"""SHA-256 of what a fit has read, to see later that a chain of fits belongs together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from offramp.uncertainty.outputs import ExitOutputs

CHUNK = 4096
"""Rows that are hashed together."""


def of(values: Any, tensors: Iterable[Tensor]) -> str:
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


def of_outputs(outputs: ExitOutputs) -> str:
    """Of all that exits say about a split."""
    groups = () if outputs.groups is None else (outputs.groups,)
    tensors = (*outputs.features, *outputs.logits, outputs.labels, outputs.costs, *groups)
    return of(list(outputs.ids), tensors)

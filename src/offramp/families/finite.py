"""Nothing that a model says is judged where it computes NaN or infinity: one error, with the place and a remedy.

Of NaN scores every token is "the best", at every exit the same, so a broken model agrees with itself and loses nothing.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from offramp.families.split_model import SplitModel


class NotFiniteError(ValueError):
    """A model computed NaN or infinity; the message says which, where, and what to do."""


def not_finite(model: str, where: str, dtype: torch.dtype) -> NotFiniteError:
    """The error for a model, by name, with the place of the first such value and the format it computes in."""
    if dtype == torch.float16:
        remedy = "numbers above 65,504 overflow in float16: load it in float32 or bfloat16 (dtype=, --dtype)"
    else:
        remedy = "its weights are damaged or its training diverged: load other weights, or train it again"
    return NotFiniteError(f"{model} computes NaN or infinity {where}, so nothing it says can be judged; {remedy}")


def require_finite(values: Tensor, model: str, where: str, dtype: torch.dtype | None = None) -> None:
    """Refuse what a model computed unless all is finite; scores masked on purpose do not belong here."""
    if not bool(values.isfinite().all()):
        raise not_finite(model, where, dtype or values.dtype)


def name_of(split: SplitModel) -> str:
    """What an error calls a language model."""
    return str(getattr(split.model, "name_or_path", "")) or type(split.model).__name__


@torch.no_grad()
def broken_at(
    split: SplitModel,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
) -> NotFiniteError | None:
    """The error, with first layer and token, if a whole pass computes such values; see `SplitModel.start`."""
    depth, real = split.num_layers, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    error = partial(not_finite, name_of(split), dtype=split.model.dtype)
    if memory is not None and not bool(memory.isfinite().all()):
        return error("in its encoder's output")
    state = split.start(ids, mask, positions=positions, memory=memory, memory_mask=memory_mask)
    for layer in range(depth + 1):
        state = state if not layer else split.run(state, layer - 1, layer)
        wrong = ~state.hidden.isfinite().all(-1) & real  # [B, T]
        if bool(wrong.any()):
            row = int(wrong.any(-1).nonzero()[0])
            token = int(real[row, : int(wrong[row].nonzero()[0]) + 1].sum())
            place = f"after layer {layer} of {depth}" if layer else "in its embeddings"
            return error(f"{place}, first at token {token} of sequence {row + 1}")
    logits = split.readout(state.hidden[:, -1])
    return None if bool((logits < torch.inf).all()) else error("in its readout (final norm and head)")

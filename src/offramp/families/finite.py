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
    """The error.

    Args:
        model: What the model is called.
        where: Place of the first such value, such as "after layer 3 of 12".
        dtype: Number format that the model computes in.

    Returns:
        What is to be raised.
    """
    if dtype == torch.float16:
        remedy = "numbers above 65,504 overflow in float16: load it in float32 or bfloat16 (dtype=, --dtype)"
    else:
        remedy = "its weights are damaged or its training diverged: load other weights, or train it again"
    return NotFiniteError(f"{model} computes NaN or infinity {where}, so nothing it says can be judged; {remedy}")


def require_finite(values: Tensor, model: str, where: str, dtype: torch.dtype | None = None) -> None:
    """Refuse values that a model computed.

    Args:
        values: Any shape; scores that were masked on purpose do not belong here.
        model: What the model is called.
        where: What the values are.
        dtype: Number format that the model computes in; None: that of the values.

    Raises:
        not_finite: One is NaN or infinite.
    """
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
    """The error for a language model that may have computed such values: its whole pass is gone through again.

    Args:
        split: The model.
        ids: Tokens behind which it was found, [B, T].
        mask: 1 for tokens, 0 for padding, [B, T]; None without padding.
        positions: Positions of the tokens, [B, T]; None: counted from the mask.
        memory: Encoder output, [B, X, D].
        memory_mask: Mask of the encoder's input, [B, X].

    Returns:
        What is to be raised, with the first layer, and the first token there; None: all it computes are numbers.
    """
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

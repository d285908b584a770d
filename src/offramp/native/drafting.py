"""Drafts of one row, one after another, in a single call of the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.core.policy import DRAFTER
from offramp.families.state import Context, Frame
from offramp.native import library as lib
from offramp.native.library import address
from offramp.native.places import places_of

CONFIDENCES = {"static": 0, "max": 1, "softmax": 2}
"""Those that the kernels know."""


class Drafted(NamedTuple):
    """What came of it.

    Attributes:
        tokens: All that were made; the last one may not have been sure enough.
        confidences: Of each.
        normalisers: Of each; NaN or infinite for a token that was chosen by no number.
        left: How many were sure enough.
        before: What the readout of the last one of these read, [1, D].
    """

    tokens: list[int]
    confidences: list[float]
    normalisers: list[float]
    left: int
    before: Tensor


def draft(
    model: Any,
    context: Context,
    row: int,
    known: Sequence[int],
    slot: int,
    before: Tensor,
    *,
    most: int,
    confidence: str,
    threshold: float,
    rows: Any = None,
    ends: Sequence[int] = (),
) -> Drafted | None:
    """Draft behind a row's last token.

    Args:
        model: An `offramp.native.model.NativeModel` with a drafter.
        context: Of the batch.
        row: Which row.
        known: The row's last n tokens, which the drafter goes over.
        slot: Of the first of them.
        before: Readout inputs one position before each of them, [n, D]; it is written to.
        most: Drafts.
        confidence: One of `CONFIDENCES`.
        threshold: Drafts go on while it is above this.
        rows: The frequent tokens, as `gather` gives them; None: all.
        ends: Tokens behind which nothing is drafted.

    Returns:
        The drafts. None where they have to be made one by one: embeddings are more than rows of a table, or the row
        begins with padding.
    """
    table = model.embeddings
    if table is None or context.padding is not None or confidence not in CONFIDENCES:
        return None
    count, width = before.shape
    context.reach(slot + count + most)
    places = places_of(Frame(slice(row, row + 1), slot, count + most), context)
    own, before = model.branches[DRAFTER], before.contiguous()
    states, both, inputs = torch.empty(count, width), torch.empty(count, 2 * width), torch.empty(1, width)
    numbers, values = torch.empty(most + 2, dtype=torch.long), torch.empty(2, most + 2)
    test = model.readout_of(states[-1:], model.final, DRAFTER, None if rows is None else rows.ids)
    test.inputs, test.best, test.tokens = address(inputs), address(values[0, most:]), address(numbers[most:])
    normaliser = torch.empty(1)
    test.normaliser = address(normaliser)
    tokens, stops = (torch.tensor(list(some), dtype=torch.long) for some in (known, ends))
    call = lib.Drafting(
        model.mix_of(both, states), model.call_of(context, states, places, own.start, own.stop, layer=own.start), test,
        address(table), lib.F32 if table.dtype == torch.float32 else lib.BF16, count, address(tokens),
        address(before), address(both), most, CONFIDENCES[confidence], threshold, address(stops), len(stops),
        address(numbers), address(values[0]), address(values[1]), 0, 0,
    )  # fmt: skip
    model.library.offramp_draft(model.programs, ctypes.byref(call))
    made, left = int(call.made), int(call.left)
    return Drafted(numbers[:made].tolist(), values[0, :made].tolist(), values[1, :made].tolist(), left, before[:1])


def plain_embeddings(model: Any) -> Tensor | None:
    """The table whose rows enter the first block as they are; None: they do not (scaled, or with positions added)."""
    embeddings = model.decoder.get_input_embeddings()
    table: Tensor | None = getattr(embeddings, "weight", None)
    if table is None or table.dtype not in (torch.float32, torch.bfloat16) or not table.is_contiguous():
        return None
    ids = torch.arange(min(8, len(table)))[None]
    for first in (0, 5):
        with torch.no_grad():
            entered = model.family.embed(model.decoder, ids, torch.arange(first, first + ids.shape[1])[None])
        if not torch.equal(entered[0], table[ids[0]]):
            return None
    return table

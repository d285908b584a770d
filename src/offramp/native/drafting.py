"""Drafts of one row and their check by the full model, in turns, in a single call of the kernels."""

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


class Cycle(NamedTuple):
    """What came of drafts and their check.

    Attributes:
        known: Tokens that the drafter went over for the first draft.
        made: Drafts; the last one may not have been sure enough.
        rows: Tokens that the full model went over; 0 if a draft was chosen by no number.
        stand: How many drafts stand.
        sound: Whether all that was drafted or stands was chosen by numbers.
        tokens: The drafts that stand and, unless one of them ends the row, the full model's own choice behind them.
        confidences: Of each draft.
        logprobs: Of each token, by the full model.
    """

    known: int
    made: int
    rows: int
    stand: int
    sound: bool
    tokens: list[int]
    confidences: list[float]
    logprobs: list[float]


class Checked(NamedTuple):
    """What came of a call.

    Attributes:
        cycles: At least one; nothing comes behind one that is not sound, or whose last token ends the row.
        before: What the full model's readout read one position before each of the last one's tokens, [n, D].
        seconds: Of blocks and all that drafts take, and of the full model's readouts.
    """

    cycles: list[Cycle]
    before: Tensor
    seconds: list[float]


def cycles(
    model: Any,
    context: Context,
    row: int,
    known: Sequence[int],
    slot: int,
    before: Tensor,
    *,
    most: int,
    room: int,
    count: int,
    confidence: str,
    threshold: float,
    accept: float,
    rows: Any = None,
    ends: Sequence[int] = (),
) -> Checked | None:
    """Draft behind a row's last token and check that, so many times over.

    Args:
        model: An `offramp.native.model.NativeModel` with a drafter.
        context: Of the batch.
        row: Which row.
        known: The row's last n tokens, which the drafter goes over.
        slot: Of the first of them.
        before: Readout inputs one position before each of them, [n, D].
        most: Drafts in a row.
        room: Tokens that may still come, 1 or more.
        count: Cycles, at most.
        confidence: One of `CONFIDENCES`.
        threshold: Drafts go on while it is above this.
        accept: As `ExitPolicy.accept`.
        rows: The frequent tokens, as `gather` gives them; None: all.
        ends: Tokens behind which nothing comes.

    Returns:
        The cycles. None where tokens have to be drafted one by one: embeddings are more than rows of a table, or the
        row begins with padding.
    """
    table = model.embeddings
    if table is None or context.padding is not None or confidence not in CONFIDENCES:
        return None
    n, width = before.shape
    reach, wide = n + min(count * (most + 1), room), max(n, most + 1)
    context.reach(slot + reach)
    places = places_of(Frame(slice(row, row + 1), slot, reach), context)
    own = model.branches[DRAFTER]
    states, deep, both, read = (torch.empty(wide, size) for size in (width, width, 2 * width, width))
    read[:n] = before
    inputs, values, normalisers = torch.empty(1, width), torch.empty(most + 2, 2), torch.empty(most + 2)
    best = torch.empty(most + 2, 2, dtype=torch.long)  # of the check, and behind it of a draft
    test = model.readout_of(states[:1], model.final, DRAFTER, None if rows is None else rows.ids)
    test.inputs = address(inputs)
    check = model.readout_of(deep, model.final, None)
    check.inputs = address(read)
    for readout, at in ((check, 0), (test, most + 1)):
        readout.best, readout.tokens, readout.normaliser = map(address, (values[at:], best[at:], normalisers[at:]))
    tokens = torch.tensor([*known, *[0] * (reach - n)])
    stops = torch.tensor(list(ends), dtype=torch.long)
    confidences, logprobs = torch.empty(count, most), torch.empty(count, most + 1)
    notes, seconds = torch.empty(count, 6, dtype=torch.long), torch.zeros(2, dtype=torch.float64)
    call = lib.Cycles(
        model.mix_of(both, states), model.call_of(context, states, places, own.start, own.stop, layer=own.start), test,
        model.call_of(context, deep, places, 0, model.num_layers, layer=0), check, address(table),
        lib.F32 if table.dtype == torch.float32 else lib.BF16, n, address(tokens), address(read), address(both), most,
        CONFIDENCES[confidence], threshold, accept, room, count, address(stops), len(stops),
        *map(address, (confidences, logprobs, notes, seconds)), 0,
    )  # fmt: skip
    model.library.offramp_cycles(model.programs, ctypes.byref(call))
    made = int(call.made)
    found, at, said = [], n, tokens.tolist()
    lists = notes[:made].tolist(), confidences[:made].tolist(), logprobs[:made].tolist()
    for (first, drafts, _, deeper, stand, sound), sure, probable in zip(*lists, strict=True):
        stands = min(stand + sound, deeper)
        found.append(
            Cycle(first, drafts, deeper, stand, bool(sound), said[at : at + stands], sure[:drafts], probable[:stands])
        )
        at += stands
    return Checked(found, read[: len(found[-1].tokens)], seconds.tolist())


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

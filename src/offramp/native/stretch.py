"""Several tokens of one row in one call of the kernels: drafts with their check, or each as deep as it needs to go."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.core.policy import DRAFTER
from offramp.families.state import Context, Frame, Skipped
from offramp.native import kernels as lib
from offramp.native.cache import places_of
from offramp.native.kernels import address

# ---------------------------------------------------------------- drafts

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


# ---------------------------------------------------------------- tokens that are generated


class Made(NamedTuple):
    """What came of one call.

    Attributes:
        tokens: Those that were generated; nothing comes behind one that was chosen by no number, or ends the text.
        layers: Where each left.
        tests: How many were made for each.
        confidences: Of each one's last test; NaN where none was made.
        normalisers: Of what each was read out of; NaN or infinite for a token that was chosen by no number.
        fills: What was filled: for the how manieth token, from which layer on, up to which, of how many tokens.
        seconds: Of blocks, fills, readouts of all tokens and of some, and the choice of the kept ones.
    """

    tokens: list[int]
    layers: list[int]
    tests: list[int]
    confidences: list[float]
    normalisers: list[float]
    fills: list[list[int]]
    seconds: list[float]


class Stretch:
    """What the calls of one generation share; made by `of`.

    Args:
        model: An `offramp.native.model.NativeModel`.
        context: Of the batch, a single row.
        exits: Layers that are tested, ascending.
        last: The layer at which all that have not left are read out.
        confidence: What is compared with thresholds: one of `CONFIDENCES`.
        tokens: Those that the first test scores, [K]; None: all.
        keep: How many of them later tests score: the best of the first one; None: the same.
        skip: Columns of the first test that are not ranked, [P].
        always: The tokens of these, which later tests score too, [P].
        left: Tokens that left before, by the depth they left at.
        filled: How many of these each layer has dealt with.
        room: Tokens that may still come.
        ends: Tokens behind which nothing comes.
    """

    def __init__(
        self,
        model: Any,
        context: Context,
        *,
        exits: Sequence[int],
        last: int,
        confidence: str,
        tokens: Tensor | None,
        keep: int | None,
        skip: Tensor,
        always: Tensor,
        left: Sequence[tuple[int, Skipped]],
        filled: Sequence[int],
        room: int,
        ends: Sequence[int],
    ) -> None:
        self.model, self.context, self.exits = model, context, len(exits)
        self.confidence = CONFIDENCES[confidence]
        frozen = [(depth, slot) for depth, some in left for slot in some.slots.tolist()]
        count, width = len(frozen), model.shape.width
        self.hidden, self.normaliser = torch.empty(1, width), torch.empty(1)
        self.best, self.tokens = torch.empty(1, 2), torch.empty(1, 2, dtype=torch.long)
        self.frozen = torch.empty(count + room, width)
        self.notes = torch.empty(3, count + room, dtype=torch.long)  # layers, slots, positions
        if frozen:
            self.frozen[:count] = torch.cat([some.hidden for _, some in left])
            self.notes[:2, :count] = torch.tensor(frozen).T
            self.notes[2, :count] = context.positions[0, self.notes[1, :count]]
        self.frozen_count, self.filled = count, torch.tensor(list(filled))
        self.ends, self.skip = torch.tensor(list(ends), dtype=torch.long), skip
        self.kept = None if keep is None else torch.cat([torch.empty(keep, dtype=torch.long), always])
        self.keep = keep or 0
        first = None if tokens is None else tokens.contiguous()
        later = first if self.kept is None else self.kept
        ids = [first if index == 0 else later for index in range(len(exits))]
        self.readouts = (lib.Exit * (len(exits) + 1))(
            *(lib.Exit(layer, self._readout(layer, some)) for layer, some in zip(exits, ids, strict=True)),
            lib.Exit(last, self._readout(last, None)),
        )
        if self.keep:
            self.logits = torch.empty(self.readouts[0].test.count)
            self.readouts[0].test.logits = address(self.logits)
        self._reads = (first, self.kept)  # whose addresses the readouts have

    @classmethod
    def of(cls, model: Any, context: Context, **options: Any) -> Stretch | None:
        """Arguments as for `Stretch`.

        Returns:
            One; None where tokens have to be made one by one: embeddings are more than rows of a table, or the row
            begins with padding.
        """
        table = model.embeddings
        if table is None or context.padding is not None or len(table) < model.shape.vocabulary:
            return None
        return cls(model, context, **options)

    def _readout(self, layer: int, ids: Tensor | None) -> lib.Readout:
        call: lib.Readout = self.model.readout_of(self.hidden, self.model.final, layer, ids)
        call.best, call.tokens, call.normaliser = map(address, (self.best, self.tokens, self.normaliser))
        return call

    def run(self, token: int, slot: int, thresholds: Sequence[Sequence[float]]) -> Made:
        """Generate.

        Args:
            token: The last one that is known.
            slot: Where it stands.
            thresholds: Above these the next tokens leave, by token and exit: as many tokens as there are lists.

        Returns:
            What came of it, at least one token.
        """
        most, model, context = len(thresholds), self.model, self.context
        context.reach(slot + most)
        places = places_of(Frame(slice(0, 1), slot, most), context)
        calls = [model.call_of(context, self.hidden, places, 0, 0, layer=0) for _ in range(2)]
        calls[0].rows = 1
        above = torch.tensor(thresholds, dtype=torch.float64)
        layers = len(self.filled)
        numbers, values = torch.empty(3, most, dtype=torch.long), torch.empty(2, most)
        fills, seconds = torch.empty(most * layers, 4, dtype=torch.long), torch.zeros(5, dtype=torch.float64)
        table = model.embeddings
        call = lib.Stretch(
            *calls, address(table), lib.F32 if table.dtype == torch.float32 else lib.BF16, token, most,
            len(self.readouts), self.readouts, address(above), self.confidence, self.keep,
            None if self.kept is None else address(self.kept), address(self.skip), len(self.skip), len(model.blocks),
            address(self.frozen), *(address(notes) for notes in self.notes), self.frozen_count, address(self.filled),
            address(self.ends), len(self.ends), *(address(some) for some in numbers),
            *(address(some) for some in values), address(fills), 0, address(seconds), 0,
        )  # fmt: skip
        model.library.offramp_stretch(model.programs, ctypes.byref(call))
        self.frozen_count = int(call.frozen_count)
        made = int(call.made)
        (tokens, left, tests), (confidences, normalisers) = numbers[:, :made].tolist(), values[:, :made].tolist()
        filled = fills[: call.fills_count].tolist()
        return Made(tokens, left, tests, confidences, normalisers, filled, seconds.tolist())

"""A model whose blocks and readouts run in the kernels; to the decode loop it is a `SplitModel` like any other.

States are float32 whatever the weights are in. Sums have the same order in every call, so that a token's state does not
depend on which tokens it is computed with: `skipped="verify"` gives this engine's own full depth bit for bit.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offramp.core.adapters import side_by_side
from offramp.core.exits import Exits
from offramp.families import SplitModel, acting
from offramp.families.network import rotation
from offramp.families.readouts import Best, HeadIds, HeadRows
from offramp.families.state import Context, Skipped, State
from offramp.hub.pretrained import Rounded
from offramp.native import blocks
from offramp.native import kernels as lib
from offramp.native.blocks import Turning
from offramp.native.cache import Memory, NativeCache, Places, own_slots, places_of
from offramp.native.families import FAMILIES, parts, require_plain
from offramp.native.kernels import NativeError, Threads, address, library
from offramp.native.stretch import Checked, Stretch, cycles, plain_embeddings
from offramp.native.weights import Part, Weights


class NativeModel(SplitModel):
    """A Hugging Face model that decodes in the kernels.

    Args:
        model: Of a family in `native.families`, on the CPU, in float32 or bfloat16, with ordinary linear layers.
        rounded: "int8": read all matrices in eight bits per weight (a copy is made; norms, biases, embeddings and an
            encoder stay as they are). "int4": those of the blocks in four that are thereby left as they are, see
            `FourBits`. What both multiply is rounded to eight.

    Raises:
        UnsupportedModelError: No engine supports it.
        NativeError: The native engine does not support it, or cannot be compiled here.
    """

    engine = "native"
    fused = exact = True

    def __init__(self, model: PreTrainedModel, *, rounded: Rounded | None = None) -> None:
        super().__init__(model)
        self.rounded: Rounded | None = rounded
        self.threads = Threads()
        if self.name not in FAMILIES:
            raise NativeError(f"models of type {self.name!r} have no native description (those with experts have none)")
        if not isinstance(self.squeeze, nn.Identity):
            raise NativeError("its embeddings are not as wide as its states, which the kernels do not know")
        if self.device.type != "cpu":
            raise NativeError(f"the model is on {self.device}; the native engine runs on the CPU")
        if self.rotary_changes:
            raise NativeError("its rotary frequencies change with the length of the text")
        require_plain(self)
        self._parts = parts(self)
        self.library = library()
        self._lenses: dict[int, ctypes.Array[lib.Matrix]] = {}
        self._mix: lib.Matrix | None = None
        self._kinds = sorted(set(self.types)) if self.rotary_by_type else [self.types[0]]
        self._reach = 0
        self._tabulate(64)
        self._weights, self._own = Weights(rounded), Weights("int8" if rounded else None)
        self._compose()
        self._embeddings: tuple[object, object, Tensor | None] = (None, None, None)

    def at_work(self) -> AbstractContextManager[None]:
        """Torch keeps to one thread in the block, see `Threads`."""
        return self.threads.alone()

    # ------------------------------------------------------------ programs and tables

    def _compose(self) -> None:
        """Programs for all blocks, for tokens that skip them, and for the encoder's output, in this order."""
        weights, every = self._weights, range(len(self.blocks))
        self._described = [FAMILIES[self.name](self, index) for index in every]
        parts = [
            (block, weights if index < self.num_layers else self._own, self._turning(index))
            for index, block in enumerate(self._described)
        ]
        programs = [
            *(blocks.program(*part) for part in parts),
            *(blocks.fill(*part) for part in parts),
            *(blocks.cross(block, theirs) for block, theirs, _ in parts),
        ]
        ops = [op for program in programs for op in program]
        starts = [0, *accumulate(map(len, programs))]
        needs = [blocks.widths(block, self.shape.width) for block in self._described]
        widths = [max(need[register] for need in needs) for register in sorted(needs[0])]
        self._arrays = (
            (ctypes.c_int64 * len(widths))(*widths),
            (lib.Op * len(ops))(*ops),
            (ctypes.c_int64 * len(starts))(*starts),
        )
        self._kv = torch.float32 if self.model.dtype == torch.float32 else torch.bfloat16
        self.programs = lib.Model(
            self.shape.width, len(widths), *self._arrays, lib.F32 if self._kv == torch.float32 else lib.BF16
        )
        self.final = weights.norm(self.norm)
        self._head = weights.matrix(Part(self.head), self._logits_bias)
        self.share_in_four_bits = weights.share_in_four_bits
        cap = getattr(self.config, "final_logit_softcapping", None) or 0.0
        self._bend = (1.0 if cap else float(self.family.logits(self.config, torch.ones(()))), cap)

    def _turning(self, index: int) -> Turning:
        if self.rotary is None:
            return Turning()
        table = self._kinds.index(self.types[index] if self.rotary_by_type else self.types[0])
        return Turning(table, 2 * self._tables[table][0].shape[1])

    def _tabulate(self, positions: int) -> None:
        """Cosines, sines and biases for at least so many positions, by the model's own rules."""
        if positions <= self._reach:
            return
        self._reach = max(positions, 2 * self._reach)
        places, like = torch.arange(self._reach)[None], torch.zeros(1, 1, self.shape.width)
        self._tables: list[tuple[Tensor, Tensor]] = []
        for kind in self._kinds if self.rotary is not None else ():
            cosines, sines = rotation(self, kind, like, places)
            half = cosines.shape[-1] // 2  # each stands there twice: in both halves, or side by side
            once = slice(half) if torch.equal(cosines[..., :half], cosines[..., half:]) else slice(None, None, 2)
            self._tables.append((cosines[0, :, once].contiguous(), sines[0, :, once].contiguous()))
        pairs = [lib.Rotation(address(c), address(s)) for c, s in self._tables]
        self._rotations = (lib.Rotation * max(1, len(pairs)))(*pairs)
        self._distances = torch.empty(0, 0)
        if self.family.position_bias is not None:
            attention: Any = self.blocks[0].get_submodule(self.family.position_bias)
            bias = attention.compute_bias(1, self._reach, past_seen_tokens=self._reach - 1)  # [1, H, 1, reach]
            self._distances = bias.detach()[0, :, 0].float().flip(-1).contiguous()

    @property
    def is_current(self) -> bool:
        """Whether the model still has the modules and the weights that this object was made with."""
        if not super().is_current or self._weights.changed:
            return False
        now = parts(self)
        return len(now) == len(self._parts) and all(map(operator.is_, now, self._parts))

    @property
    def embeddings(self) -> Tensor | None:
        """The table whose rows enter the first block as they are; None: they do not, or a hook acts beside it."""
        module: Any = self.decoder.get_input_embeddings()
        if any(acting(module)):
            return None
        weight = getattr(module, "weight", None)
        if self._embeddings[0] is not module or self._embeddings[1] is not weight:
            self._embeddings = (module, weight, plain_embeddings(self))
        return self._embeddings[2]

    # ------------------------------------------------------------ start, run, fill

    def _embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        return super()._embedded(ids, positions).float()

    def _new_context(self, batch: int, memory: Tensor | None, memory_mask: Tensor | None) -> Context:
        context = Context(self._new_cache(batch), None, torch.empty(0), None, memory, memory_mask)
        if memory is None:
            return context
        mask = torch.ones(memory.shape[:2], dtype=torch.long)
        if memory_mask is not None and not self.family.listens:  # else to all of its padded input
            mask = memory_mask.long()
        real = mask.reshape(-1).nonzero()[:, 0]
        slots = (mask.cumsum(-1) - 1).reshape(-1)[real]
        batch_of = torch.arange(batch).repeat_interleave(memory.shape[1])[real]
        context.past = Memory(self._new_cache(batch), Places(batch_of, slots, slots, real), mask.sum(-1).contiguous())
        context.past.cache.reserve(memory.shape[1])
        return context

    def _new_cache(self, batch: int) -> NativeCache:
        own = [blocks.own_attention(block) for block in self._described]
        return NativeCache(batch, [a.kv_heads for a in own], [a.head_dim for a in own], self._kv)

    def blocks_of(self, context: Context, row: int, layers: Sequence[int], begin: int, end: int) -> list[Tensor]:
        """As `SplitModel.blocks_of`."""
        return context.cache.blocks(row, layers, begin, end)  # type: ignore[no-any-return]

    def run(self, state: State, lo: int, hi: int) -> State:
        """As `SplitModel.run`; padding is passed over, and keeps the states it came with."""
        return self.run_each([state], lo, hi)[0]

    def run_each(self, states: list[State], lo: int, hi: int) -> list[State]:
        """As `SplitModel.run_each`, in one call."""
        if any(state.depth != lo for state in states) or not lo <= hi <= self.num_layers:
            return super().run_each(states, lo, hi)  # which refuses
        made = self._through(states, lo, hi)
        return [State(s.context, s.frame, hidden, hi) for s, hidden in zip(states, made, strict=True)]

    def branched(self, states: list[State]) -> list[State]:
        """As `SplitModel.branched`, in one call."""
        own = self.branches[states[0].depth]
        made = self._through(states, own.start, own.stop)
        return [replace(state, branch=hidden) for state, hidden in zip(states, made, strict=True)]

    def mixed(self, embedded: Tensor, before: Tensor) -> Tensor:
        """As `SplitModel.mixed`, a matrix like any other."""
        both, made = side_by_side(embedded, before), torch.empty_like(embedded)
        self.library.offramp_readout(self.mix_of(both, made))
        return made

    def mix_of(self, both: Tensor, made: Tensor) -> lib.Readout:
        """What makes the drafter's states `made` [..., D] of its inputs side by side, [..., 2 D]."""
        assert self._mix is not None
        call = lib.Readout(
            made.numel() // made.shape[-1], both.shape[-1], self._mix.rows, self.threads.count, 1.0, 1.0, 0.0,
            address(both), 0, None, None, ctypes.pointer(self._mix), None, 0,
        )  # fmt: skip
        call.logits = address(made)
        return call

    def cycles(self, *where: Any, **options: Any) -> Checked | None:
        """Drafts and their check in one call, see `offramp.native.stretch`; None where that cannot be."""
        return cycles(self, *where, **options)

    def stretch(self, *where: Any, **options: Any) -> Stretch | None:
        """Several tokens of one row in one call, see `offramp.native.stretch`; None where that cannot be."""
        return Stretch.of(self, *where, **options)

    def _through(self, states: list[State], lo: int, hi: int) -> list[Tensor]:
        """What some blocks make of states [A, n, D] each."""
        context, width = states[0].context, self.shape.width
        if context.memory is not None:
            self._cross(context, lo, hi)
        flats = [state.hidden.reshape(-1, width) for state in states]
        places = [places_of(state.frame, context) for state in states]
        real = [flat if at.real is None else flat[at.real] for flat, at in zip(flats, places, strict=True)]
        if len(real) == 1:  # a copy: the kernels work in place
            parts: Sequence[Tensor] = [hidden := real[0].clone() if places[0].real is None else real[0]]
        else:
            parts = torch.split(hidden := torch.cat(real), [len(part) for part in real])
        self._call(context, hidden, Places.joined(places), lo, hi, layer=lo)
        ran = []
        for state, flat, at, part in zip(states, flats, places, parts, strict=True):
            whole = part if at.real is None else flat.index_copy(0, at.real, part)
            ran.append(whole.view(state.hidden.shape))
        return ran

    def _cross(self, context: Context, lo: int, hi: int) -> None:
        """Keys and values of the encoder's output for blocks that are visited for the first time."""
        for layer in range(lo, hi):
            if layer not in context.crossed:
                memory, places = context.memory, context.past.places
                assert memory is not None
                hidden, program = (
                    memory.float().reshape(-1, memory.shape[-1])[places.real],
                    2 * len(self.blocks) + layer,
                )
                self._call(context, hidden, places, program, program + 1, layer=layer)
                context.crossed.append(layer)

    def fill(self, context: Context, lo: int, hi: int, skipped: Skipped) -> None:
        """As `SplitModel.fill`."""
        if "native" not in skipped.memo:
            rows, slots = skipped.rows, own_slots(context)[skipped.rows, skipped.slots]
            skipped.memo["native"] = Places(rows, slots, context.positions[rows, skipped.slots])
        first, last = len(self.blocks) + lo, len(self.blocks) + hi
        self._call(context, skipped.hidden.contiguous(), skipped.memo["native"], first, last, layer=lo)

    def _call(self, context: Context, hidden: Tensor, places: Places, first: int, last: int, *, layer: int) -> None:
        """Run programs on states [M, D], in place."""
        self.library.offramp_run(self.programs, self.call_of(context, hidden, places, first, last, layer=layer))

    def call_of(
        self, context: Context, hidden: Tensor, places: Places, first: int, last: int, *, layer: int
    ) -> lib.Call:  # fmt: skip
        """A run of programs on states [M, D], at places of which there may be more."""
        cache: NativeCache = context.cache
        self._tabulate(max(context.slots, places.reach))
        cache.reserve(context.slots)
        memory: tuple[Any, ...] = ()
        if context.past is not None:
            far: NativeCache = context.past.cache
            memory = (far.capacity, address(context.past.lengths), *far.addresses)
        return lib.Call(
            first, last, len(hidden), layer, cache.capacity, self.threads.count,
            address(hidden), address(places.batch), address(places.slots), address(places.positions),
            *cache.addresses,
            ctypes.addressof(self._rotations), address(self._distances), self._reach, *memory,
        )  # fmt: skip

    # ------------------------------------------------------------ readout

    @property
    def exits(self) -> Exits | None:
        """The trained exits, in float32."""
        return self._exits  # type: ignore[no-any-return]

    @exits.setter
    def exits(self, exits: Exits | None) -> None:
        self._own = Weights("int8" if self.rounded else None)
        SplitModel.exits.fset(self, exits)  # type: ignore[attr-defined]
        self._compose()
        self._lenses, self._mix = {}, None
        if exits is None or self._exits is None:
            return
        if self._exits.drafter is not None:
            self._mix = self._own.matrix(Part(self._exits.drafter.mix))
        self._exits = exits.placed(torch.float32, self.device)
        self._lens_weights = Weights()
        for layer in range(self.num_layers):
            if (lens := self._exits.lens(layer)) is not None:
                matrices = [self._lens_weights.matrix(Part(part)) for part in (lens.down, lens.up) if part is not None]
                self._lenses[layer] = (lib.Matrix * len(matrices))(*matrices)

    def readout_input(self, hidden: Tensor, layer: int | None = None) -> Tensor:
        """As `SplitModel.readout_input`, in float32 and in the kernels' order of sums."""
        flat = hidden.reshape(-1, self.shape.width).contiguous()
        inputs = torch.empty_like(flat)
        call = self.readout_of(flat, self.final, layer)
        call.head, call.inputs = None, address(inputs)
        self.library.offramp_readout(call)
        return inputs.view(hidden.shape)

    def project(self, x: Tensor, rows: HeadRows | HeadIds | None = None) -> Tensor:
        """As `SplitModel.project`, in float32; the head's rows are read where they lie."""
        flat = x.reshape(-1, self.shape.width).contiguous()
        ids = rows.ids if isinstance(rows, HeadIds) else None
        logits = torch.empty(len(flat), self._head.rows if ids is None else ids.shape[-1])
        call = self.readout_of(flat, None, None, ids, scale=1.0)
        call.logits = address(logits)
        self.library.offramp_readout(call)
        return logits.view(*x.shape[:-1], -1)

    def best(  # type: ignore[override]
        self,
        hidden: Tensor,
        layer: int | None = None,
        rows: HeadIds | None = None,
        *,
        logits: bool = False,
        inputs: bool = False,
    ) -> Best:
        """An exit test, or the readout of a token, in one call.

        Args:
            hidden: Residual states, [A, D], float32.
            layer: The layer they are after: its lens comes first, if it has one. None: no lens.
            rows: Which tokens are read, [A, K], or [K] for all states alike; -1 for none. None: all V.
            logits: Whether all logits are wanted, too.
            inputs: Whether what the head reads is wanted, too.

        Returns:
            The two best tokens of each state, their logits, and the normaliser of all.
        """
        hidden = hidden.contiguous()
        count, ids = len(hidden), None if rows is None else rows.ids
        call = self.readout_of(hidden, self.final, layer, ids)
        made = Best(
            torch.empty(count, 2), torch.empty(count, 2, dtype=torch.long), torch.empty(count),
            torch.empty(count, call.count) if logits else None, torch.empty(count, hidden.shape[1]) if inputs else None,
        )  # fmt: skip
        call.best, call.tokens, call.normaliser, call.logits, call.inputs = (
            None if tensor is None else tensor.data_ptr() for tensor in made
        )
        self.library.offramp_readout(call)
        return made

    def rank(self, logits: Tensor, count: int, skip: Tensor) -> Tensor:
        """As `SplitModel.rank`."""
        logits, tokens = logits.contiguous(), torch.empty(len(logits), count, dtype=torch.long)
        self.library.offramp_rank(
            address(logits), *logits.shape, address(skip), len(skip), count, address(tokens)
        )  # fmt: skip
        return tokens

    def gather(self, ids: Tensor) -> HeadIds:  # type: ignore[override]
        """Which rows of the head to read for tokens [A, K] or [K]; nothing is copied."""
        return HeadIds(ids.contiguous())

    def readout_of(
        self,
        hidden: Tensor,
        norm: lib.Norm | None,
        layer: int | None,
        ids: Tensor | None = None,
        *,
        scale: float | None = None,
    ) -> lib.Readout:
        """A readout of states [A, D] that has yet to be told what is wanted."""
        lens = self._lenses.get(layer) if layer is not None else None
        return lib.Readout(
            *hidden.shape, self._head.rows if ids is None else ids.shape[-1], self.threads.count,
            (self.scale or 1.0) if scale is None else scale, *self._bend, address(hidden),
            0 if lens is None else len(lens), lens, norm and ctypes.pointer(norm), ctypes.pointer(self._head),
            None if ids is None else address(ids), ids.shape[1] if ids is not None and ids.ndim == 2 else 0,
        )  # fmt: skip

"""A model whose tokens go from exit to exit in single launches; to the decode loop it is a `SplitModel` like any other.

Blocks are the model's own, called as everywhere else; only what they are given differs: keys and values at fixed places
(`Memory`), masks and positions made from buffers. A segment concerns all rows of a batch; those that left, or stand
elsewhere, are masked. Prompts, passes over several tokens and exits' own blocks run as in `SplitModel`; tests and
readouts of few tokens in fused kernels, where they can (`ExitTests`). While a test's answer travels, the next segment
runs if it is likely to be wanted (`Ahead`).

Off CUDA segments run uncaptured, which shows that their tokens are right, not that they are fast.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offramp.cuda.exit_test import MOST, ExitTests, packed, told
from offramp.cuda.memory import Memory
from offramp.cuda.segment import Launch, Segment
from offramp.families import SplitModel, acting
from offramp.families.network import run_block
from offramp.families.readouts import Best, HeadIds, HeadRows
from offramp.families.state import Context, Frame, Skipped, State

FAMILIES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "mt5",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "t5",
)
"""Whose segments were tested, by `config.model_type`."""
_KINDS = ("full_attention", "sliding_attention")
_ATTENTION = ("eager", "sdpa")


class CudaError(RuntimeError):
    """The CUDA engine cannot run a model, for a reason the user can act on; the message is one line."""


class CudaModel(SplitModel):
    """A Hugging Face model that decodes in segments.

    Args:
        model: Of a family in `FAMILIES`, wherever it is; only on CUDA are segments captured.
        ahead: Whether segments may be launched before the answer of the test in front of them is read.

    Raises:
        UnsupportedModelError: No engine supports it.
        CudaError: This engine does not support it.
    """

    engine = "cuda"

    def __init__(self, model: PreTrainedModel, *, ahead: bool = True) -> None:
        super().__init__(model)
        if self.name not in FAMILIES:
            raise CudaError(f"models of type {self.name!r} are not among {', '.join(FAMILIES)}; use engine='torch'")
        if other := sorted(set(self.types) - set(_KINDS)):
            raise CudaError(
                f"it has layers of kind {', '.join(other)}, not only {', '.join(_KINDS)}; use engine='torch'"
            )
        if (attention := self.config._attn_implementation) not in _ATTENTION:
            raise CudaError(
                f"attn_implementation is {attention!r}; load the model with one of {', '.join(_ATTENTION)}, "
                "or use engine='torch'"
            )
        if self.rotary_changes:
            raise CudaError("its rotary frequencies change with the length of the text; use engine='torch'")
        if self._hooked:
            raise CudaError(
                "it has hooks or a forward of somebody's own, which a graph would not call; use engine='torch'"
            )
        self.memories: list[Memory] = []
        self._ahead = ahead
        self._latest: Memory | None = None
        self._addresses = self._where()
        self.tests = ExitTests.of(self)
        self.fused = self.tests is not None

    def _where(self) -> tuple[int, ...]:
        return tuple(tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers()))

    @property
    def _hooked(self) -> bool:
        parts = (part for block in self.blocks for part in block.modules())
        return any(any(acting(part)) for part in parts)

    @property
    def is_current(self) -> bool:
        """Whether weights are where graphs look for them, and nobody wants to be called in between."""
        plain = not self._hooked and (self.tests is None or self.tests.apply)
        return super().is_current and self._where() == self._addresses and plain

    # ------------------------------------------------------------ memory

    def _new_context(self, batch: int, memory: Tensor | None, memory_mask: Tensor | None) -> Context:
        self._latest = None
        self.memories = [m for m in self.memories if not m.is_free or self._fits(m, batch)]
        found = next((m for m in self.memories if m.is_free), None)
        if found is None:
            found = Memory(
                batch, self.windows, self.shape.width, self.model.dtype, self.device, hears=self.is_encoder_decoder
            )
            self.memories.append(found)
        if memory_mask is not None and bool(memory_mask.all()):
            memory_mask = None
        past = found.cache if found.heard is None else found.heard.past
        context = Context(found.cache, past, torch.empty(0), None, memory, memory_mask)
        found.lend(context)
        return context

    def _fits(self, memory: Memory, batch: int) -> bool:
        return memory.batch == batch and [layer.window for layer in memory.layers] == self.windows

    def memory_of(self, context: Context) -> Memory:
        """That of a batch."""
        return next(memory for memory in self.memories if memory.cache is context.cache)

    # ------------------------------------------------------------ run

    def run(self, state: State, lo: int, hi: int) -> State:
        """As `SplitModel.run`; one token per row goes in one launch."""
        return self.run_each([state], lo, hi)[0]

    def run_each(self, states: list[State], lo: int, hi: int) -> list[State]:
        """As `SplitModel.run_each`; states of one token each go together, wherever they stand."""
        memory = self.memory_of(states[0].context)
        ready = memory.is_ready(states[0].context, lo, hi)
        if lo == hi or not ready or any(s.depth != lo or s.frame.queries != 1 for s in states) or hi > self.num_layers:
            memory.ahead.last = None
            return [super(CudaModel, self).run(state, lo, hi) for state in states]
        launch, rows = memory.ahead.take(states, hi), [state.frame.rows for state in states]
        if launch is None:
            self._place(memory, states)
            launch = self._launch(memory, lo, hi)
        launch.rows, launch.count = rows, sum(len(state.hidden) for state in states)
        memory.ahead.last, self._latest = launch, memory
        return [State(s.context, s.frame, launch.out[s.frame.rows].clone(), hi, origin=launch) for s in states]

    def _launch(self, memory: Memory, lo: int, hi: int) -> Launch:
        memory.launched += 1
        return Launch(hi, [], 0, self._segment(memory, lo, hi).launch())

    def _run_ahead(self) -> None:
        """Launch the segment behind the last one, if it is likely to be asked for."""
        memory = self._latest
        if not self._ahead or memory is None or (segment := memory.ahead.next()) not in memory.segments:
            return
        last = memory.ahead.last
        assert last is not None
        for rows in last.rows:  # only theirs: others would go deeper and deeper, and might overflow
            memory.hidden[rows] = last.out[rows]
        last.ahead = self._launch(memory, *segment)
        memory.ahead.launched += 1

    def fill(self, context: Context, lo: int, hi: int, skipped: Skipped) -> None:
        """As `SplitModel.fill`."""
        self.memory_of(context).ahead.spoil()
        super().fill(context, lo, hi, skipped)

    def _place(self, memory: Memory, states: list[State]) -> None:
        """Put states, and where they stand, into the buffers."""
        context = states[0].context
        memory.reserve(max(context.slots, *(state.frame.start + 1 for state in states)))
        memory.pad(context.padding)
        memory.slots.fill_(memory.capacity - 1)
        for state in states:
            rows, start = state.frame.rows, state.frame.start
            memory.hidden[rows] = state.hidden
            memory.positions[rows] = context.positions[rows, start : start + 1]
            memory.slots[rows] = start

    def _segment(self, memory: Memory, lo: int, hi: int) -> Segment:
        """What was captured for these layers, or is now."""
        if (lo, hi) not in memory.segments:
            if memory.pool is None and self.device.type == "cuda":
                memory.pool = torch.cuda.graph_pool_handle()
            # of a context only the caches are read: the frame brings all that depends on the rest
            bare = Context(memory.cache, memory.cache, memory.positions, None)
            if (heard := memory.heard) is not None:
                bare.past, bare.memory, bare.memory_mask = heard.past, memory.hidden, memory.valid
                bare.crossed = [*range(self.num_layers)]
            memory.segments[lo, hi] = Segment(partial(self._through, memory, bare, lo, hi), self.device, memory.pool)
            memory.captured += 1
        return memory.segments[lo, hi]  # type: ignore[no-any-return]

    def _through(self, memory: Memory, context: Context, lo: int, hi: int) -> Tensor:
        """All rows' states [B, 1, D] after layers `lo` to `hi`; nothing here waits for the device."""
        frame, hidden = Frame(slice(0, memory.batch), 0, 1), memory.hidden
        frame.memo["positions", ""] = memory.positions
        for kind, window in zip(self.types[lo:hi], self.windows[lo:hi], strict=True):
            if ("mask", kind) not in frame.memo:
                frame.memo["mask", kind] = memory.mask(window)
        if memory.heard is not None:
            frame.memo["mask", "cross"] = memory.heard.mask
        if self.family.position_bias is not None:
            frame.memo["bias", ""] = self._bias(memory)
        memory.in_segment = True
        try:
            for index in range(lo, hi):
                hidden = run_block(self, index, hidden, frame, context)
        finally:
            memory.in_segment = False
        return hidden

    def _bias(self, memory: Memory) -> Tensor:
        """T5's relative position bias of each row's query, [B, H, 1, capacity]; of slots it does not see, anything."""
        attention, last = self.blocks[0].get_submodule(self.family.position_bias), memory.capacity - 1
        by_distance = attention.compute_bias(1, memory.capacity, device=self.device, past_seen_tokens=last)[0, :, 0]
        slots = torch.arange(memory.capacity, device=self.device)
        places = (last - memory.slots[:, None] + slots).clamp(max=last)  # the last one's distance is 0
        return by_distance[:, places].transpose(0, 1)[:, :, None]  # type: ignore[no-any-return]

    # ------------------------------------------------------------ readout

    def told(self, values: Tensor) -> list[float]:
        """As `SplitModel.told`."""
        return self._fetched(values).tolist()

    def _fetched(self, values: Tensor) -> Tensor:
        """The same on the host, for which only what has been launched so far is waited for, not what runs ahead."""
        if values.device.type != "cuda":
            self._run_ahead()
            return values
        with torch.cuda.device(self.device):
            there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            there.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            self._run_ahead()
            arrived.synchronize()
        return there

    def best(
        self,
        hidden: Tensor,
        layer: int | None = None,
        rows: HeadRows | HeadIds | None = None,
        *,
        logits: bool = False,
        inputs: bool = False,
    ) -> Best:
        """As `SplitModel.best`, but on the host, in one copy; logits and inputs stay where they are.

        Args:
            hidden: Residual states, [A, D].
            layer: As for `readout_input`.
            rows: From `gather`.
            logits: Whether all logits are wanted, too.
            inputs: Whether what the head reads is wanted, too.

        Returns:
            As it says.
        """
        read = self.readout_input(hidden, layer) if inputs else None
        ids = rows.ids if isinstance(rows, HeadIds) else None
        if self.tests is not None and (ids is not None or len(hidden) <= MOST):
            made, scores = self.tests(hidden, layer, ids, logits=logits)
        else:
            found = super().best(hidden, layer, None if isinstance(rows, HeadIds) else rows)
            made, scores = packed(found), found.logits
        return told(self._fetched(made))._replace(logits=scores, inputs=read)

    def project(self, x: Tensor, rows: HeadRows | HeadIds | None = None) -> Tensor:
        """As `SplitModel.project`; single rows of the head are read where they lie, if tests run in kernels."""
        if not isinstance(rows, HeadIds):
            return super().project(x, rows)
        assert self.tests is not None
        return self.tests.project(x, rows.ids)

    def gather(self, ids: Tensor) -> HeadIds | HeadRows:  # type: ignore[override]
        """Which rows of the head to read for tokens [A, K] or [K]; without kernels, copies of them."""
        return super().gather(ids) if self.tests is None else HeadIds(ids.contiguous())

    def stretch(self, *_: Any, **__: Any) -> None:
        """There is no call of several tokens."""

    def cycles(self, *_: Any, **__: Any) -> None:
        """Nor one of drafts and their check."""

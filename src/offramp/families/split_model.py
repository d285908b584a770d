"""Any supported model as start / run(lo, hi) / fill / readout.

Layers count from 1 in all public signatures of this project: "after layer l" means that blocks 0..l-1 of the module
list ran. `run(state, lo, hi)` takes a state after `lo` layers to one after `hi`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from offramp.families.network import Edit, Network, blocks_of, rotation, run_block, states_after
from offramp.families.readouts import Best, HeadRows, best_of, ranked
from offramp.families.sizes import model_shape
from offramp.families.state import Context, Frame, LayerCache, Rows, Skipped, State

CacheLayerMixin.register(LayerCache)  # transformers asks isinstance() of a cache's layers


class SplitModel(Network):
    """A Hugging Face model that can stop after any layer, be resumed there, and be read out there.

    Args:
        model: A `...ForCausalLM` or `...ForConditionalGeneration` of a supported family; left as it is.

    Raises:
        UnsupportedModelError: No family of that name, or layers of a kind that cannot be run apart.
    """

    fused = False
    """Whether `best` is cheaper than logits, also on rows of the head, which are then read without being copied."""
    exact = False
    """Whether a token's states are the same bit for bit, whatever it is computed with."""
    engine = "torch"
    """What runs the blocks, for records."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.shape = model_shape(self)
        self._exits: Any = None

    # ------------------------------------------------------------ start

    def at_work(self) -> AbstractContextManager[None]:
        """What the steps of a generation are made in; an engine of its own may need the processor for itself."""
        return nullcontext()

    @property
    def is_current(self) -> bool:
        """Whether the model still has the head that this object was made with."""
        head: Any = self.model.get_submodule(self.family.head)
        return head is self.head and head.weight.shape[0] == self.shape.vocabulary

    def encode(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encoder output [B, X, D] for token ids [B, X], or for Whisper's features [B, mel, frames]."""
        encoder: Any = self.model.get_encoder()
        output = encoder(inputs) if self.family.listens else encoder(input_ids=inputs, attention_mask=mask)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def start(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        context: Context | None = None,
        rows: Rows | None = None,
        slot: int | None = None,
    ) -> State:
        """The state that enters the first block for the next tokens of some rows.

        Args:
            ids: Token ids, [B, n]; [A, n] for some rows.
            mask: 1 for tokens, 0 for (left) padding, [B, n]; only for the first tokens of a batch.
            positions: Positions of the tokens, [B, n], likewise; None: counted from the mask.
            memory: Encoder output, [B, X, D]; encoder-decoders only, first tokens only.
            memory_mask: Mask of the encoder's input, [B, X].
            context: That of the batch; None begins a new batch.
            rows: Whose tokens they are; None: those of all rows. Only with a context.
            slot: Where in the cache the first of them goes, whatever lies there; None: behind all that were handed out.

        Returns:
            A state of depth 0.
        """
        batch, queries = ids.shape
        if context is None:
            context = self._new_context(batch, memory, memory_mask)
            if mask is not None and not bool(mask.all()):
                context.padding = mask.bool()
                context.positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            else:
                context.positions = torch.arange(queries, device=ids.device).expand(batch, queries)
            if positions is not None:
                context.positions = positions
            context.slots, start = queries, 0
        else:
            start = context.slots if slot is None else slot
            context.reach(start + queries)
        rows = slice(0, batch) if rows is None else rows
        hidden = self._embedded(ids, context.positions[rows, start : start + queries])
        return State(context, Frame(rows, start, queries), hidden, 0)

    def start_each(self, ids: Tensor, context: Context, rows: list[int], slots: list[int]) -> list[State]:
        """As `start`, for one token of each of some rows, unpadded, at slots of their own; embedded together."""
        context.reach(max(slots) + 1)
        row, slot = torch.tensor([rows, slots], device=ids.device)
        hidden = self._embedded(ids, context.positions[row, slot][:, None])
        frames = [Frame(slice(row, row + 1), slot, 1) for row, slot in zip(rows, slots, strict=True)]
        return [State(context, frame, hidden[i : i + 1], 0) for i, frame in enumerate(frames)]

    def _embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        """What enters the first block, [A, n, D]."""
        return self.family.embed(self.decoder, ids, positions)

    def room(self, batch: int) -> Context:
        """A context for rows that come and go, each from slot 0 on; decoder-only models."""
        context = self._new_context(batch, None, None)
        context.positions = torch.arange(1, device=self.device).expand(batch, 1)
        return context

    def blocks_of(self, context: Context, row: int, layers: Sequence[int], begin: int, end: int) -> list[Tensor]:
        """Keys and values of slots `begin` to `end` of a row, both multiples of `BLOCK`, to be read or written.

        Returns:
            Of each of these layers, which somebody has written to: views [H, n, ...] of n blocks.
        """
        return [part for layer in layers for part in context.cache.layers[layer].blocks(row, begin, end)]

    def _new_context(self, batch: int, memory: Tensor | None, memory_mask: Tensor | None) -> Context:
        cache = Cache(layers=[LayerCache(batch, window) for window in self.windows])
        past: Cache = cache
        if self.is_encoder_decoder:
            past = EncoderDecoderCache(cache, Cache(layers=[LayerCache(batch) for _ in self.blocks]))
            if memory_mask is not None and bool(memory_mask.all()):
                memory_mask = None
        return Context(cache, past, torch.empty(0), None, memory, memory_mask)

    # ------------------------------------------------------------ run

    def run(self, state: State, lo: int, hi: int) -> State:
        """Take a state after `lo` layers to one after `hi`; keys and values go into the context's cache.

        All slots before the state's must already be present, for its rows, in the cache of each of these layers.

        Returns:
            The state after `hi` layers.

        Raises:
            ValueError: The state is not after `lo` layers, or there are fewer than `hi`.
        """
        if state.depth != lo or not lo <= hi <= self.num_layers:
            raise ValueError(
                f"cannot run layers {lo + 1}..{hi} of {self.num_layers} on a state after {state.depth} layers"
            )
        hidden = state.hidden
        for index in range(lo, hi):
            hidden = run_block(self, index, hidden, state.frame, state.context)
        return State(state.context, state.frame, hidden, hi)

    def run_each(self, states: list[State], lo: int, hi: int) -> list[State]:
        """`run` for states of different rows, which may differ in length and in their slots."""
        return [self.run(state, lo, hi) for state in states]

    def branched(self, states: list[State]) -> list[State]:
        """States of equal depth, with an exit there, and `branch`: what its own blocks make of them."""
        made = []
        for state in states:
            hidden = state.hidden
            for index in self.branches[state.depth]:
                hidden = run_block(self, index, hidden, state.frame, state.context)
            made.append(replace(state, branch=hidden))
        return made

    def mixed(self, embedded: Tensor, before: Tensor) -> Tensor:
        """What goes into the drafter's blocks, [A, n, D], of what goes into the model's and readout inputs before."""
        return self._exits.drafter(embedded, before)  # type: ignore[no-any-return]

    # ------------------------------------------------------------ a whole pass

    def states(
        self,
        ids: Tensor,
        layers: Sequence[int],
        *,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        edit: Edit | None = None,
    ) -> list[Tensor]:
        """What is read out after some layers, by one pass of the model's own code without caches: for training.

        That is, residual states, or what an exit's own blocks make of them. Gradients and dropout are the model's own.

        Args:
            ids: Token ids, [B, T]; padding only behind what is looked at.
            layers: After which, in 1..L.
            memory: Encoder output, [B, X, D]; encoder-decoders only.
            memory_mask: Mask of the encoder's input, [B, X].
            edit: Changes what comes out of each block: (layer, states before, states after) -> states after, [B, T, D].

        Returns:
            States [B, T, D], one per layer asked for.
        """
        found = states_after(self, ids, layers, memory, memory_mask, edit)
        for at, layer in enumerate(layers):
            if layer in self.branches:
                found[at] = self.branch_of(layer, found[at], memory, memory_mask)
        return found

    # ------------------------------------------------------------ fill

    def branch_of(
        self, layer: int, hidden: Tensor, memory: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """What an exit's own blocks make of whole texts' states, [B, T, D]."""
        batch, length = hidden.shape[:2]
        context = self._new_context(batch, memory, memory_mask)
        context.positions = torch.arange(length, device=hidden.device).expand(batch, length)
        context.slots = length
        (state,) = self.branched([State(context, Frame(slice(0, batch), 0, length), hidden, layer)])
        return state.read

    def fill(self, context: Context, lo: int, hi: int, skipped: Skipped) -> None:
        """Write keys and values of tokens that skip blocks: input norms, projections, key norms and rotations only.

        A cache entry equals that of running the whole block on the same states and discarding its output.

        Args:
            context: That of the batch.
            lo: The first skipped block, counted from 0; an exit's own blocks come behind the model's.
            hi: Behind the last one.
            skipped: The tokens and the states they are frozen in.
        """
        for layer in range(lo, hi):
            self._fill(context, layer, skipped)

    def _fill(self, context: Context, layer: int, skipped: Skipped) -> None:
        x, block, kind = skipped.hidden[:, None], self.blocks[layer], self.types[layer]  # [N, 1, D]
        if kind not in skipped.memo:
            positions = context.positions[skipped.rows, skipped.slots][:, None]
            skipped.memo[kind] = rotation(self, kind, x, positions)
        rope = skipped.memo[kind] if self.family.rotates(block) else None
        keys, values = self.family.keys_values(block, x, rope)  # [N, H, 1, D_head]
        cache: Any = context.cache.layers[layer]
        cache.write(skipped.rows, skipped.slots, keys[:, :, 0], values[:, :, 0], stop=skipped.stop)

    # ------------------------------------------------------------ readout

    @property
    def exits(self) -> Any:
        """The trained exits (`offramp.core.exits.Exits`), in the model's number format and place; None without.

        What was set, if it is that already.
        """
        return self._exits

    @exits.setter
    def exits(self, exits: Any) -> None:
        width, layers = self.shape.width, range(1, self.num_layers + 1)
        if exits is not None and (exits.num_layers, exits.width) != (self.num_layers, width):
            raise ValueError(
                f"the exits are for {exits.num_layers} layers of width {exits.width}, but the model has "
                f"{self.num_layers} of width {width}; attach exits that were made for it"
            )
        self.attach(None if exits is None else exits.placed(self.model.dtype, self.device))
        self.shape = replace(self.shape, lenses=() if exits is None else tuple(map(exits.weights, layers)))

    def attach(self, exits: Any) -> None:
        """Take exits as they are, wherever their weights are, to train them."""
        self._exits, count = exits, self.num_layers
        made, self.branches = ([], {}) if exits is None else blocks_of(self, exits)
        likes = [*range(count), *(like for like, _ in made)]
        self.blocks = [*self.blocks[:count], *(block for _, block in made)]
        self.types, self.windows = [self.types[i] for i in likes], [self.windows[i] for i in likes]
        own = tuple(self.shape.blocks[like] for like in likes[count:])
        self.shape = replace(self.shape, branches=own, branch_of=self.branches)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers with a trained exit, ascending; none without."""
        return () if self._exits is None else self._exits.layers

    def readout_input(self, hidden: Tensor, layer: int | None = None) -> Tensor:
        """What is projected to logits: the final norm, recomputed on this state, and T5's scale. Any shape [..., D].

        Args:
            hidden: Residual states, [..., D].
            layer: The layer they are after: its lens comes first, if it has one. None: no lens.

        Returns:
            Readout inputs, [..., D].
        """
        if layer is not None and self._exits is not None:
            hidden = self._exits.adapt(layer, hidden)
        x: Tensor = self.dropout(self.norm(hidden))
        return x if self.scale is None else x * self.scale

    def project(self, x: Tensor, rows: HeadRows | None = None) -> Tensor:
        """Logits of readout inputs: all V of them, or only those of gathered head rows.

        Args:
            x: Readout inputs, [..., D]; [A, D] with `rows`.
            rows: From `gather`; None for the full head.

        Returns:
            Logits [..., V], or [A, K], biased, scaled and soft-capped as the model does it, in the model's dtype.
        """
        x = self.squeeze(x)
        if rows is None:
            logits: Tensor = self.head(x)
            if (bias := self._logits_bias) is not None:
                logits = logits + bias
        elif len(x) == 1 or rows.weight.ndim == 2:
            logits = F.linear(x, rows.weight if rows.weight.ndim == 2 else rows.weight[0])
        else:
            logits = torch.bmm(rows.weight, x[:, :, None])[:, :, 0]
        if rows is not None and rows.bias is not None:
            logits = logits + rows.bias
        return self.family.logits(self.config, logits)

    @property
    def _logits_bias(self) -> Tensor | None:
        """A bias of the logits beside the head's own, [V]; None: the model has none."""
        return getattr(self.model, self.family.logits_bias)[0] if self.family.logits_bias else None

    def gather(self, ids: Tensor) -> HeadRows:
        """Copy the head's rows of token ids [A, K], or [K] for all states alike."""
        biases = [bias[ids] for bias in (self.head.bias, self._logits_bias) if bias is not None]
        return HeadRows(self.head.weight[ids], sum(biases[1:], biases[0]) if biases else None)

    def readout(self, hidden: Tensor, layer: int | None = None) -> Tensor:
        """Logits [..., V] of states [..., D], as the model computes them after the last layer; see `readout_input`."""
        return self.project(self.readout_input(hidden, layer))

    def told(self, values: Tensor) -> list[float]:
        """What a test found, [A], on the host: where a step waits for the device."""
        return values.tolist()

    def rank(self, logits: Tensor, count: int, skip: Tensor) -> Tensor:
        """The tokens of the largest of logits [A, V], best first, [A, count]; none of `skip`, [P]."""
        return ranked(logits, count, skip)

    def best(
        self, hidden: Tensor, layer: int | None = None, rows: HeadRows | None = None, *, logits: bool = False
    ) -> Best:
        """The two best tokens of states [A, D], of the columns of `rows` if given, with their `logits` if wanted."""
        return best_of(self.project(self.readout_input(hidden, layer), rows).float())

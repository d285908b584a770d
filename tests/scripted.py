"""A stub of `SplitModel` with prepared logits: control flow can be written down and is recorded."""

from types import SimpleNamespace

import torch
from torch.nn import functional as F

from offramp.families.readouts import HeadRows, best_of, ranked
from offramp.families.sizes import BlockShape, ModelShape
from offramp.families.state import Context, Frame, LayerCache, State


class ScriptedModel:
    """Reads `script[t][l - 1]` after layer l of the step that predicts output token t; the last step repeats.

    A state is the pair (row, t, layers run); `calls` lists what ran as (layer, rows, output positions), and `filled`
    what was filled as (layer, output positions).
    """

    engine = "script"
    is_encoder_decoder = False
    head_is_plain = True
    exit_layers = ()
    branches = {}

    def __init__(self, script) -> None:
        self.script = torch.as_tensor(script, dtype=torch.float32)  # [T, L, V], or [B, T, L, V]
        if self.script.ndim == 3:
            self.script = self.script[None]
        _, _, self.num_layers, vocabulary = self.script.shape
        self.blocks = [None] * self.num_layers
        self.shape = ModelShape((BlockShape(1, 1, 1, 1),) * self.num_layers, 1, vocabulary, 4)
        self.head = torch.eye(vocabulary)
        self.calls: list[tuple[int, list[int], list[int]]] = []
        self.filled: list[tuple[int, list[int]]] = []

    fused = False

    def start(
        self, ids, mask=None, *, positions=None, memory=None, memory_mask=None, context=None, rows=None, slot=None
    ):
        batch, queries = ids.shape
        if context is None:
            self.prompt = queries
            cache = SimpleNamespace(layers=[LayerCache(batch) for _ in range(self.num_layers)])
            context = Context(cache, cache, torch.arange(queries).expand(batch, queries), None, slots=queries)
            begin = 0
        else:
            begin = context.slots if slot is None else slot
            context.reach(begin + queries)
        chosen = slice(0, batch) if rows is None else rows
        rows = torch.arange(len(context.positions))[chosen][:, None].expand(batch, queries)
        slots = torch.arange(begin, begin + queries).expand(batch, queries)
        hidden = torch.stack([rows, slots, torch.zeros_like(rows)], dim=-1).float()
        return State(context, Frame(chosen, begin, queries), hidden, 0)

    def run(self, state, lo, hi):
        assert state.depth == lo
        hidden = state.hidden
        for layer in range(lo, hi):
            cache = state.context.cache.layers[layer]
            cache.length = state.frame.start + state.frame.queries
            hidden = hidden + torch.tensor([0.0, 0.0, 1.0])
            positions = [int(slot) - self.prompt + 1 for slot in hidden[0, :, 1]]
            self.calls.append((layer + 1, [int(row) for row in hidden[:, 0, 0]], positions))
        return State(state.context, state.frame, hidden, hi)

    def run_each(self, states, lo, hi):
        return [self.run(state, lo, hi) for state in states]

    def fill(self, context, lo, hi, skipped):
        self.filled += [(layer + 1, [int(slot) - self.prompt + 1 for slot in skipped.slots]) for layer in range(lo, hi)]

    def readout_input(self, hidden, layer=None):
        row, slot, depth = (x.long() for x in hidden.unbind(-1))
        step = (slot - self.prompt + 1).clamp(0, self.script.shape[1] - 1)
        return self.script[row.clamp(max=len(self.script) - 1), step, depth - 1]

    def project(self, x, rows=None):
        return x if rows is None else torch.bmm(rows.weight, x[:, :, None])[:, :, 0]

    def readout(self, hidden, layer=None):
        return self.project(self.readout_input(hidden, layer))

    rank = staticmethod(ranked)
    told = staticmethod(torch.Tensor.tolist)

    def best(self, hidden, layer=None):
        return best_of(self.readout(hidden, layer))

    def gather(self, ids):
        return HeadRows(F.one_hot(ids, len(self.head)).float(), None)

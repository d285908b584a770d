"""Where a batch stands between blocks: its states, its slots in the caches, and what is memoised for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.families.cache import Rows

_AHEAD = 64  # slots whose positions are worked out in advance: one token at a time, it would cost more than the rest


class HeadRows(NamedTuple):
    """Rows of the head gathered for some tokens: `weight` [A, K, D] and, if the head has one, `bias` [A, K].

    Those of tokens that are the same for all states have no A.
    """

    weight: Tensor
    bias: Tensor | None

    def select(self, index: Any) -> HeadRows:
        """The rows of some batch rows only."""
        return HeadRows(self.weight[index], None if self.bias is None else self.bias[index])

    def columns(self, index: Tensor) -> HeadRows:
        """Some of each batch row's tokens, `index` [A, K'] into its K."""
        if self.weight.ndim == 2:
            return HeadRows(self.weight[index], None if self.bias is None else self.bias[index])
        weight = self.weight[0][index] if len(index) == 1 else self.weight.take_along_dim(index[:, :, None], 1)
        return HeadRows(weight, None if self.bias is None else self.bias.gather(1, index))


@dataclass
class Context:
    """What one batch has computed so far; every state of the batch points to it.

    Attributes:
        cache: Self-attention keys and values: a `transformers` cache with one `LayerCache` per block.
        past: What the blocks receive: `cache`, or a pair of self- and cross-attention caches.
        positions: Position of every slot handed out so far, and of some to come, [B, T]; padding has position 0.
        padding: 1 for tokens, 0 for padding, [B, T]; None without padding.
        memory: Encoder output [B, X, D], or None.
        memory_mask: 1 for tokens of the encoder's input, [B, X]; None without padding.
        crossed: Blocks whose cross-attention keys and values are computed, in the order of their first visit.
        slots: Number of slots handed out.
    """

    cache: Any
    past: Any
    positions: Tensor
    padding: Tensor | None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    crossed: list[int] = field(default_factory=list)
    slots: int = 0

    def reach(self, slots: int) -> None:
        """Hand out slots up to `slots`, at every row's next positions."""
        self.slots = max(self.slots, slots)
        if (lacking := slots - self.positions.shape[1]) <= 0:
            return
        lacking += _AHEAD
        after = torch.arange(1, lacking + 1, device=self.positions.device) + self.positions[:, -1:]
        self.positions = torch.cat([self.positions, after], dim=1)
        if self.padding is not None:
            self.padding = F.pad(self.padding, (0, lacking), value=True)


@dataclass
class Frame:
    """Where some states sit: `queries` slots from `start` on, for `rows` of the batch. Memoises masks and rotations."""

    rows: Rows
    start: int
    queries: int
    memo: dict[tuple[str, str], Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """Residual states `hidden` [A, n, D] after `depth` layers, for the rows and slots of `frame`.

    `branch` is what the exit's own blocks make of them, if there is an exit with blocks here and they have run.
    `origin` is for the engine that ran them: what made them, all or some of which they are.
    """

    context: Context
    frame: Frame
    hidden: Tensor
    depth: int
    branch: Tensor | None = None
    origin: Any = None

    @property
    def read(self) -> Tensor:
        """What is read out here, [A, n, D]."""
        return self.hidden if self.branch is None else self.branch

    def select(self, keep: Any, rows: Rows) -> State:
        """The states `keep` (an index into the first axis), which are those of batch rows `rows`."""
        branch = None if self.branch is None else self.branch[keep]
        frame = Frame(rows, self.frame.start, self.frame.queries)
        return replace(self, hidden=self.hidden[keep], frame=frame, branch=branch)


@dataclass(frozen=True)
class Skipped:
    """N tokens that skip a block: frozen states `hidden` [N, D] at `rows` [N] and `slots` [N], all below `stop`."""

    hidden: Tensor
    rows: Tensor
    slots: Tensor
    stop: int
    memo: dict[str, Any] = field(default_factory=dict)

"""What a drafter learns: to say what the full model will say, several tokens in a row.

The first draft behind a position knows what the full model's readout read there; the next one knows what the drafter's
own readout read one position before, and so on. So training makes several passes over a text, each with the readout
inputs of the one before, moved by one position. Each pass learns the last layer's distribution, on the exits' frequent
tokens alone: the readout of all V would cost more than the drafter.

In a pass each position attends to what decoding would. At a position p, pass s (from 0) stands for the draft that is s
tokens behind the last one the full model has been at: keys and values up to p - s are those of pass 0, whose inputs
were the full model's, and the others those of the passes in between, one position of each (HASS, Zhang et al. 2024,
arXiv 2408.15766, section 3.2).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.core.policy import DRAFTER
from offramp.families.backbone import autocast
from offramp.families.state import Frame, LayerCache, State
from offramp.training.data import Data, Windows, batch
from offramp.training.kept_states import KeptStates, states_at_all
from offramp.training.loop import Loop, StepResult
from offramp.training.loss_sums import chunk_rows

if TYPE_CHECKING:
    from offramp.core.exits import Exits
    from offramp.families import SplitModel
    from offramp.runs.folder import TrainState
    from offramp.training.config import TrainConfig


class _Joined(LayerCache):
    """Keys and values that gradients go through: nothing is written in place."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, n, D_head] of all rows; return all there are."""
        if self._keys is not None and self._values is not None:
            keys, values = torch.cat([self._keys, keys], dim=2), torch.cat([self._values, values], dim=2)
        self._keys, self._values = keys, values
        return keys, values


class Unrolled:
    """The passes over one batch of texts; begins with pass 0, over all positions.

    Args:
        split: The model, with a drafter.
        mixed: What goes into its blocks, [B, T, D].
        places: The positions that later passes go over, ascending by one in each row, [B, n].

    Attributes:
        first: What the blocks make of `mixed`, [B, T, D].
    """

    def __init__(self, split: SplitModel, mixed: Tensor, places: Tensor) -> None:
        batch, length = mixed.shape[:2]
        self.split, self.places, self.length, self.passes = split, places, length, 0
        self.context = split._new_context(batch, None, None)
        self.context.positions = torch.arange(length, device=mixed.device).expand(batch, length)
        self.context.slots = length
        for index in split.branches[DRAFTER]:
            self.context.cache.layers[index] = _Joined(batch, split.windows[index])
        self.first = self._run(mixed, Frame(slice(0, batch), 0, length))

    def again(self, mixed: Tensor) -> Tensor:
        """The next pass, over `places` only, [B, n, D]."""
        self.passes += 1
        batch, count = mixed.shape[:2]
        frame = Frame(slice(0, batch), self.length + (self.passes - 1) * count, count)
        frame.memo["positions", ""] = self.places
        for index in self.split.branches[DRAFTER]:
            frame.memo["mask", self.split.types[index]] = self._mask(mixed, self.split.windows[index])
        return self._run(mixed, frame)

    def _run(self, mixed: Tensor, frame: Frame) -> Tensor:
        (state,) = self.split.branched([State(self.context, frame, mixed, DRAFTER)])
        return state.read

    def _mask(self, like: Tensor, window: int | None) -> Tensor:
        """What a pass may attend to, [B, 1, n, T + passes · n]: as the family's attention takes it."""
        far = torch.arange(self.length, device=like.device)
        last = self.places[..., None] - self.passes
        allowed = far <= last if window is None else (far <= last) & (far > self.places[..., None] - window)
        own = torch.arange(self.places.shape[1], device=like.device)
        apart = own[:, None] - own - self.passes  # how far a key of the first of the later passes is from its place
        near = [(apart + number == 0).expand(len(like), -1, -1) for number in range(1, self.passes + 1)]
        mask = torch.cat([allowed, *near], dim=-1)[:, None]
        if self.split.config._attn_implementation != "eager":
            return mask
        return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, -1e9)


class Drafts:
    """The losses of drafts in a row; a `TrainTask` of the training loop.

    Args:
        split: The model, with the exits attached.
        exits: With the drafter, and a list of frequent tokens.
        data: What is trained on.
        config: How.
        loop: Of the run.
    """

    unit = "tokens"

    def __init__(self, split: SplitModel, exits: Exits, data: Data, config: TrainConfig, loop: Loop) -> None:
        self.split, self.exits, self.data, self.config, self.loop = split, exits, data, config, loop
        assert exits.frequent is not None
        self.listed = exits.frequent.to(split.device)
        self.rows = split.gather(self.listed)
        self.kept: KeptStates | None = None

    def begin(self, state: TrainState) -> None:
        """Make the place for states, which a run that was refused before must not leave behind."""
        split, loop, last = self.split, self.loop, (self.split.num_layers,)
        self.kept = KeptStates.of(split, self.data.train, last, self.config, loop.run.path, loop.workers, whole=last)

    def settle(self, state: TrainState) -> None:
        """Nothing depends on how far the run is."""

    def learn(self, step: int) -> StepResult:
        """Losses of a step, and their gradients."""
        config = self.config
        windows = batch(self.data.train, step, config.batch_size, config.seed, config.positions)
        return self._done(windows, learns=True)

    @torch.no_grad()
    def judge(self) -> StepResult:
        """The same over all held-out windows."""
        done = self._done(self.data.held_out, learns=False)
        return replace(done, row={"positions": done.count, **done.row})

    def _done(self, windows: Windows, *, learns: bool) -> StepResult:
        """Sums over all windows, of which each process takes its share, as means."""
        config, count, depth = self.config, windows.positions, self.config.unroll
        size = config.micro_batch or (None if learns else config.batch_size)
        sums = torch.zeros(4 * depth, dtype=torch.float64, device=self.split.device)
        for places in self.loop.mine(len(windows), size):
            with autocast(self.split.device, config.precision):
                loss, found = self._passes(windows[places], count)
            if learns:
                loss.backward()  # type: ignore[no-untyped-call]
            sums += found
        losses, agreed, chains, counts = self.loop.summed(sums).view(4, depth).tolist()
        row = {
            name: [value / max(n, 1) for value, n in zip(values, counts, strict=True)]
            for name, values in (("loss", losses), ("agreement", agreed), ("in_a_row", chains))
        }
        total = sum(row["loss"]) / depth
        return StepResult(total, count, row, None if total == total and total < float("inf") else "the drafter")

    def _passes(self, windows: Windows, count: int) -> tuple[Tensor, Tensor]:
        """The loss of some windows, divided by the `count` of the whole step, and sums of all passes.

        Returns:
            The loss, and losses, agreed drafts, drafts with all before them agreed, and how many there are, by pass.
        """
        split, drafter, depth = self.split, self.exits.drafter, self.config.unroll
        assert drafter is not None
        ids, where = windows.ids[:, :-1].to(split.device), windows.counted[:, 1:].to(split.device)
        with torch.no_grad():
            read = split.readout_input(states_at_all(split, windows, self.kept))  # [B, T, D]
            embedded = split.start(ids).hidden
        length, first = ids.shape[1], where.int().argmax(1)
        width = int((length - where.int().flip(1).argmax(1) - first).max())
        spread = first[:, None] + torch.arange(width, device=ids.device)
        places = spread.clamp(max=length - 1)  # [B, n]
        unrolled = Unrolled(split, drafter(embedded, _moved(read)), places)
        own, here = split.readout_input(unrolled.first, DRAFTER), _at(places, where) & (spread < length)
        with torch.no_grad():
            best, wanted = self._teacher(_at(places, read)[here])
        drafted, before = _at(places, own), _at((places - 1).clamp(min=0), own)
        total, row = self._of_prompts(own, read, first) / count / depth, torch.ones_like(here)
        sums = torch.zeros(4, depth, dtype=torch.float64, device=ids.device)
        for number in range(depth):
            if number:
                mixed = drafter(_at(places, embedded), before)
                drafted = split.readout_input(unrolled.again(mixed), DRAFTER)
                before = _moved(drafted)
            counts = here & (torch.arange(width, device=ids.device) >= number)
            scores = split.project(drafted[counts], self.rows).float().log_softmax(-1)
            loss = F.kl_div(scores, wanted[counts[here]], reduction="sum", log_target=True)
            total = total + loss / count / depth
            right = torch.zeros_like(here)
            right[counts] = self.listed[scores.argmax(-1)] == best[counts[here]]
            row = right & (row if number == 0 else _moved(row))
            sums[:, number] += torch.stack([loss.detach().double(), right.sum(), row.sum(), counts.sum()])
        return total, sums.flatten()

    def _of_prompts(self, own: Tensor, read: Tensor, first: Tensor) -> Tensor:
        """The loss of first drafts before the first predicted token, weighted: what was asked teaches, too."""
        weight, lead = self.config.prompt_weight, torch.arange(own.shape[1], device=own.device) < first[:, None]
        if not (weight and torch.is_grad_enabled() and bool(lead.any())):
            return own.new_zeros(())
        scores, wanted = (self.split.project(x[lead], self.rows).float().log_softmax(-1) for x in (own, read))
        return weight * F.kl_div(scores, wanted.detach(), reduction="sum", log_target=True)

    def _teacher(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The full model's tokens [N], and its log-probabilities of the frequent ones among themselves, [N, K]."""
        split, rows = self.split, chunk_rows(self.split.shape.vocabulary)
        best = [split.project(part).argmax(-1) for part in torch.split(inputs, rows)]
        return torch.cat(best), split.project(inputs, self.rows).float().log_softmax(-1)


def _at(places: Tensor, x: Tensor) -> Tensor:
    """What is at places [B, n] of x [B, T, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], places]


def _moved(x: Tensor) -> Tensor:
    """One position to the right, 0 in front."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)

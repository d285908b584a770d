"""What a drafter learns: to say what the full model will say, several tokens in a row.

The first draft behind a position knows what the full model's readout read there; the next one knows what the drafter's
own readout read one position before, and so on. So training makes several passes over a text, each with the readout
inputs of the one before, moved by one position (`offramp.training.unrolled`). Each pass learns the last layer's
distribution, on the exits' frequent tokens alone: the readout of all V would cost more than the drafter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.core.policy import DRAFTER
from offramp.families.backbone import autocast
from offramp.training.data import Data, Windows, batch
from offramp.training.kept_states import KeptStates, states_at_all
from offramp.training.loop import Loop, StepResult
from offramp.training.loss_sums import chunk_rows
from offramp.training.unrolled import Unrolled

if TYPE_CHECKING:
    from offramp.core.exits import Exits
    from offramp.families import SplitModel
    from offramp.runs.folder import TrainState
    from offramp.training.config import TrainConfig


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

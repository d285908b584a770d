"""States of a frozen model, computed in the first pass over the data and read from a file in the later ones.

Exits of a model that stays as it is learn from the same states in every epoch, and the model's pass is most of a step.
The file lies in the run folder until training ends, so that a run that was killed goes on with the very same values.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.families import SplitModel
from offramp.families.network import states_after
from offramp.training.data import Windows, steps_per_epoch
from offramp.training.passes import encoded

if TYPE_CHECKING:
    from offramp.training.config import TrainConfig

_VALUES, _DONE = "states.bin", "states.done"
_SHARE = 0.5  # of the free disk that the file may take


@dataclass
class KeptStates:
    """What a frozen model computes for windows, each once.

    Of a layer behind which other blocks than the model's run, all positions are kept, since these attend to them; of
    others, those from which something is predicted.

    Attributes:
        split: The model.
        windows: All of them, N.
        layers: After which states are wanted.
        whole: Those of which all positions are kept.
        first: Where the states of each window begin, by layer, [N + 1] each.
        values: All states, [M, D].
        done: Which windows have been computed, [N].
    """

    split: SplitModel
    windows: Windows
    layers: Sequence[int]
    whole: Collection[int]
    first: dict[int, Tensor]
    values: Tensor
    done: Tensor

    @classmethod
    def of(
        cls, split: SplitModel, windows: Windows, layers: Sequence[int], config: TrainConfig, folder: Path,
        workers: Any, *, whole: Collection[int] | None = None,
    ) -> KeptStates | None:  # fmt: skip
        """A place for the states of a run, or what an interrupted one has left of it.

        Args:
            split: The model, with what is trained attached.
            windows: Those to train on.
            layers: After which states are wanted.
            config: What is trained.
            folder: Of the run.
            workers: `accelerate.Accelerator`.
            whole: Layers of which all positions are wanted; None: those whose exits have blocks of their own.

        Returns:
            None where it would not help or not be right: the model learns too, prompts stop early, no window is seen
            twice, there are several processes, the encoder's output is wanted as well, or the disk is too full.
        """
        seen = config.steps or (config.tokens or 0) * steps_per_epoch(windows, config.batch_size) // windows.positions
        again = seen > steps_per_epoch(windows, config.batch_size)
        alone = workers.num_processes == 1 and not (split.is_encoder_decoder and split.branches)
        if config.backbone or config.prompt_layer is not None or not again or not alone:
            return None
        whole, counted = split.branches if whole is None else whole, windows.counted[:, 1:].sum(1)
        sizes = [windows.lengths - 1 if layer in whole else counted for layer in layers]
        ends = torch.cat([torch.zeros(1, dtype=torch.long), torch.cat(sizes).cumsum(0)])
        first = {layer: ends[at * len(windows) :][: len(windows) + 1] for at, layer in enumerate(layers)}
        width = split.shape.width
        kind = torch.bfloat16 if config.precision == "bf16" else split.model.dtype
        size = int(ends[-1]) * width
        have = (folder / _VALUES).stat().st_size if (folder / _VALUES).exists() else 0
        if size * kind.itemsize - have > _SHARE * shutil.disk_usage(folder).free:
            return None
        values = torch.from_file(str(folder / _VALUES), shared=True, size=size, dtype=kind)
        done = torch.from_file(str(folder / _DONE), shared=True, size=len(windows), dtype=torch.uint8)
        return cls(split, windows, layers, whole, first, values.view(-1, width), done)

    def read(self, part: Windows) -> tuple[list[Tensor], Tensor]:
        """States from which counted tokens are predicted, and these tokens, as `states_of` has them.

        Args:
            part: Some of the windows, in each of which fewer positions may count.

        Returns:
            One [n, D] per layer, and labels [n].
        """
        self._require(part)
        device, where = self.split.device, part.counted[:, 1:]
        return [self._read(layer, part, where).to(device) for layer in self.layers], part.ids[:, 1:][where].to(device)

    def at_all(self, layer: int, part: Windows) -> Tensor:
        """States after a layer at all positions of some of the windows, 0 behind their ends, [B, T, D]."""
        self._require(part)
        padded = torch.nn.utils.rnn.pad_sequence(self._pieces(layer, part), batch_first=True)
        return padded.to(self.split.device, self.split.model.dtype)

    def _require(self, part: Windows) -> None:
        """Compute what is missing."""
        assert part.rows is not None
        if len(missing := part.rows[self.done[part.rows] == 0]):
            self._compute(missing)

    def _pieces(self, layer: int, part: Windows) -> list[Tensor]:
        assert part.rows is not None
        return [self.values[self.first[layer][row] : self.first[layer][row + 1]] for row in part.rows.tolist()]

    def _read(self, layer: int, part: Windows, where: Tensor) -> Tensor:
        if layer not in self.whole:
            all_ = self.windows.counted[part.rows, 1:]  # of which some may count this time
            pieces = torch.cat(self._pieces(layer, part))
            return pieces[_wider(where, all_.shape[1])[all_]].to(self.split.model.dtype)
        hidden = self.at_all(layer, part)
        return self.split.branch_of(layer, hidden)[_wider(where, hidden.shape[1]).to(self.split.device)]

    @torch.no_grad()
    def _compute(self, rows: Tensor) -> None:
        whole, split = self.windows[rows], self.split
        found = states_after(split, whole.ids[:, :-1].to(split.device), self.layers, *encoded(split, whole))
        for layer, states in zip(self.layers, found, strict=True):
            for row, hidden, counted in zip(rows.tolist(), states.cpu(), whole.counted[:, 1:], strict=True):
                first, last = self.first[layer][row : row + 2].tolist()
                kept = hidden[: last - first] if layer in self.whole else hidden[counted]
                self.values[first:last] = kept.to(self.values.dtype)
        self.done[rows] = 1  # behind the values: what a killed run leaves half-written is computed again


def _wider(where: Tensor, width: int) -> Tensor:
    return F.pad(where, (0, width - where.shape[1]))


def states_at_all(split: SplitModel, windows: Windows, kept: KeptStates | None) -> Tensor:
    """States after the last layer at all positions of windows, kept ones where they are of them, [B, T, D]."""
    if kept is not None and windows.rows is not None:
        return kept.at_all(split.num_layers, windows)
    return states_after(split, windows.ids[:, :-1].to(split.device), (split.num_layers,))[0]


def forget(folder: Path) -> None:
    """Remove the file of a run that has ended."""
    for name in (_VALUES, _DONE):
        (folder / name).unlink(missing_ok=True)

"""What a frozen network makes of rows: kept where memory allows, else made anew for every batch that is asked for.

Maps after a ResNet's first stage take 0.8 MB a row at 224 pixels: no machine keeps those of CelebA's training split.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offramp.classifiers.batches import Rows, by_length
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.distillation import networks
from offramp.families.backbone import Activations, Inputs, evaluating

CHUNK = 256
"""Rows at once where nothing is learnt."""


class States:
    """Rows of states, by place; the network must not change as long as they are used.

    They are kept if all of them take at most `offramp.distillation.networks.MEMORY` bytes. Kept or not, they are the
    same up to rounding.

    Args:
        network: Whose blocks they pass, in evaluation mode and without gradients.
        rows: N, looked at without augmentation.
        depth: After how many blocks.
        pool: From activations that are no maps to vectors [B, D]; maps stay what they are.
        precision: "bf16": compute in bfloat16; None: as the network is.

    Attributes:
        shape: [N, ...].
        kept: All of them; None: there are too many.
    """

    def __init__(
        self,
        network: EarlyExitClassifier,
        rows: Rows,
        depth: int,
        pool: Callable[[Activations], Tensor],
        precision: str | None = None,
    ) -> None:
        self.network, self.rows, self.depth, self.pool, self.precision = network, rows, depth, pool, precision
        parts = by_length(rows, CHUNK)
        first = self._made(parts[0])
        self.shape = torch.Size((len(rows.data), *first.shape[1:]))
        self.kept: Tensor | None = None
        if self.shape.numel() * first.element_size() <= networks.MEMORY:
            last = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if last else torch.contiguous_format
            self.kept = torch.empty(self.shape, dtype=first.dtype, device=first.device, memory_format=layout)
            for places in parts:
                self.kept[places] = first if places is parts[0] else self._made(places)

    def __len__(self) -> int:
        """N."""
        return self.shape[0]

    def __getitem__(self, places: Tensor) -> Tensor:
        """States of the rows at these places, [B, ...], where the network is."""
        return self._made(places) if self.kept is None else self.kept[places]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.network.device

    @torch.no_grad()
    def _made(self, places: Tensor) -> Tensor:
        given: Inputs = self.rows.inputs(places)
        backbone = self.network.backbone
        named = {backbone.main_input: given} if isinstance(given, Tensor) else given
        with evaluating(self.network, self.precision):
            state = backbone.run(backbone.start(named), 0, self.depth)
            return (state.hidden if state.hidden.ndim == 4 else self.pool(state)).float()

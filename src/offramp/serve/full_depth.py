"""What the full model spends on an answer."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.families.sizes import ModelShape


class FullDepth:
    """`ModelShape.generation_flops` for answers of any length at once: sums over positions are made beforehand.

    Args:
        shape: The model.
        longest: Most tokens of a prompt and its answer together.
    """

    def __init__(self, shape: ModelShape, longest: int) -> None:
        self._shape, self._layers = shape, range(len(shape.blocks))
        each = (sum(shape.block_flops(layer, 1, start, 0) for layer in self._layers) for start in range(longest))
        self._sums = list(accumulate(each, initial=0))

    def flops(self, prompt: int, new: int, cached: int = 0) -> int:
        """FLOPs of a prompt of so many tokens and so many new ones, the last of which is not read.

        Args:
            prompt: Tokens.
            new: New ones.
            cached: Of the prompt's, those that need not be computed.

        Returns:
            FLOPs.
        """
        if not new:
            return 0
        blocks = sum(self._shape.block_flops(layer, prompt - cached, cached, 0) for layer in self._layers)
        behind = self._sums[prompt + new - 1] - self._sums[prompt]
        return blocks + behind + new * self._shape.readout_flops()

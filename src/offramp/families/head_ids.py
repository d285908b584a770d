"""Rows of the head that are read where they lie."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class HeadIds(NamedTuple):
    """Tokens [A, K], or [K] for all states alike, whose rows of the head are read where they lie, without a copy."""

    ids: Tensor

    def select(self, index: Any) -> HeadIds:
        """The tokens of some batch rows only."""
        return HeadIds(self.ids[index])

    def only(self, scored: Tensor) -> HeadIds:
        """Without the tokens that are not `scored`, bool [A, K]; their logits are -inf."""
        return HeadIds(self.ids.masked_fill(~scored, -1))

    def columns(self, index: Tensor) -> HeadIds:
        """Some of each batch row's tokens, `index` [A, K'] into its K."""
        return HeadIds(self.ids.gather(1, index) if self.ids.ndim == 2 else self.ids[index])

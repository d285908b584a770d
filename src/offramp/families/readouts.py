"""What a readout says in short, the two best tokens and the normaliser, and the rows of the head that it reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Best(NamedTuple):
    """What a readout of A states says.

    Attributes:
        values: The two largest logits of each, best first, [A, 2]; -inf where there is no second one.
        tokens: Whose they are, [A, 2]; of equal logits the lowest token comes first; -1 for none.
        normaliser: The logsumexp of all that were read, [A]; NaN or infinite if a logit is NaN or +inf.
        logits: All that were read, [A, V] or [A, K], if asked for.
        inputs: What the head read, [A, D], if asked for.
    """

    values: Tensor
    tokens: Tensor
    normaliser: Tensor
    logits: Tensor | None = None
    inputs: Tensor | None = None

    @property
    def probabilities(self) -> Tensor:
        """Those of the two, [A, 2]."""
        return (self.values - self.normaliser[:, None]).exp()

    @property
    def gap(self) -> Tensor:
        """Difference of these, [A]."""
        p = self.probabilities
        return p[:, 0] - p[:, 1]

    @property
    def sound(self) -> Tensor:
        """States whose best token was chosen by a number, bool [A]."""
        return self.normaliser.isfinite()


def best_of(logits: Tensor, ids: Tensor | None = None) -> Best:
    """The same from logits, float32, -inf where masked: [A, V], or [A, K] of `ids` [A, K], or [K] if ascending."""
    values, columns = logits.topk(min(2, logits.shape[1]), dim=-1)
    if ids is None or ids.ndim == 1:  # `topk` does not say which of equal ones comes first
        columns = torch.cat([logits.argmax(-1, keepdim=True), columns[:, 1:]], dim=1)
    tokens = columns if ids is None else ids[columns] if ids.ndim == 1 else ids.gather(1, columns)
    return Best(values, tokens, logits.logsumexp(-1), logits)


def ranked(logits: Tensor, count: int, skip: Tensor) -> Tensor:
    """The tokens of the largest of logits [A, V], best first, [A, count]; none of `skip`, [P]."""
    return logits.index_fill(1, skip, -torch.inf).topk(count, dim=-1).indices


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

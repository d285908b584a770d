"""The few tokens that an uncertain readout is about: the best of those scored, and all others as one rest."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Shortlist(NamedTuple):
    """Candidates S of A rows, best first, and what stands behind them.

    Attributes:
        ids: Token ids, [A, k].
        logits: Theirs, [A, k]; -inf for tokens that were not scored.
        rest: ln of the sum of exp(logit) over all other scored tokens, [A]; -inf if there are none.
    """

    ids: Tensor
    logits: Tensor
    rest: Tensor

    def select(self, rows: Tensor | slice) -> Shortlist:
        """Some of the rows."""
        return Shortlist(self.ids[rows], self.logits[rows], self.rest[rows])


def shortlist(logits: Tensor, size: int, ids: Tensor | None = None) -> Shortlist:
    """The best tokens of logits, as candidates.

    Args:
        logits: Of all tokens, [A, V], or of kept ones, [A, K].
        size: k; fewer if fewer are scored.
        ids: Token ids of the columns, [A, K]; None: their numbers.

    Returns:
        Candidates and rest, in the logits' number format.
    """
    best, columns = logits.topk(min(size, logits.shape[1]), dim=-1)
    rest = logits.scatter(1, columns, -float("inf")).logsumexp(-1)
    return Shortlist(columns if ids is None else ids.gather(1, columns), best, rest)

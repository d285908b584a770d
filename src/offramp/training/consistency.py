"""What a consistency classifier is trained for: to tell where an exit's choice is the last layer's (CALM's classifier).

The classifier (`Exits.classify`) is trained after everything else, with model and lenses frozen (Schuster et al. 2022,
arXiv 2207.07061, section 3.3): per exit, a binary cross-entropy between its logit and whether the exit agrees.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TARGETS = ("agree", "settled")
"""agree: the exit's choice is the last layer's (CALM, FREE). settled: and so is that of every deeper exit."""


def consistency_targets(choices: Tensor, kind: str = "agree") -> Tensor:
    """Whether leaving at an exit was right, at N positions.

    Args:
        choices: The most probable tokens at E exits, ascending, and, as the last row, after layer L; [E + 1, N].
        kind: One of `TARGETS`.

    Returns:
        bool [E, N]; with "settled" non-decreasing along the exits.

    Raises:
        ValueError: There is no such kind.
    """
    if kind not in TARGETS:
        raise ValueError(f"the target is {kind!r}; allowed are {', '.join(TARGETS)}")
    agree = choices[:-1] == choices[-1]
    if kind == "agree":
        return agree
    return agree.flip(0).long().cumprod(0).flip(0).bool()


def consistency_loss(logits: Tensor, agrees: Tensor, balance: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of one exit's classifier, weighted so that both classes count the same.

    An exit that agrees nine times out of ten would else learn little more than to say yes. As in the code of CALM
    (t5x, `contrib/calm`), agreeing positions weigh 1 - balance and the others balance: bounded, unlike 1 / balance, and
    nothing is learnt where one class is missing. The weights' mean is 2 · balance · (1 - balance), not 1.

    Args:
        logits: Of the classifier, [N].
        agrees: Its targets, bool [N].
        balance: Share of agreeing positions of this exit in [0, 1], a scalar [] that should be the same for all chunks
            of a batch; None: every position weighs 1.

    Returns:
        Losses in nats, float32 [N].
    """
    losses = F.binary_cross_entropy_with_logits(logits.float(), agrees.float(), reduction="none")
    return losses if balance is None else losses * torch.where(agrees, 1 - balance, balance)

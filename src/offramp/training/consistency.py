"""What a consistency classifier is trained for: to tell where an exit's choice is the last layer's (CALM's classifier).

The classifier (`Exits.classify`) is trained after everything else, with model and lenses frozen (Schuster et al. 2022,
arXiv 2207.07061, section 3.3): per exit, a binary cross-entropy between its logit and whether the exit agrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.training.objectives import choices as chosen
from offramp.training.tally import Tally

if TYPE_CHECKING:
    from offramp.exits import Exits
    from offramp.families import SplitModel

OBJECTIVES = {"consistency": "agree", "consistency-settled": "settled"}
"""Objectives that train classifiers, and the targets they have."""
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


def tally_classifiers(
    split: SplitModel,
    exits: Exits,
    states: Sequence[Tensor],
    labels: Tensor,
    *,
    rows: int,
    kind: str,
    weights: Sequence[float] | None = None,
    count: int | None = None,
) -> Tally:
    """Losses of all classifiers and how often they are right; with `weights`, also adds their gradient.

    Both classes of an exit are balanced over the N positions given.

    Args:
        split: The model.
        exits: Its exits, with classifiers.
        states: After each exit layer and after layer L, E + 1 of [N, D].
        labels: Next tokens, [N].
        rows: Positions read out at once.
        kind: One of `TARGETS`.
        weights: Of the exits; None: only measure.
        count: What the sums are divided by in the gradient; None: N.

    Returns:
        Sums over the positions: the weighted cross-entropy, and how often the verdict (more likely than not, at even
        priors) is right; for the last layer no loss, and how often its choice is the text's.
    """
    layers = (*exits.layers, split.num_layers)
    with torch.no_grad():
        inputs = []
        for layer, hidden in zip(layers, states, strict=True):
            adapted = exits.adapt(layer, hidden.float()).to(hidden.dtype)
            inputs.append(split.readout_input(adapted))
        choices = torch.stack(
            [torch.cat([chosen(split.project(x)) for x in torch.split(part, rows)]) for part in inputs]
        )
        targets = consistency_targets(choices, kind)
    losses, right = [], []
    for index, layer in enumerate(exits.layers):
        with torch.set_grad_enabled(weights is not None):
            verdicts = exits.classify(layer, inputs[index])
            loss = consistency_loss(verdicts, targets[index], targets[index].float().mean()).sum()
            if weights is not None:
                (loss * (weights[index] / (count or len(labels)))).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach().double())
        right.append(((verdicts > 0) == targets[index]).sum())
    agreed = [*right, (choices[-1] == labels).sum()]
    return Tally(torch.stack([*losses, losses[0].new_zeros(())]), torch.stack(agreed), len(labels))

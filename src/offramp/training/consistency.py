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

from offramp.training.loss_sums import LossSums
from offramp.training.objectives import choices as chosen
from offramp.values import listed

if TYPE_CHECKING:
    from offramp.core.exits import Exits
    from offramp.families import SplitModel

OBJECTIVES = {"consistency": "agree", "consistency-settled": "settled"}
"""Objectives that train classifiers, and the targets they have."""
TARGETS = ("agree", "settled")
"""agree: the exit's choice is the last layer's (CALM, FREE). settled: and so is that of every deeper exit."""
BALANCES = (0.0, 1.0)
"""Of `consistency_loss`, such that it is all of the agreeing positions, and all of the others."""


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
        raise ValueError(f"the target is {kind!r}; allowed are {listed(kind, TARGETS)}")
    agree = choices[:-1] == choices[-1]
    if kind == "agree":
        return agree
    return agree.flip(0).long().cumprod(0).flip(0).bool()


def consistency_loss(logits: Tensor, agrees: Tensor, balance: Tensor | float | None = None) -> Tensor:
    """Binary cross-entropy of one exit's classifier, weighted so that both classes count the same.

    An exit that agrees nine times out of ten would else learn little more than to say yes. As in the code of CALM
    (t5x, `contrib/calm`), agreeing positions weigh 1 - balance and the others balance: bounded, unlike 1 / balance, and
    nothing is learnt where one class is missing. The weights' mean is 2 · balance · (1 - balance), not 1.

    It is linear in the balance: (1 - balance) times what it is at 0, which is all of the agreeing positions, plus
    balance times what it is at 1, all of the others.

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


class ClassGradients:
    """Gradients of classifiers, apart for agreeing and other positions until their shares in a whole step are known.

    Args:
        exits: With classifiers.
        weights: Of the exits.
    """

    def __init__(self, exits: Exits, weights: Sequence[float]) -> None:
        self._exits, self._weights = exits, weights
        self._sums = [[torch.zeros_like(p) for p in self._of(layer) * len(BALANCES)] for layer in exits.layers]

    def _of(self, layer: int) -> list[Tensor]:
        assert self._exits.classifiers is not None
        return list(self._exits.classifiers[str(layer)].parameters())

    def add(self, index: int, losses: Sequence[Tensor]) -> None:
        """Add what the parameters of the exit number `index` get from both classes: one sum [] of losses for each."""
        parameters = self._of(self._exits.layers[index])
        for at, loss in enumerate(losses):
            for place, part in enumerate(torch.autograd.grad(loss, parameters, retain_graph=True)):
                self._sums[index][at * len(parameters) + place] += part

    def settle(self, balances: Tensor, count: int) -> None:
        """Put into the parameters' gradients Σ_e w_e · loss_e / `count`, each exit's classes balanced by its share [E].

        Args:
            balances: Shares of agreeing positions among all positions of the step, [E].
            count: Their number.
        """
        for layer, sums, weight, balance in zip(self._exits.layers, self._sums, self._weights, balances, strict=True):
            parameters = self._of(layer)
            agreeing, others = sums[: len(parameters)], sums[len(parameters) :]
            for parameter, yes, no in zip(parameters, agreeing, others, strict=True):
                whole = (1 - balance) * yes.double() + balance * no.double()  # they cancel out in a first step
                parameter.grad = (whole * (weight / count)).to(parameter.dtype)


def classifier_loss_sums(
    split: SplitModel,
    exits: Exits,
    states: Sequence[Tensor],
    labels: Tensor,
    *,
    rows: int,
    kind: str,
    gradients: ClassGradients | None = None,
) -> LossSums:
    """Losses of all classifiers and how often they are right, apart for both classes (see `balanced`).

    Args:
        split: The model.
        exits: Its exits, with classifiers.
        states: After each exit layer and after layer L, E + 1 of [N, D].
        labels: Next tokens, [N].
        rows: Positions read out at once.
        kind: One of `TARGETS`.
        gradients: Where gradients are added; None: only measure.

    Returns:
        Sums over the positions, each [2E + 1]: cross-entropies of agreeing positions by exit, those of the others, and
        0; how often exits agree, how often the verdict (more likely than not, at even priors) is right, and how often
        the last layer's choice is the text's.
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
        with torch.set_grad_enabled(gradients is not None):
            verdicts = exits.classify(layer, inputs[index])
            both = [consistency_loss(verdicts, targets[index], balance).sum() for balance in BALANCES]
        if gradients is not None:
            gradients.add(index, both)
        losses.append(torch.stack(both).detach().double())
        right.append(((verdicts > 0) == targets[index]).sum())
    agreed = torch.stack([*targets.sum(1), *right, (choices[-1] == labels).sum()])
    sums = torch.stack(losses)  # [E, 2]
    return LossSums(torch.cat([sums.T.flatten(), sums.new_zeros(1)]), agreed, len(labels))


def balanced(parts: LossSums) -> tuple[LossSums, Tensor]:
    """Weigh the classes by their shares in everything that was added up, however it was divided.

    Args:
        parts: A sum of what `classifier_loss_sums` returns.

    Returns:
        Balanced losses, how often verdicts are right, and for the last layer no loss; and the shares of agreeing
        positions, float64 [E].
    """
    exits = len(parts.losses) // len(BALANCES)
    shares = parts.agreed[:exits].double() / max(parts.positions, 1)
    losses = (1 - shares) * parts.losses[:exits] + shares * parts.losses[exits : 2 * exits]
    return LossSums(torch.cat([losses, parts.losses[-1:]]), parts.agreed[exits:], parts.positions), shares

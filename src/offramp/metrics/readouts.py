"""Whether an auxiliary readout has learnt anything, and how many rows its gate takes: else its weights are noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.metrics.group_weights import TOO_FEW
from offramp.metrics.sets import binomial

TOO_MANY = 1 - TOO_FEW
"""Share of gated rows above which a gate tells no rows apart."""


@dataclass(frozen=True)
class ReadoutDiagnostics:
    """A readout of one epoch.

    Attributes:
        accuracy: Share of the training rows, which it was taught on, that it answers rightly.
        chance: What that share would be if its answers, as often as it gives each, had nothing to do with the labels;
            of a constant answer the share of that class.
        batch: Rows of a step of the student, in which its weights act.
        gated: Share of the training rows that its gate takes; None: the gate takes all.
        empty: Whether all of its sets of classes were empty, so that all rows weigh 1; None: there are no sets.
    """

    accuracy: float
    chance: float
    batch: int
    gated: float | None
    empty: bool | None = None

    @property
    def near_chance(self) -> bool:
        """Whether in a batch it could not be told from chance, by Wilson's 95 % interval of so many rows."""
        share = binomial(round(self.accuracy * self.batch), self.batch, method="wilson")
        return bool(share.low <= self.chance)

    @property
    def too_many(self) -> bool:
        """Whether the gate takes nearly all rows, so that weights change the step's size and little else."""
        return self.gated is not None and self.gated > TOO_MANY

    @property
    def flags(self) -> tuple[str, ...]:
        """What is wrong with its weights, in words."""
        found = {"near chance": self.near_chance, "nearly all gated": self.too_many, "sets empty": bool(self.empty)}
        return tuple(words for words, holds in found.items() if holds)


def readout_diagnostics(
    answers: Tensor, labels: Tensor, batch: int, gated: Tensor | None, empty: bool | None = None
) -> ReadoutDiagnostics:  # fmt: skip
    """Look at a readout.

    Args:
        answers: Its classes for the N training rows, [N], int64.
        labels: [N], int64.
        batch: Rows of a step of the student.
        gated: Whether its gate takes a row, [N], bool; None: all.
        empty: Whether all of its sets were empty; None: there are none.

    Returns:
        The diagnostics.
    """
    classes = int(torch.maximum(answers.max(), labels.max())) + 1
    said, true = (torch.bincount(each, minlength=classes).double() / len(labels) for each in (answers, labels))
    share = None if gated is None else float(gated.double().mean())
    return ReadoutDiagnostics(float((answers == labels).double().mean()), float(said @ true), batch, share, empty)

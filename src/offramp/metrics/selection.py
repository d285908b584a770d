"""Which epoch a rule chooses, and what group labels were used for: both decide what a worst-group figure means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor, nn

from offramp.metrics.groups import Groups
from offramp.values import choice


@dataclass(frozen=True)
class Judged:
    """A model on one split.

    Attributes:
        average: Accuracy.
        loss: Mean cross-entropy, nats.
        worst_class: Accuracy of the worst class that has rows.
        group_mean: Mean of the accuracies of the groups; None: groups unknown.
        worst_group: Accuracy of the worst group; None likewise.
    """

    average: float
    loss: float
    worst_class: float
    group_mean: float | None = None
    worst_group: float | None = None


def judge(logits: Tensor, labels: Tensor, groups: Groups | None = None, *, split: str) -> Judged:
    """The numbers that rules select by.

    Args:
        logits: [N, C].
        labels: [N].
        groups: Of the rows; None: unknown, so that rules that need them cannot be applied.
        split: Its name, for messages.

    Returns:
        The numbers.

    Raises:
        ValueError: There are no rows, or a group has none.
    """
    if not len(labels):
        raise ValueError(f"split {split!r} has no rows; selection needs some")
    right = (logits.argmax(-1) == labels).double()
    loss = float(nn.functional.cross_entropy(logits.double(), labels))
    worst_class = min(float(right[labels == c].mean()) for c in labels.bincount().nonzero().flatten().tolist())
    if groups is None:
        return Judged(float(right.mean()), loss, worst_class)
    groups.require_rows(split)
    of_groups = (right @ groups.members.double()) / groups.counts
    return Judged(float(right.mean()), loss, worst_class, float(of_groups.mean()), float(of_groups.min()))


@dataclass(frozen=True)
class Epoch:
    """What a run recorded after an epoch.

    Attributes:
        number: Of the epoch.
        val: On validation rows.
        test: On test rows, for the report alone; None: not judged.
    """

    number: int
    val: Judged
    test: Judged | None = None


RULES: Mapping[str, Callable[[Epoch], float | None]] = MappingProxyType(
    {
        "last": lambda epoch: epoch.number,
        "val_average": lambda epoch: epoch.val.average,
        "val_worst_class": lambda epoch: epoch.val.worst_class,
        "val_group_mean": lambda epoch: epoch.val.group_mean,
        "val_worst_group": lambda epoch: epoch.val.worst_group,
        "val_loss": lambda epoch: -epoch.val.loss,
    }
)
"""What is to be largest, by name; of several such epochs the one with the best average, of those the first."""
WITH_GROUPS = ("val_group_mean", "val_worst_group")
"""Rules that use group labels of validation rows."""


def select(history: Sequence[Epoch], rule: str) -> Epoch:
    """The epoch of a run that a rule of `RULES` chooses; a ValueError if it needs groups that are not known."""
    choice("the selection rule", rule, RULES)
    if not history:
        raise ValueError("the run has recorded no epoch; train at least one before selecting")
    values = [RULES[rule](epoch) for epoch in history]
    if any(value is None for value in values):
        known = ", ".join(name for name in RULES if name not in WITH_GROUPS)
        raise ValueError(f"the rule {rule} needs groups of validation rows; give them, or select by one of {known}")
    return history[max(range(len(values)), key=lambda i: (values[i], history[i].val.average, -i))]


def choices(history: Sequence[Epoch]) -> dict[str, Epoch]:
    """What each rule would have chosen from this run, by rule; those that lack groups are left out."""
    known = all(epoch.val.worst_group is not None for epoch in history)
    return {rule: select(history, rule) for rule in RULES if known or rule not in WITH_GROUPS}


USES = ("teacher training", "student training", "weights", "selection", "calibration", "reporting")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class LabelBudget:
    """How many group labels were used, for what and of which split.

    Attributes:
        used: Counts by (use, split), such as ("selection", "val"); what is missing is 0, and None is unknown.

    Raises:
        ValueError: A use, a split or a count that there cannot be.
    """

    used: Mapping[tuple[str, str], int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for (use, split), count in self.used.items():
            choice("the use", use, USES)
            choice("the split", split, SPLITS)
            if count is not None and count < 0:
                raise ValueError(f"{use} is to have used {count} group labels of {split}; a count from 0 on is needed")

    def plus(self, use: str, split: str, count: int | None) -> LabelBudget:
        """With labels used for something more; what was used for it before stays, and an unknown count unknown."""
        before = self.used.get((use, split), 0)
        return LabelBudget({**self.used, (use, split): None if before is None or count is None else before + count})

    @property
    def label_free(self) -> bool | None:
        """Whether group labels served for nothing but the report; None: they did as far as is known."""
        counts = [count for (use, _), count in self.used.items() if use != "reporting"]
        return False if any(counts) else None if None in counts else True

    def line(self) -> str:
        """One sentence for under a table."""
        said = []
        for use in USES:
            of_use = {split: self.used.get((use, split), 0) for split in SPLITS}
            counts = [f"{split} {count:,}" for split, count in of_use.items() if count]
            said.append(f"{use} {'unknown' if None in of_use.values() else ' and '.join(counts) or 'none'}")
        free = {True: "label-free", False: "not label-free", None: "label-free as far as is known"}[self.label_free]
        return f"Group labels used ({free}): {'; '.join(said)}."

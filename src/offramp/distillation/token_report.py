"""What the distillation of a language model came to, for all tokens and for each group of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.metrics.group_effects import TOO_FEW
from offramp.metrics.selection import LabelBudget
from offramp.runs.folder import TrainState
from offramp.runs.results import Result
from offramp.runs.tables import Table, cell

SCHEMA = "offramp/distill-language-model/1"


@dataclass(frozen=True)
class TokenNumbers:
    """Held-out tokens of one group, or of all; means.

    Attributes:
        name: Name of the group.
        tokens: How many.
        kd_before: Divergence from the teacher times T², in nats, before training.
        kd: Likewise, after.
        ce_before: Cross-entropy to the text, in nats, before training.
        ce: Likewise, after.
        agreement_before: Share of tokens at which student and teacher choose the same, before training.
        agreement: Likewise, after.
        accuracy_before: Share of tokens at which the student chooses the text's, before training.
        accuracy: Likewise, after.
        weight: Mean weight of the group's training tokens, over all readouts; None: unweighted.
    """

    name: str
    tokens: int
    kd_before: float
    kd: float
    ce_before: float
    ce: float
    agreement_before: float
    agreement: float
    accuracy_before: float
    accuracy: float
    weight: float | None = None


@dataclass(frozen=True)
class TokenDistillResult(Result):
    """What distillation did.

    Attributes:
        overall: All held-out tokens.
        groups: Those of each group; none if groups are unknown.
        reweighted: Share of training tokens that weighed more than the lightest at the last readout; None: unweighted,
            or all alike on purpose.
        steps: Steps made, those before an interruption included.
        tokens: Tokens trained on.
        seconds: Time the steps took.
        model: Folder of the student.
        shortened: Documents that were longer than the window, of those in use in the end.
    """

    schema = SCHEMA

    overall: TokenNumbers
    groups: tuple[TokenNumbers, ...]
    reweighted: float | None
    steps: int
    tokens: int
    seconds: float
    model: Path
    shortened: int = 0

    def __repr__(self) -> str:
        all_ = self.overall
        return (
            f"TokenDistillResult(agreement with the teacher {all_.agreement_before:.3f} -> {all_.agreement:.3f} on "
            f"{all_.tokens} held-out tokens, {len(self.groups)} groups, {self.steps} steps, {str(self.model)!r})"
        )

    def _rows(self) -> Iterable[Any]:
        """A row for all held-out tokens and one per group, as `TokenNumbers` has them."""
        return [self.overall, *self.groups]

    @property
    def worst(self) -> TokenNumbers | None:
        """The group that agrees least with the teacher."""
        return min(self.groups, key=lambda group: group.agreement, default=None)

    def by_group(self) -> Table:
        """All held-out tokens, then those of each group, before -> after."""
        head = ["group", "tokens", "divergence (nats)", "text (nats)", "agreement", "right", "weight"]
        worst, rows = self.worst, []
        for each in (self.overall, *self.groups):
            pairs = (
                (each.kd_before, each.kd), (each.ce_before, each.ce), (each.agreement_before, each.agreement),
                (each.accuracy_before, each.accuracy),
            )  # fmt: skip
            changes = [f"{before:.3f} -> {after:.3f}" for before, after in pairs]
            weight = "" if each.weight is None else f"{each.weight:.2f}"
            said = [] if worst is None else ["worst" if each is worst else ""]
            rows.append([each.name, f"{each.tokens:,}", *changes, weight, *said])
        notes = _too_few(self.reweighted)
        if self.shortened:
            cut = f"{self.shortened} documents were cut to the window: prompts lose their beginning, answers their end."
            notes = (*notes, cut)
        return Table([*head, *([""] if worst else [])], rows, "Every group", notes)

    def table(self) -> str:
        """A small table."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        apart = "Divergences are at the method's own temperature, times its square: compare those of one temperature."
        return f"{self.by_group()}\n{apart}\n\n{self.steps} steps on {self.tokens} tokens, {rate:.0f} per second"


def summary(
    rows: Sequence[Mapping[str, Any]], groups: Sequence[str], clock: TrainState, model: Path
) -> TokenDistillResult:
    """The result, from the lines of metrics.jsonl and from where the run ended."""
    judged = [row for row in rows if row["kind"] == "validation"]
    weighted = [row for row in rows if row["kind"] == "weights"]
    before, after = judged[0], judged[-1]
    names = ("kd", "ce", "agreement", "accuracy")

    def both(pick: Any) -> dict[str, float]:
        values = {f"{name}_before": pick(before, name) for name in names}
        return values | {name: pick(after, name) for name in names}

    mean = sum(row["mean"] for row in weighted) / len(weighted) if weighted else None
    whole = TokenNumbers("all", after["positions"], **both(lambda row, name: row[name]), weight=mean)
    parts = []
    for place, group in enumerate(groups):
        mean = sum(row["weight"][place] for row in weighted) / len(weighted) if weighted else None
        values = both(lambda row, name: row[f"group_{name}"][place])  # noqa: B023
        parts.append(TokenNumbers(group, after["group_tokens"][place], **values, weight=mean))
    last = weighted[-1]["reweighted"] if weighted else None
    cut = after.get("shortened", 0)
    return TokenDistillResult(whole, tuple(parts), last, clock.step, clock.tokens, clock.seconds, model, cut)


def readouts_table(rows: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> Table:
    """Weights of training tokens after each readout, of the lines of metrics.jsonl; none if there were none."""
    weighted = [row for row in rows if row["kind"] == "weights"]
    head = ["after step", "reweighted", "mean", "largest", *(f"mean: {group}" for group in groups)]
    few = any(_too_few(row["reweighted"]) for row in weighted)
    cells = [
        [
            f"{row['step']}", cell(row["reweighted"], ".1%"), f"{row['mean']:.2f}",
            f"{row['largest']:.2f}", *(f"{mean:.2f}" for mean in row.get("weight", ())),
            *(["too few" if _too_few(row["reweighted"]) else ""] if few else []),
        ] for row in weighted
    ]  # fmt: skip
    notes = _too_few(weighted[-1]["reweighted"]) if weighted else ()
    return Table([*head, *([""] if few else [])], cells, "Weights after each readout", notes)


def labels_used(rows: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> LabelBudget:
    """The account of a run, in tokens, each of which has the group of its prompt; held-out ones stand under "test".

    Groups never reach the loss, the weights or the choice of a student, which is that of the last step.

    Args:
        rows: The lines of metrics.jsonl, the judgement before training at least.
        groups: Names; none: unknown.

    Returns:
        Counts of labels by use and split; None for the teacher, of which nothing is known, and for training tokens of a
        run by an older version.
    """
    budget = LabelBudget().plus("teacher training", "train", None)
    if not groups:
        return budget
    judged = [row for row in rows if row["kind"] == "validation"]
    budget = budget.plus("reporting", "test", sum(judged[-1]["group_tokens"]))
    weighted = [row for row in rows if row["kind"] == "weights"]
    if not weighted:  # then nothing is said of training tokens
        return budget
    counts = weighted[-1].get("group_tokens")
    return budget.plus("reporting", "train", None if counts is None else sum(counts))


def _too_few(reweighted: float | None) -> tuple[str, ...]:
    """What to say of weights that touch next to nothing."""
    if reweighted is None or reweighted >= TOO_FEW:
        return ()
    return (
        f"Only {reweighted:.1%} of the tokens were reweighted: the readout has hardly an error left; choose an earlier "
        "layer.",
    )

"""What the distillation of a language model came to, for all tokens and for each group of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offramp.metrics.group_weights import TOO_FEW
from offramp.tables import markdown
from offramp.training.run_folder import Clock

SCHEMA = "offramp/distill-language-model/1"


@dataclass(frozen=True)
class TokenNumbers:
    """Held-out tokens of one group, or of all; means.

    Attributes:
        name: Of the group.
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
class TokenDistillResult:
    """What distillation did.

    Attributes:
        overall: All held-out tokens.
        groups: Those of each group; none if groups are unknown.
        reweighted: Share of training tokens that weighed more than the lightest at the last readout; None: unweighted.
        steps: Steps made, those before an interruption included.
        tokens: Tokens trained on.
        seconds: Time the steps took.
        model: Folder of the student.
        shortened: Documents that were longer than the window, of those in use in the end.
    """

    overall: TokenNumbers
    groups: tuple[TokenNumbers, ...]
    reweighted: float | None
    steps: int
    tokens: int
    seconds: float
    model: Path
    shortened: int = 0

    @property
    def worst(self) -> TokenNumbers | None:
        """The group that agrees least with the teacher."""
        return min(self.groups, key=lambda group: group.agreement, default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"schema": SCHEMA, **asdict(self), "model": str(self.model)}

    def table(self) -> str:
        """A small table."""
        head = ["group", "tokens", "divergence (nats)", "text (nats)", "agreement", "right", "weight"]
        rows = []
        for each in (self.overall, *self.groups):
            pairs = (
                (each.kd_before, each.kd), (each.ce_before, each.ce), (each.agreement_before, each.agreement),
                (each.accuracy_before, each.accuracy),
            )  # fmt: skip
            changes = [f"{before:.3f} -> {after:.3f}" for before, after in pairs]
            rows.append([each.name, str(each.tokens), *changes, "" if each.weight is None else f"{each.weight:.2f}"])
        lines = [markdown(head, rows)]
        if self.reweighted is not None and self.reweighted < TOO_FEW:
            lines.append(
                f"only {self.reweighted:.1%} of the tokens were reweighted: the readout has hardly an error left; "
                "choose an earlier layer"
            )
        if self.shortened:
            lines.append(
                f"{self.shortened} documents were cut to the window: prompts lose their beginning, answers their end"
            )
        rate = self.tokens / self.seconds if self.seconds else 0.0
        lines.append(f"{self.steps} steps on {self.tokens} tokens, {rate:.0f} per second")
        return "\n".join(lines)


def summary(rows: Sequence[Mapping[str, Any]], groups: Sequence[str], clock: Clock, model: Path) -> TokenDistillResult:
    """The result, from the lines of metrics.jsonl.

    Args:
        rows: The lines.
        groups: Names.
        clock: Where the run ended.
        model: Folder of the student.

    Returns:
        The result.
    """
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

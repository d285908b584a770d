"""What an evaluation found: every arm beside the full model, the Pareto front, tables and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from offramp.evaluation.arms import FULL
from offramp.evaluation.summary import PERPLEXITY, ArmSummary
from offramp.evaluation.verdict import GOOD, Finding, findings, sentences
from offramp.metrics.bootstrap import Interval
from offramp.risk.control import pareto_front
from offramp.runs.codec import encode
from offramp.runs.results import Result
from offramp.runs.tables import Table

SCHEMA = "offramp/evaluate/1"
COSTS = ("flops_ratio", "flops_per_token_ratio", "seconds_ratio")
"""Costs that Pareto fronts are drawn over."""
COLUMNS = {
    "flops_ratio": "FLOPs", "flops_per_token_ratio": "FLOPs/token",
    "own_flops_per_token_ratio": "FLOPs/token, own prompt", "bytes_ratio": "bytes", "seconds_ratio": "seconds",
    "seconds_per_token_ratio": "seconds/token", "own_seconds_per_token_ratio": "seconds/token, own prompt",
}  # fmt: skip
"""Columns of the table of costs, by the ratio of `ArmSummary`; those of the own prompt only where one is shortened."""


@dataclass(frozen=True)
class Evaluation(Result):
    """The outcome of `offramp.evaluation.evaluate`.

    Attributes:
        conditions: What was held fixed, and versions.
        metric: The main metric, a key of `ArmSummary.quality`.
        num_layers: L.
        arms: Summaries, the full model first.
    """

    schema, noun = SCHEMA, "evaluation's result"

    conditions: dict[str, Any]
    metric: str
    num_layers: int
    arms: list[ArmSummary]

    def __repr__(self) -> str:
        said = self.conditions
        return (
            f"Evaluation({said.get('model')} at {said.get('task')}, {said.get('examples')} examples, {self.metric} of "
            f"{len(self.arms)} arms: {', '.join(arm.name for arm in self.arms)})"
        )

    def _rows(self) -> Iterable[Any]:
        """A row per arm, as `ArmSummary` has them; `offramp.evaluation.records_of` has what each arm answered."""
        return self.arms

    def arm(self, name: str) -> ArmSummary:
        """The summary of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def loss(self, arm: ArmSummary) -> float:
        """The main metric such that less is better."""
        value = arm.quality[self.metric].value
        return value if self.metric == PERPLEXITY else -value

    def front(self, cost: str = "flops_ratio") -> list[str]:
        """Arms, of those with a cost, that no other one beats in the main metric without costing more; cheapest first.

        By the estimates, whatever their intervals. Costs are "flops_ratio" and the other ratios of `ArmSummary`.

        Returns:
            Names.
        """
        arms = [arm for arm in self.arms if getattr(arm, cost) is not None]
        costs = [getattr(arm, cost).value for arm in arms]
        return [arms[i].name for i in pareto_front([self.loss(arm) for arm in arms], costs)][::-1] if arms else []

    def ahead(self, cost: str = "flops_ratio") -> list[str]:
        """Policies that neither the full model nor a static exit here matches: as good, by the estimates, for less."""

        def matched(arm: ArmSummary) -> bool:
            mine, price = self.loss(arm), getattr(arm, cost).value
            return any(self.loss(a) <= mine and getattr(a, cost).value <= price for a in known if a.is_static)

        known = [arm for arm in self.arms if getattr(arm, cost) is not None]
        return [arm.name for arm in known if not arm.is_static and not matched(arm)]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with what follows from them."""
        return {
            **super().to_dict(),
            "front": {cost: self.front(cost) for cost in COSTS},
            "ahead_of_static": {cost: self.ahead(cost) for cost in COSTS},
            "findings": encode(self.findings()),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; arms of an earlier version took no turns, so that their seconds do not compare."""
        arms = [
            arm if "seconds_per_token_ratio" in arm else {**arm, "seconds_ratio": None}
            for arm in values.get("arms", ())
        ]
        return super().from_dict({**values, "arms": arms})

    # ------------------------------------------------------------ tables

    def table(self) -> str:
        """Tables for a terminal that are Markdown as well: quality, costs, and what to make of them."""
        said = {key: value for key, value in self.conditions.items() if key not in ("command", "unread")}
        conditions = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in said.items())
        blocks = [
            str(self.quality_table()),
            str(self.cost_table()),
            *(f"{line}." for line in [self.reading(), *self.verdict()]),
        ]
        return "\n\n".join([*blocks, f"Conditions: {conditions}."])

    def quality_table(self) -> Table:
        """What each arm answers: the head, and a row per arm."""
        others = [name for name in self.arms[0].quality if name != self.metric]
        pruned = any(arm.outside for arm in self.arms)
        head = [
            f"{self.metric} (interval)", "minus the full model's", *others, "same tokens", "identical", "tokens",
            *(["outside"] if pruned else []),
        ]  # fmt: skip
        rows = [
            [
                arm.name, quality_cell(arm.quality[self.metric], self.metric),
                "" if arm.name == FULL else quality_cell(arm.difference[self.metric], self.metric, "+"),
                *(_point(arm.quality[name].value, name) for name in others), f"{arm.agreement.value:.0%}",
                f"{arm.identical.value:.0%}", f"{arm.length.value:.1f}", *([f"{arm.outside:.1%}"] if pruned else []),
            ]
            for arm in self.arms
        ]  # fmt: skip
        return Table(["quality", *head], rows)

    def cost_table(self) -> Table:
        """What each arm costs: the head, and a row per arm."""
        front = set(self.front())
        shown = {name: column for name, column in COLUMNS.items() if not name.startswith("own") or self._has(name)}
        head = ["cost (× full model)", "exit layer", *shown.values(), "front"]
        rows = [
            [
                arm.name, f"{arm.exit_layer.value:.1f}", *(ratio_cell(getattr(arm, name)) for name in shown),
                "*" if arm.name in front else "",
            ]
            for arm in self.arms
        ]  # fmt: skip
        return Table(head, rows)

    def _has(self, cost: str) -> bool:
        return any(getattr(arm, cost) is not None for arm in self.arms)

    def findings(self) -> list[Finding]:
        """What is to be said of each policy (`offramp.evaluation.verdict`)."""
        return findings(self)

    def recommended(self) -> list[str]:
        """Policies that the intervals show to be near the full model for less; they still need a promise."""
        return [found.arm for found in self.findings() if found.reason == GOOD]

    def reading(self) -> str:
        """How to read the tables: a sentence without its full stop."""
        percent = f"{self.conditions.get('level', 0.95):.0%}"
        scale = "" if self.metric == PERPLEXITY else "; scores in points of 100"
        apart = any(arm.seconds_ratio is None for arm in self.arms)
        own = "; own prompt: over the same shortened prompt without any exits instead"
        own = own if self._has("own_flops_per_token_ratio") else ""
        dash = "; –: arms that did not take turns with the full model, whose seconds do not compare" if apart else ""
        return (
            f"In brackets {percent} intervals, over groups of examples{scale}; × full model: over the same weights run "
            "at full depth, without any exit; /token: per generated token, without encoder and prompt, so that neither "
            f"the prompt's length nor the answer's counts{own}{dash}; * on the Pareto front of {self.metric} over "
            "FLOPs, by the estimates"
        )

    def verdict(self) -> list[str]:
        """What to make of the tables: sentences without their full stops."""
        unread = self.conditions.get("unread", {})
        return [
            *(
                f"{name} cannot read the references of {count} of {self.conditions['examples']} examples: they do not "
                "even match themselves, and no answer is told from another there; go by another metric"
                for name, count in unread.items()
            ),
            *sentences(self, self.findings()),
        ]


def _point(value: float, name: str, sign: str = "") -> str:
    """Scores in points of 100; perplexities, and corpus scores, as they are."""
    scale = 1 if name == PERPLEXITY or name.endswith("(corpus)") else 100
    return f"{value * scale:{sign}.{2 if name == PERPLEXITY else 1}f}"


def quality_cell(interval: Interval, name: str, sign: str = "") -> str:
    """A score with its interval; `sign` is "+" for differences."""
    value = _point(interval.value, name, sign)
    if interval.low is None or interval.high is None:
        return value
    return f"{value} ({_point(interval.low, name, sign)} to {_point(interval.high, name, sign)})"


def ratio_cell(interval: Interval | None) -> str:
    """A ratio with its interval; a dash where it is not known, or does not compare."""
    if interval is None:
        return "–"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f} ({interval.low:.3f}–{interval.high:.3f})"

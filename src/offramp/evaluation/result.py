"""What an evaluation found: every arm beside the full model, the Pareto front, tables, JSON, and what that shows.

Praise is only where an interval supports it. A policy is *near* the full model if even the low end of the interval of
its difference is at most `NEAR` points of 100 below (of perplexity: at most `NEAR` per cent above), from at least
`FEWEST` groups of examples. It is worth a promise if it is near for fewer FLOPs, also per generated token, and not
slower where seconds compare.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from offramp.evaluation.arms import FULL
from offramp.evaluation.perplexity import PERPLEXITY
from offramp.evaluation.summary import ArmSummary
from offramp.metrics.intervals import Interval
from offramp.risk.search import pareto_front
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

NEAR = 2.0
"""Points of 100."""
FEWEST = math.ceil(300 / NEAR)
"""Groups: if none of so many lost everything, fewer than `NEAR` in 100 do (the rule of three, at 95 %)."""
SHOWN = 4
"""Policies named for each reason."""

GOOD = "near for less"
REASONS: Mapping[str, str] = {
    GOOD: "At most {near} the full model's {metric} for less, by the whole interval; calibrate before use",
    "dear": "No FLOPs saved (× the full model's)",
    "unread": "{metric} cannot read all references, so that nothing is shown of",
    "far": "{metric} too far below the full model's",
    "open": "Too few examples to tell whether {metric} is at most {near} the full model's",
    "unsaved": "Too few examples to tell whether FLOPs are saved",
    "prompt": "Prompt or length saves, exits do not: a generated token costs no less than the full model's",
    "slow": "Fewer FLOPs, but no fewer seconds (× the full model's)",
}
"""Headings of the sentences, by finding, in their order."""
NOTHING = "No policy here is shown to be near the full model's answers for less"


@dataclass(frozen=True)
class Finding:
    """What is to be said of one policy: one of `REASONS`, and figures in words."""

    arm: str
    reason: str
    words: str


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
        """One for each policy that is neither static nor the full model."""
        return [_found(self, arm) for arm in self.arms if not arm.is_static]

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
            *_sentences(self, self.findings()),
        ]


# ---------------------------------------------------------------- what it shows


def _sentences(evaluation: Evaluation, found: Sequence[Finding]) -> list[str]:
    """Findings by reason, without full stops; the first says so if nothing can be recommended."""
    if not found:
        return []
    lines = []
    for reason in REASONS:
        some = [f"{each.arm} ({each.words})" for each in found if each.reason == reason]
        more = f"; and {len(some) - SHOWN} more" if len(some) > SHOWN else ""
        if some:
            lines.append(f"{heading(evaluation, reason)}: {'; '.join(some[:SHOWN])}{more}")
    if not any(each.reason == GOOD for each in found):
        lines.insert(0, NOTHING)
    return lines


def heading(evaluation: Evaluation, reason: str) -> str:
    """A heading of `REASONS` about this evaluation's metric."""
    above = evaluation.metric == PERPLEXITY
    near = f"{NEAR:g} {'per cent above' if above else 'points below'}"
    said = REASONS[reason].format(near=near, metric=evaluation.metric)
    return said.replace("below the full", "above the full") if above else said


def _found(evaluation: Evaluation, arm: ArmSummary) -> Finding:
    """The first reason against a policy, or none."""
    quality = _better(evaluation, arm)
    groups = evaluation.conditions.get("groups", evaluation.conditions["examples"])
    flops, token, seconds = arm.flops_ratio, arm.flops_per_token_ratio, arm.seconds_ratio
    said = f"{quality.value:+.1f}{'%' if evaluation.metric == PERPLEXITY else ''}"
    if flops.value >= 1:
        return Finding(arm.name, "dear", f"{flops.value:.3f}")
    if evaluation.conditions.get("unread", {}).get(evaluation.metric):
        return Finding(arm.name, "unread", said)
    if quality.value < -NEAR:
        return Finding(arm.name, "far", said)
    if groups < FEWEST or quality.low is None or quality.low < -NEAR:
        return Finding(arm.name, "open", f"{said}; {_needed(evaluation, quality, groups)}")
    if flops.high is None or flops.high >= 1:
        return Finding(arm.name, "unsaved", f"{flops.value:.3f}")
    if token is not None and token.value >= 1:
        return Finding(arm.name, "prompt", f"{token.value:.3f}; {flops.value:.3f} of all FLOPs")
    if seconds is not None and seconds.value >= 1:
        return Finding(arm.name, "slow", f"{seconds.value:.2f}")
    costs = [f"{flops.value:.3f} of the FLOPs"]
    costs += [] if token is None else [f"{token.value:.3f} per generated token"]
    costs += ["seconds do not compare"] if seconds is None else [f"{seconds.value:.2f} of the seconds"]
    static = "" if arm.name in evaluation.ahead() else "; by the estimates a static exit shown is as good for as few"
    return Finding(arm.name, GOOD, f"{said}, at least {quality.low:+.1f}; {', '.join(costs)}{static}")


def _better(evaluation: Evaluation, arm: ArmSummary) -> Interval:
    """How much better than the full model's the main metric is: points of 100, or per cent of perplexity."""
    metric, found = evaluation.metric, arm.difference[evaluation.metric]
    whole = evaluation.arms[0].quality[metric].value
    scale = -100 / whole if metric == PERPLEXITY else 1.0 if metric.endswith("(corpus)") else 100.0
    ends: list[Any] = [None if end is None else scale * end for end in (found.low, found.high)]
    return Interval(scale * found.value, *(ends if scale > 0 else ends[::-1]))


def _needed(evaluation: Evaluation, quality: Interval, groups: int) -> str:
    """About how many examples would do: an interval narrows with the root of their number."""
    examples = evaluation.conditions["examples"]
    each = examples / groups
    wanted = FEWEST * each
    if quality.low is not None and quality.low < -NEAR:
        room = max(quality.value + NEAR, NEAR / 20)
        wanted = max(wanted, examples * ((quality.value - quality.low) / room) ** 2)
    digits = 10 ** max(math.floor(math.log10(wanted)) - 1, 0)
    return f"about {math.ceil(wanted / digits) * digits:,} examples would tell, {examples:,} are there"


# ---------------------------------------------------------------- cells


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

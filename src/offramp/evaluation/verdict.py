"""What an evaluation shows of each policy, and what it cannot show yet: praise only where an interval supports it.

A policy is *near* the full model if even the low end of the interval of its difference is at most `NEAR` points of 100
below (of perplexity: at most `NEAR` per cent above), from at least `FEWEST` groups of examples. It is worth a promise
if it is near for fewer FLOPs, also per generated token, and not slower where seconds compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from offramp.evaluation.summary import PERPLEXITY, ArmSummary
from offramp.metrics.bootstrap import Interval

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


class Judged(Protocol):
    """What is looked at of an evaluation: its arms, the full model first, and how they came about."""

    @property
    def arms(self) -> Sequence[ArmSummary]: ...  # noqa: D102
    @property
    def metric(self) -> str: ...  # noqa: D102
    @property
    def conditions(self) -> Mapping[str, Any]: ...  # noqa: D102
    def ahead(self) -> Sequence[str]: ...  # noqa: D102


def findings(evaluation: Judged) -> list[Finding]:
    """One for each policy that is neither static nor the full model."""
    return [_found(evaluation, arm) for arm in evaluation.arms if not arm.is_static]


def sentences(evaluation: Judged, found: Sequence[Finding]) -> list[str]:
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


def heading(evaluation: Judged, reason: str) -> str:
    """A heading of `REASONS` about this evaluation's metric."""
    above = evaluation.metric == PERPLEXITY
    near = f"{NEAR:g} {'per cent above' if above else 'points below'}"
    said = REASONS[reason].format(near=near, metric=evaluation.metric)
    return said.replace("below the full", "above the full") if above else said


def _found(evaluation: Judged, arm: ArmSummary) -> Finding:
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


def _better(evaluation: Judged, arm: ArmSummary) -> Interval:
    """How much better than the full model's the main metric is: points of 100, or per cent of perplexity."""
    metric, found = evaluation.metric, arm.difference[evaluation.metric]
    whole = evaluation.arms[0].quality[metric].value
    scale = -100 / whole if metric == PERPLEXITY else 1.0 if metric.endswith("(corpus)") else 100.0
    ends: list[Any] = [None if end is None else scale * end for end in (found.low, found.high)]
    return Interval(scale * found.value, *(ends if scale > 0 else ends[::-1]))


def _needed(evaluation: Judged, quality: Interval, groups: int) -> str:
    """About how many examples would do: an interval narrows with the root of their number."""
    examples = evaluation.conditions["examples"]
    each = examples / groups
    wanted = FEWEST * each
    if quality.low is not None and quality.low < -NEAR:
        room = max(quality.value + NEAR, NEAR / 20)
        wanted = max(wanted, examples * ((quality.value - quality.low) / room) ** 2)
    digits = 10 ** max(math.floor(math.log10(wanted)) - 1, 0)
    return f"about {math.ceil(wanted / digits) * digits:,} examples would tell, {examples:,} are there"

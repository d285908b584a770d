"""Is there anything to lose? A promise says nothing where the full model has nothing that a policy could lose.

A loss is never larger than what the full model scores: wherever it scores 0, or the metric cannot read the texts, every
policy "loses nothing". The room of a prompt is the most that any policy can lose on it. A promise is made only if it is
sure that the mean room of prompts is above the tolerance, so that a worthless policy would break it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from offramp.calibration.promise import Promise
from offramp.evaluation.record_file import Record
from offramp.metrics.text import reads, tokenisers
from offramp.risk import hoeffding_bentkus

if TYPE_CHECKING:
    from offramp.tasks import Example


@dataclass(frozen=True)
class Room:
    """What policies can lose on the certification prompts.

    Attributes:
        mean: Mean of the most that a prompt (or group, as the promise counts) can lose.
        none: Share of the prompts on which nothing can be lost.
        unread: Share of the prompts whose references (for textual losses and without references, whose answer by the
            full model) the metric cannot read, see `offramp.metrics.text.reads`.
        p_value: Of "the mean room of new prompts is at most the tolerance".
        tokeniser: What divides texts for the metric; None: it looks at characters or whole texts.
    """

    mean: float
    none: float
    unread: float
    p_value: float
    tokeniser: str | None

    def suffices(self, promise: Promise) -> bool:
        """Whether a worthless policy would break the promise, as far as these prompts can tell."""
        return self.p_value <= promise.failure

    @staticmethod
    def tested(mean: float, n: int, promise: Promise) -> float:
        """The p-value of "the mean room of new prompts is at most the tolerance", from that of n draws."""
        return hoeffding_bentkus(np.full(n, 1 - mean), 1 - promise.tolerance)

    def words(self, promise: Promise) -> str:
        """What there is to lose, in one sentence."""
        p = promise
        if p.kind == "textual":
            what = f"The full model's answer is empty, or not a text that {p.metric} can read,"
            text = f"{what} on {self.none:.1%} of the certification prompts."
        elif p.kind == "tail":
            text = f"The full model scores at most {p.margin} of {p.metric}, so that no policy can lose more, on "
            text += f"{self.none:.1%} of the certification prompts."
        else:
            text = f"The full model itself scores {self.mean:.3g} of {p.metric}, the most that any policy can lose; on "
            text += f"{self.none:.1%} of the certification prompts it scores 0."
        return text

    def refusal(self, promise: Promise) -> str:
        """Why nothing is promised, and what to do."""
        p, found = promise, self.words(promise)
        loses = f"lose {self.mean:.3g} on average" if p.kind != "tail" else f"lose that much on {self.mean:.1%} of them"
        why = f"{found} A policy whose answers are worth nothing would {loses}, which is not shown to be more than the "
        why += f"tolerance of {p.tolerance:g}: every policy would keep such a promise."
        if self.unread > 0.5:
            other = "chrf, which reads every script and sign" if p.metric != "chrf" else "examples with a text in them"
            return (
                f"{why} {p.metric} cannot read the texts of {self.unread:.0%} of the prompts (such a text does not "
                f"even match itself): use another metric, such as {other}."
            )
        if p.kind == "textual":
            return f"{why} Give prompts that the full model answers, or another metric."
        return (
            f"{why} Give prompts that the full model answers well, a model trained for the task, a metric it scores "
            "in, or a smaller tolerance; or ask for --kind textual, which compares with the full model's own answers."
        )


def room_of(promise: Promise, full: Sequence[Record], examples: Sequence[Example], seed: int) -> Room:
    """The room that the full model's answers to these examples, in their order, leave."""
    texts = [
        example.references if example.references and promise.kind != "textual" else (record.text,)
        for record, example in zip(full, examples, strict=True)
    ]
    read = np.array([any(reads(promise.metric, text) for text in some) for some in texts])
    if promise.kind == "textual":
        most = (read & np.array([record.text.strip() != "" for record in full])).astype(float)
    else:
        scores = np.array([record.scores[promise.metric] for record in full])
        most = scores if promise.margin is None else (scores > promise.margin).astype(float)
    units = promise.units(most, [record.group for record in full], seed)
    mean = float(units.mean())
    return Room(
        mean=mean,
        none=float((most <= 0).mean()),
        unread=float((~read).mean()),
        p_value=Room.tested(mean, len(units), promise),
        tokeniser=tokenisers([promise.metric], [text for some in texts for text in some]).get(promise.metric),
    )

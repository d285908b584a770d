"""Arms take turns: all of them answer a batch of examples before the next batch comes, in an order drawn anew.

Whatever else the machine does meets all arms alike, so that the seconds of one round can be compared. An arm that is
added to a folder later, or one that an interruption left behind, has rounds of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.evaluation.record_file import Item, Progress, Record, RecordFile

if TYPE_CHECKING:
    from offramp.core.adaptive_threshold import AdaptiveThreshold
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy


@dataclass(frozen=True)
class Arm:
    """How one arm answers; examples are what the arm is made for (`offramp.tasks.Example`, or passages). Abstract.

    Attributes:
        lm: The model.
        name: Of the arm.
        policy: The exit policy; None: the full model.
    """

    lm: LanguageModel
    name: str
    policy: ExitPolicy | None

    @property
    def learner(self) -> AdaptiveThreshold | None:
        """The policy's threshold, if answering moves it."""
        return learner_of(self.lm, self.policy)

    def check(self) -> None:
        """Raise a ValueError if the arm cannot answer."""
        raise NotImplementedError

    def header(self, examples: Any, batch_size: int) -> dict[str, Any]:
        """How records come about, as JSON values."""
        raise NotImplementedError

    def answer(self, batch: Any) -> list[Record]:
        """One record per example, timed, not compared with the full model's yet."""
        raise NotImplementedError

    def judged(self, example: Any, record: Record, full: Record) -> Record:
        """A record with all that needs the full model's record of the example."""
        raise NotImplementedError


def learner_of(lm: LanguageModel, policy: ExitPolicy | None) -> AdaptiveThreshold | None:
    """The threshold that an adaptive policy moves on this model; None of another policy."""
    return lm.adaptive_threshold(policy) if policy is not None and policy.adaptive else None


def take_turns(
    arms: Sequence[Arm],
    paths: Mapping[str, Path],
    examples: Sequence[Item],
    batch_size: int,
    *,
    full: Mapping[str, Record] | None = None,
    progress: Progress | None = None,
) -> dict[str, list[Record]]:
    """All records by arm; missing ones are made, and appended when a round of all arms is complete."""
    for arm in arms:
        arm.check()
    compared = dict(full or {})
    if all(arm.policy is not None for arm in arms):
        _require(examples, compared)
    files = {arm.name: RecordFile(paths[arm.name], arm.header(examples, batch_size), examples, batch_size, arm.learner)
             for arm in arms}  # fmt: skip
    compared |= {r.id: r for arm in arms if arm.policy is None for r in files[arm.name].records}
    done, total = sum(len(file.records) for file in files.values()), len(arms) * len(examples)
    for at in range(0, len(examples), batch_size):
        batch = examples[at : at + batch_size]
        missing = [arm for arm in arms if len(files[arm.name].records) <= at]
        began, made = time.time(), {}
        for arm in random.Random(at).sample(missing, len(missing)):
            if progress is not None:
                progress(done, total, arm.name)
            file = files[arm.name]
            file.recall()
            records = [replace(record, round=began) for record in arm.answer(batch)]
            if file.learner is not None:
                records[-1] = replace(records[-1], learnt=file.learner.learnt())
            if arm.policy is None:
                compared |= {record.id: record for record in records}
            made[arm.name], done = records, done + len(batch)
        for arm in missing:
            rows = zip(batch, made[arm.name], strict=True)
            judged = [arm.judged(e, r, r if arm.policy is None else compared[e.id]) for e, r in rows]
            files[arm.name].append(judged)
    if progress is not None:
        progress(total, total, "done")
    return {name: file.records for name, file in files.items()}


def _require(examples: Sequence[Item], full: Mapping[str, Record]) -> None:
    """Raise a ValueError unless the full model answered all examples."""
    if missing := [example.id for example in examples if example.id not in full]:
        raise ValueError(
            f"the full model's records of {len(missing)} of {len(examples)} examples are missing (such as "
            f"{missing[0]!r}); make them first, with policy=None, and give them as `full`"
        )

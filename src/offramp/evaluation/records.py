"""Answering examples under arms, a policy, a static exit or the full model each, which take turns.

All arms answer a batch of examples before the next batch comes, in an order drawn anew: whatever else the machine does
meets all of them alike, so that the seconds of one round can be compared. An arm that is added to a folder later, or
one that an interruption left behind, has rounds of its own.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offramp.core.batch import Step
from offramp.core.costs import Costs
from offramp.core.generation import by_row, pieces
from offramp.core.generation_inputs import greedy
from offramp.core.readout import require_fit
from offramp.evaluation.record_file import Item, Progress, Record, RecordFile, header_of
from offramp.metrics.text import METRICS, PLAIN, tokenisers

if TYPE_CHECKING:
    from offramp.core.adaptive_threshold import AdaptiveThreshold
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy
    from offramp.tasks import Example, Task

PREFILL = "prefill"
"""The part of `Record.parts` that the prompt's own pass takes out of the others."""


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


def decode_arms(
    lm: LanguageModel,
    task: Task,
    examples: Sequence[Example],
    arms: Mapping[str, ExitPolicy | None],
    paths: Mapping[str, Path],
    *,
    full: Mapping[str, Record] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    reference: LanguageModel | None = None,
) -> dict[str, list[Record]]:
    """Answer examples under policies that take turns; `reference`: the full model where it has another format."""
    options = answer_options(task, max_new_tokens, settings)
    made = [
        TaskArm((reference or lm) if policy is None else lm, arm, policy, task, options) for arm, policy in arms.items()
    ]
    return take_turns(made, paths, examples, batch_size, full=full, progress=progress)


def answer_options(task: Task, max_new_tokens: int | None, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of `LanguageModel.stream`: the task's length unless another one is given, and all further ones."""
    return {"max_new_tokens": task.max_new_tokens if max_new_tokens is None else max_new_tokens, **(settings or {})}


@dataclass(frozen=True)
class TaskArm(Arm):
    """Answers examples of a task with options of `LanguageModel.stream`."""

    task: Task
    options: Mapping[str, Any]

    def check(self) -> None:
        """Raise a ValueError if the policy does not fit the model."""
        require_fit(self.lm.split, self.policy)

    def header(self, examples: Sequence[Example], batch_size: int) -> dict[str, Any]:
        """How records come about."""
        header = header_of(self.lm, asdict(self.task), examples, self.policy, self.options, batch_size)
        unusual = {name: how for name, how in divided_by(self.task, examples).items() if how not in PLAIN}
        return header | {"tokenisers": unusual} if unusual else header

    def answer(self, batch: Sequence[Example]) -> list[Record]:
        """Records that are not compared with the full model's yet."""
        tokens, layers, confidences, bills = _generate(
            self.lm, self.task.prompts(self.lm, batch), self.policy, self.options
        )
        texts = self.lm.decode(tokens)
        return [
            Record(
                example.id, example.group, self.name, texts[row], tokens[row], layers[row], scores={}, agreement=1.0,
                same=True, **bills[row], pieces=pieces(self.lm.tokenizer, tokens[row]), confidences=confidences[row],
            )
            for row, example in enumerate(batch)
        ]  # fmt: skip

    def judged(self, example: Example, record: Record, full: Record) -> Record:
        """A record beside the full model's; where there are no references, that one's text is the reference."""
        references = example.references or (full.text,)
        scores = {name: METRICS[name](record.text, references) for name in self.task.metrics}
        return replace(record, scores=scores, **compared(record, full))


def compared(record: Record, full: Record) -> dict[str, Any]:
    """`agreement` and `same` of a record."""
    return {"agreement": agreement(record.tokens, full.tokens), "same": record.tokens == full.tokens}


def divided_by(task: Task, examples: Sequence[Example]) -> dict[str, str]:
    """What divides texts for each metric of a task (`tokenisers`); without references, by the prompts' script."""
    return tokenisers(task.metrics, [text for example in examples for text in example.references or (example.source,)])


def agreement(mine: Sequence[int], theirs: Sequence[int]) -> float:
    """Share of positions, up to the longer one's length, with equal tokens; 1 of two empty answers."""
    longest = max(len(mine), len(theirs))
    return sum(a == b for a, b in zip(mine, theirs, strict=False)) / longest if longest else 1.0


# ---------------------------------------------------------------- one batch


def _generate(
    lm: LanguageModel, prompts: Any, policy: ExitPolicy | None, options: Mapping[str, Any]
) -> tuple[list[list[int]], list[list[int]], list[list[float | None]], list[dict[str, Any]]]:
    """Tokens, exit layers, confidences and costs of each row."""
    began = time.perf_counter()
    stream = lm.stream(prompts, policy=policy, **greedy(options))
    settle(lm)
    begun = time.perf_counter() - began  # with the encoder's pass
    steps, first = list[Step](), dict[str, int]()
    for step in stream:
        first = prefill_parts(stream.costs) if step.prefill else first
        begun = time.perf_counter() - began if step.prefill else begun
        steps.append(step)
    settle(lm)
    seconds, rows = (begun, time.perf_counter() - began), len(steps[0].token)
    tokens, layers, confidences = by_row(steps, rows)
    return tokens, layers, sure(confidences), shares(stream.costs, first, seconds, rows)


def settle(lm: LanguageModel) -> None:
    """Wait for the device, so that the clock can be read."""
    if lm.split.device.type == "cuda":
        torch.cuda.synchronize()


def sure(confidences: list[list[float]]) -> list[list[float | None]]:
    """Confidences of rows, as `Record.confidences` has them."""
    return [[round(value, 4) if math.isfinite(value) else None for value in row] for row in confidences]


def prefill_parts(costs: Costs) -> dict[str, int]:
    """FLOPs by part after the prompt's own pass; the encoder's are no part of it."""
    return {name: part.flops for name, part in costs.parts.items() if name != "encoder"}


def shares(
    costs: Costs, first: Mapping[str, int], seconds: tuple[float, float], rows: int
) -> list[dict[str, Any]]:  # fmt: skip
    """What each row answered together bears of the costs; `seconds` up to where the prompt was read, and of all."""
    parts = {name: part.flops - first.get(name, 0) for name, part in costs.parts.items()}
    parts[PREFILL] = sum(first.values())
    split = {name: _equal_shares(value, rows) for name, value in parts.items()}
    read = _equal_shares(costs.bytes, rows)
    return [
        {
            "flops": sum(values[row] for values in split.values()),
            "bytes": read[row],
            "seconds": seconds[1] / rows,
            "prompt_seconds": seconds[0] / rows,
            "parts": {name: values[row] for name, values in split.items()},
        }
        for row in range(rows)
    ]


def _equal_shares(whole: int, rows: int) -> list[int]:
    """Equal whole shares, the first ones larger by one where it does not come out even."""
    return [whole // rows + (row < whole % rows) for row in range(rows)]

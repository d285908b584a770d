"""Answering examples under one arm: a policy, a static exit or the full model."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offramp.costs import Costs
from offramp.evaluation.record_file import Item, Progress, Record, header_of, kept
from offramp.metrics.text import METRICS, PLAIN, tokenisers

if TYPE_CHECKING:
    from offramp.adaptive_threshold import AdaptiveThreshold
    from offramp.decoding import Step
    from offramp.language_model import LanguageModel
    from offramp.policy import ExitPolicy
    from offramp.tasks import Example, Task

PREFILL = "prefill"
"""The part of `Record.parts` that the prompt's own pass takes out of the others."""


def decode_records(
    lm: LanguageModel,
    task: Task,
    examples: Sequence[Example],
    arm: str,
    policy: ExitPolicy | None,
    path: Path,
    *,
    full: Mapping[str, Record] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Answer examples under one policy; every finished batch is appended to `path`, from which a repeated call goes on.

    Where an example has no references, the full model's answer is the reference.

    Args:
        lm: The model.
        task: How to ask and how to judge.
        examples: With ids of their own.
        arm: What the records call the policy.
        policy: The exit policy; None: the full model.
        path: JSON Lines file of these records and no others.
        full: Records of the full model by example id, to compare with; needed unless `policy` is None.
        max_new_tokens: Longest answer; None: the task's.
        batch_size: Examples answered together.
        settings: Further options of `LanguageModel.stream`, as JSON values.
        progress: Called with the examples done and asked for.

    Returns:
        One record per example, in their order.

    Raises:
        ValueError: No or repeated examples, a prompt that does not fit the context, a policy that does not fit the
            model, no `full` record of an example, or `path` holds other records.
    """
    limit = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    options = {"max_new_tokens": limit, **(settings or {})}
    if policy is not None:
        policy.resolve(lm.num_layers, lm.vocabulary, lm.split.exit_layers)
        require_full(examples, full)

    def answer(batch: Sequence[Example]) -> list[Record]:
        tokens, layers, confidences, bills = _generate(lm, task.prompts(lm, batch), policy, options)
        texts = lm.decode(tokens)
        records = []
        for row, example in enumerate(batch):
            theirs = tokens[row] if policy is None or full is None else full[example.id].tokens
            references = example.references or (texts[row] if full is None else full[example.id].text,)
            scores = {name: METRICS[name](texts[row], references) for name in task.metrics}
            records.append(
                Record(
                    example.id,
                    example.group,
                    arm,
                    texts[row],
                    tokens[row],
                    layers[row],
                    scores,
                    agreement(tokens[row], theirs),
                    tokens[row] == theirs,
                    **bills[row],
                    pieces=pieces(lm, tokens[row]),
                    confidences=confidences[row],
                )  # fmt: skip
            )
        return records

    header = header_of(lm, asdict(task), examples, policy, options, batch_size)
    if unusual := {name: how for name, how in divided_by(task, examples).items() if how not in PLAIN}:
        header["tokenisers"] = unusual
    return kept(path, header, examples, batch_size, answer, progress, arm, learner_of(lm, policy))


def divided_by(task: Task, examples: Sequence[Example]) -> dict[str, str]:
    """What divides texts for each metric of a task, see `offramp.metrics.text.tokenisers`.

    Args:
        task: Whose metrics.
        examples: Whose references; where there are none, answers are taken to be in the script of the prompt.

    Returns:
        Names by metric.
    """
    return tokenisers(task.metrics, [text for example in examples for text in example.references or (example.source,)])


def learner_of(lm: LanguageModel, policy: ExitPolicy | None) -> AdaptiveThreshold | None:
    """The threshold that an adaptive policy moves on this model; None of another policy."""
    return lm.adaptive_threshold(policy) if policy is not None and policy.adaptive else None


def agreement(mine: Sequence[int], theirs: Sequence[int]) -> float:
    """Share of positions, up to the longer one's length, with equal tokens; 1 of two empty answers."""
    longest = max(len(mine), len(theirs))
    return sum(a == b for a, b in zip(mine, theirs, strict=False)) / longest if longest else 1.0


def require_full(examples: Sequence[Item], full: Mapping[str, Record] | None) -> None:
    """Raise a ValueError unless the full model answered all examples."""
    if missing := [example.id for example in examples if example.id not in (full or {})]:
        raise ValueError(
            f"the full model's records of {len(missing)} of {len(examples)} examples are missing (such as "
            f"{missing[0]!r}); make them first, with policy=None, and give them as `full`"
        )


# ---------------------------------------------------------------- one batch


def _generate(
    lm: LanguageModel, prompts: Any, policy: ExitPolicy | None, options: Mapping[str, Any]
) -> tuple[list[list[int]], list[list[int]], list[list[float | None]], list[dict[str, Any]]]:
    """Tokens, exit layers, confidences and costs of each row."""
    began = time.perf_counter()
    stream = lm.stream(prompts, policy=policy, **options)
    tokens: list[list[int]] = []
    layers: list[list[int]] = []
    confidences: list[list[float | None]] = []
    first: dict[str, int] = {}
    for step in stream:
        if not tokens:
            tokens, layers = [[] for _ in step.token], [[] for _ in step.token]
            confidences = [[] for _ in step.token]
            first = prefill_parts(stream.costs) if step.prefill else {}
        columns = zip(step.active.tolist(), step.token.tolist(), step.exit_layer.tolist(), sure(step), strict=True)
        for row, (active, token, layer, confidence) in enumerate(columns):
            if active:
                tokens[row].append(token)
                layers[row].append(layer)
                confidences[row].append(confidence)
    if lm.split.device.type == "cuda":
        torch.cuda.synchronize()
    return tokens, layers, confidences, shares(stream.costs, first, time.perf_counter() - began, len(tokens))


def sure(step: Step) -> list[float | None]:
    """The confidences of a step, as `Record.confidences` has them."""
    return [round(value, 4) if math.isfinite(value) else None for value in step.confidence.tolist()]


def pieces(lm: LanguageModel, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; half a character counts to the token with its other half.

    Args:
        lm: The model, for its tokenizer.
        ids: Token ids.

    Returns:
        One per token, which together are the text; none without a tokenizer.
    """
    if lm.tokenizer is None:
        return []
    texts = lm.decode([list(ids[:end]) for end in range(1, len(ids) + 1)])
    ends = [len(text.rstrip("\N{REPLACEMENT CHARACTER}")) for text in texts[:-1]] + [len(text) for text in texts[-1:]]
    ends = list(itertools.accumulate(reversed(ends), min))[::-1]  # what a later token took back, it says itself
    return [texts[-1][start:end] for start, end in itertools.pairwise([0, *ends])]


def prefill_parts(costs: Costs) -> dict[str, int]:
    """FLOPs by part after the prompt's own pass; the encoder's are no part of it."""
    return {name: part.flops for name, part in costs.parts.items() if name != "encoder"}


def shares(costs: Costs, first: Mapping[str, int], seconds: float, rows: int) -> list[dict[str, Any]]:
    """What each of the rows that were answered together bears: `flops`, `bytes`, `seconds` and `parts` of a record.

    Args:
        costs: Of all rows.
        first: What of it `prefill_parts` found after the prompt; empty without a pass of its own.
        seconds: Wall-clock time.
        rows: How many there were.

    Returns:
        One per row; whole numbers that add up to the whole.
    """
    parts = {name: part.flops - first.get(name, 0) for name, part in costs.parts.items()}
    parts[PREFILL] = sum(first.values())
    split = {name: _divided(value, rows) for name, value in parts.items()}
    read = _divided(costs.bytes, rows)
    return [
        {
            "flops": sum(values[row] for values in split.values()),
            "bytes": read[row],
            "seconds": seconds / rows,
            "parts": {name: values[row] for name, values in split.items()},
        }
        for row in range(rows)
    ]


def _divided(whole: int, rows: int) -> list[int]:
    """Equal whole shares, the first ones larger by one where it does not come out even."""
    return [whole // rows + (row < whole % rows) for row in range(rows)]

"""`offramp.evaluate`: exit policies on a task, or by the perplexity of a text, beside static exits and full depth."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offramp.calibration.certificate import certified_task, check_certificate, check_drift
from offramp.core.policy import ExitPolicy
from offramp.evaluation.evaluate import evaluate as compare
from offramp.evaluation.evaluate import evaluate_perplexity, records_of
from offramp.evaluation.perplexity import PERPLEXITY, read_passages
from offramp.evaluation.record_file import state_of
from offramp.lm.given import Data, File, TaskName, fitting, named, run_folder, task_of
from offramp.runs.progress import shown
from offramp.tasks import Example, Task
from offramp.values import ArgumentError

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.evaluation.perplexity import Passage
    from offramp.evaluation.result import Evaluation

log = logging.getLogger(__name__)


def evaluate(
    lm: LanguageModel,
    task: TaskName | Literal["perplexity"] | Task,
    data: Data,
    arms: Mapping[str, ExitPolicy | File] | None = None,
    *,
    target: File | None = None,
    static_layers: Sequence[int] | None = None,
    limit: int | None = None,
    longest: int | None = None,
    max_new_tokens: int | None = None,
    window: int | None = None,
    batch_size: int = 1,
    resamples: int = 2000,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    out: File | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare exit policies with static exits and the full model on a task, or by the perplexity of a text.

    Started again in the same folder, an interrupted evaluation goes on:

        result = lm.evaluate("summarisation", "dev.json", {"mine": offramp.ExitPolicy(threshold=0.8)}, limit=50)
        print(result.table())

    Where the certificate in a policy's file does not apply to this use, or its tokens leave elsewhere than certified,
    a warning is logged, as "offramp.calibration".

    Args:
        lm: The model; for "perplexity" decoder-only.
        task: What is asked.
        data: A file of examples in one of the layouts of `offramp.tasks.read_examples`, or examples; for "perplexity"
            files of texts.
        arms: Policies, or files of them, by name; the full model and static exits are always there.
        target: Second file of a parallel text.
        static_layers: Layers of the static exits; None: those of the policies.
        limit: Use only this many examples, chosen at random by the seed.
        longest: Cut examples so that prompt and answer have at most this many tokens; None: the model's context.
        max_new_tokens: Longest answer; None: the task's.
        window: Most predicted tokens of a passage of text, for "perplexity"; None: 256, or what the context holds.
        batch_size: Examples answered together.
        resamples: Resamples of the bootstrap behind the intervals.
        seed: Seed of the choice and of the bootstrap.
        about: What else the record should say, as JSON values.
        out: Run folder; None: runs/evaluate-NAME-TASK.
        progress: Called with the answers done and asked for, over all arms.
            None: a bar in a terminal or a notebook, unless TQDM_DISABLE is set.

    Returns:
        Quality and cost of each policy, also written to the folder.

    Raises:
        ArgumentError: Arguments that do not go together, a ValueError.
        ValueError: There is no such task, the file cannot be read, a policy does not fit the model, or the folder holds
            an evaluation of something else.
    """
    progress = shown(progress, "evaluating")
    policies = {name: p if isinstance(p, ExitPolicy) else ExitPolicy.load(p) for name, p in (arms or {}).items()}
    files = {name: p for name, p in (arms or {}).items() if not isinstance(p, ExitPolicy)}
    about = {"data": named(data), "limit": limit, "seed": seed, **(about or {})}
    if task == PERPLEXITY:
        given = {"target": target, "max_new_tokens": max_new_tokens, "longest": longest}
        _refuse(task, given, "examples and answers")
        most = lm.split.max_positions
        window = min(256, 256 if most is None else most - 1) if window is None else window
        passages = _passages(lm, data, window, limit, seed)
        for name, file in files.items():
            check_certificate(file, lm, policies[name])
            if (certified := certified_task(file)) is not None:
                log.warning("certificate does not apply: it is about %s, not about the perplexity of a text", certified)
        return evaluate_perplexity(
            lm, passages, policies, run_folder("evaluate", lm, task) if out is None else Path(out),
            static_layers=static_layers, batch_size=batch_size, about={**about, "window": window}, resamples=resamples,
            seed=seed, progress=progress,
        )  # fmt: skip
    what = task_of(task)
    _refuse(what.name, {"window": window}, PERPLEXITY)
    examples, cut = fitting(lm, what, data, target, limit, seed, longest, max_new_tokens)
    settings = {"max_new_tokens": what.max_new_tokens if max_new_tokens is None else max_new_tokens}
    for name, file in files.items():
        check_certificate(file, lm, policies[name], task=what, settings=settings, batch_size=batch_size)
    folder = run_folder("evaluate", lm, what.name) if out is None else Path(out)
    result = compare(
        lm, what, examples, policies, folder, static_layers=static_layers, max_new_tokens=max_new_tokens,
        batch_size=batch_size, about={**about, "shortened": cut}, resamples=resamples, seed=seed, progress=progress,
    )  # fmt: skip
    if state_of(lm.split.device.type).is_main_process:
        for name, file in files.items():
            check_drift(file, [record.exit_layers for record in records_of(folder, name)])
    return result


def _passages(lm: LanguageModel, data: Data, window: int, limit: int | None, seed: int) -> list[Passage]:
    """Pieces of the texts of files, so many of them at random."""
    paths = [data] if isinstance(data, str | os.PathLike) else [each for each in data if not isinstance(each, Example)]
    passages = read_passages(lm, [Path(path) for path in paths], window=window)
    if limit is None or limit >= len(passages):
        return passages
    chosen = random.Random(seed).sample(range(len(passages)), limit)
    return [passages[index] for index in sorted(chosen)]


def _refuse(task: str, given: Mapping[str, Any], kind: str) -> None:
    """Rather than leave arguments for another kind of task aside."""
    if names := [f"`{name}`" for name, value in given.items() if value is not None]:
        raise ArgumentError(f"{', '.join(names)} with `task` {task}: only for {kind}; leave it out")

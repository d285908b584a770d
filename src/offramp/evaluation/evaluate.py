"""Run all arms, in turns, on the same examples and compare: a folder of records, from which a stopped one goes on.

config.json               what all arms have in common; an evaluation of something else is refused here
examples.jsonl            what was asked, one line per example
records/ARM.jsonl         one line per example; while several processes are at it, ARM.RANK-of-PROCESSES.jsonl
results.json, table.md    the summary, and pictures of it

Started several times by `accelerate launch` (or `torchrun`, on CPUs too), each process answers its part of the
examples; they must see the same folder.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.evaluation.arms import FULL, baselines, unexited
from offramp.evaluation.perplexity import PERPLEXITY, Passage, PassageArm
from offramp.evaluation.record_file import (
    Item,
    Progress,
    Record,
    conditions_of,
    locked_by_first,
    read_records,
    shared,
    state_of,
)
from offramp.evaluation.records import Arm, TaskArm, answer_options, divided_by, take_turns
from offramp.evaluation.result import Evaluation
from offramp.evaluation.summary import summarise
from offramp.metrics.intervals import Bootstrap
from offramp.metrics.text import reads
from offramp.report import plots
from offramp.runs.machine import describe
from offramp.runs.resume import as_json, read_asked, require_same, write_asked, write_lines

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy
    from offramp.tasks import Example, Task

CONFIG, EXAMPLES, RECORDS = "config.json", "examples.jsonl", "records"
AGAIN = "give another folder"


def evaluate(
    lm: LanguageModel,
    task: Task,
    examples: Sequence[Example],
    arms: Mapping[str, ExitPolicy],
    folder: Path,
    *,
    static_layers: Sequence[int] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    settings: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """`offramp.evaluate` of a task's examples, with ids of their own, whose prompts fit (`offramp.tasks.fit`)."""
    options = answer_options(task, max_new_tokens, settings)
    make = partial(TaskArm, lm, task=task, options=options)
    common = conditions_of(lm, vars(task), examples, options, batch_size)
    limit = options["max_new_tokens"]
    conditions = {**_conditions(lm, examples, task.name, about), "max_new_tokens": limit, "batch_size": batch_size}
    conditions["tokenisers"] = ", ".join(f"{name} {how}" for name, how in divided_by(task, examples).items())
    conditions |= _unread(task, examples)
    main = f"{task.metrics[0]} (corpus)" if task.name == "translation" else task.metrics[0]
    return _evaluate(
        lm, make, examples, arms, folder, common, conditions, main, static_layers, resamples, seed, progress,
        references=[example.references for example in examples],
    )  # fmt: skip


def evaluate_perplexity(
    lm: LanguageModel,
    passages: Sequence[Passage],
    arms: Mapping[str, ExitPolicy],
    folder: Path,
    *,
    static_layers: Sequence[int] | None = None,
    batch_size: int = 1,
    about: Mapping[str, Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """`offramp.evaluate` of passages (see `read_passages`), by a decoder-only model."""
    common = conditions_of(lm, {"name": PERPLEXITY}, passages, {}, batch_size)
    conditions = {**_conditions(lm, passages, PERPLEXITY, about), "batch_size": batch_size}
    return _evaluate(
        lm, partial(PassageArm, lm), passages, arms, folder, common, conditions, PERPLEXITY, static_layers, resamples,
        seed, progress,
    )  # fmt: skip


def records_of(folder: Path, arm: str) -> list[Record]:
    """The records of an arm in a run folder, in the order of the examples."""
    return read_records(folder / RECORDS / f"{_file_name(arm)}.jsonl")[1]


def _evaluate(
    lm: LanguageModel, make: Callable[..., Arm], examples: Sequence[Any], arms: Mapping[str, ExitPolicy], folder: Path,
    common: Mapping[str, Any], conditions: Mapping[str, Any], metric: str, static_layers: Sequence[int] | None,
    resamples: int, seed: int, progress: Progress | None, references: Sequence[Sequence[str]] | None = None,
) -> Evaluation:  # fmt: skip
    policies = {FULL: None, **baselines(lm, arms, static_layers), **arms}
    _check_names(policies)
    bootstrap = Bootstrap([example.group for example in examples], resamples=resamples, seed=seed)
    state = state_of(lm.split.device.type)
    made = [make(name=arm, policy=policy) for arm, policy in policies.items()]
    for each in made:  # before hours of work, and before there is a folder
        each.check()
    stems = {arm: folder / RECORDS / _file_name(arm) for arm in policies}

    def run(some: Sequence[Any], paths: Mapping[str, Path]) -> dict[str, list[Record]]:
        full = {} if FULL in paths else {record.id: record for record in records_of(folder, FULL)}
        return take_turns(
            [arm for arm in made if arm.name in paths], paths, some, common["batch_size"], full=full,
            progress=progress if state.is_main_process else None,
        )  # fmt: skip

    with _opened(folder, common, examples, about=conditions, state=state):
        records = shared(state, stems, examples, common["batch_size"], run)
        summaries = [
            summarise(
                records[arm], records[FULL], policy=None if policy is None else policy.to_dict(),
                num_layers=lm.num_layers, bootstrap=bootstrap, references=references,
                same_prompt=records.get(unexited(policies, policy)),
            )
            for arm, policy in policies.items()
        ]  # fmt: skip
        details = {
            **conditions, "groups": bootstrap.groups, "resamples": resamples, "bootstrap_seed": seed,
            "level": bootstrap.level, "processes": state.num_processes,
        }  # fmt: skip
        result = Evaluation(details, metric, lm.num_layers, summaries)
        if state.is_main_process:
            result.save(folder)
            plots.save_evaluation(result, folder)
    return result


def _check_names(arms: Iterable[str]) -> None:
    """Every arm has a file of its own."""
    names: dict[str, str] = {}
    for arm in arms:
        if (name := _file_name(arm)) in names:
            raise ValueError(f"arms {names[name]!r} and {arm!r} would share the file {name}.jsonl; rename one")
        names[name] = arm


def _file_name(arm: str) -> str:
    """An arm's name in the alphabet of file names."""
    name = re.sub(r"[^a-z0-9.]+", "-", arm.lower()).strip("-.")
    if not name:
        raise ValueError(f"an arm is called {arm!r}; give it a name with letters or digits")
    return name


def _conditions(
    lm: LanguageModel, examples: Sequence[Item], task: str, about: Mapping[str, Any] | None
) -> dict[str, Any]:  # fmt: skip
    return {
        "model": lm.name,
        "task": task,
        "examples": len(examples),
        **(about or {}),
        "trained_exits": list(lm.split.exit_layers),
        "dtype": lm.number_format,
        **describe(lm.split.device),
    }


def _unread(task: Task, examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """By metric, of how many examples it can read no reference; nothing if it reads all."""
    counts = {
        name: sum(not any(reads(name, text) for text in e.references) for e in examples if e.references)
        for name in task.metrics
    }
    found = {name: count for name, count in counts.items() if count}
    return {"unread": found} if found else {}


@contextlib.contextmanager
def _opened(
    folder: Path, common: Mapping[str, Any], examples: Sequence[Any], *, about: Mapping[str, Any], state: Any
) -> Iterator[None]:  # fmt: skip
    """The run folder, for this evaluation alone: what is asked is written, or compared, and examples are kept."""
    with locked_by_first(state, folder, "another evaluation runs"):
        if state.is_main_process:
            (folder / RECORDS).mkdir(exist_ok=True)
            asked, path = as_json({"schema": "offramp/evaluate-config/1", **common}), folder / CONFIG
            if path.exists():
                require_same(read_asked(path, AGAIN, "about")[0], asked, folder, "another evaluation: {}")
            else:
                write_asked(path, asked, about=dict(about))
            if not (kept := folder / EXAMPLES).exists():
                write_lines(kept, map(asdict, examples))
        state.wait_for_everyone()
        yield

"""What verbs are given, as files or as objects, and the documents that a language model learns from in it.

Tasks, examples, texts and prompts; and where runs are written. Documents are texts, examples of a task, and the model's
own answers to prompts.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from offramp.distillation.texts import read_prompts
from offramp.tasks import TASKS, Example, Task, fit, read_examples, take
from offramp.training.answers import AnswerConfig, answer_documents
from offramp.training.data import Document, pair_documents, read_texts, require_sources, text_documents
from offramp.values import ArgumentError, choice

if TYPE_CHECKING:
    from offramp.core.generation_inputs import Prompt
    from offramp.core.language_model import LanguageModel

log = logging.getLogger(__name__)
T = TypeVar("T")
File = str | os.PathLike[str]
TaskName = Literal["question-answering", "summarisation", "translation", "prompts"]
Texts = File | Sequence[str | os.PathLike[str]]
"""A file, as `offramp.training.data.read_texts` reads it, or texts; a `Path` among them is a file."""
Prompts = File | Sequence["Prompt"]
"""A file, as `offramp.distillation.texts.read_prompts` reads it, "bundled", or texts and chats."""
Data = File | Sequence[File | Example]
"""A file of examples in one of the layouts of `offramp.tasks.read_examples`, several, or examples."""

BUNDLED = "bundled"
TRAINING = ("train", "distill", "posterior")
"""Verbs whose results are exits or models, whichever they began with."""


def run_folder(verb: str, lm: LanguageModel, *task: str) -> Path:
    """Where a run is written by default, runs/VERB-MODEL-TASK[-exits]: of a model's address, the end is its name."""
    exits = ("exits",) if lm.exits is not None and verb not in TRAINING else ()
    return Path("runs") / "-".join((verb, Path(lm.name).name, *task, *exits))


def task_of(task: str | Task) -> Task:
    """The task, also by its name; a ValueError where there is none of that name."""
    if isinstance(task, Task):
        return task
    choice("task", task, tuple(TASKS))
    return TASKS[task]


def texts_of(given: Texts, columns: Sequence[str] = ("text",)) -> list[str]:
    """The texts; of JSON objects in files the columns, joined."""
    found: list[str] = []
    for each in [Path(given)] if isinstance(given, str | os.PathLike) else given:
        found += read_texts(Path(each), columns) if isinstance(each, os.PathLike) else [each]
    return found


def bundled_prompts() -> list[str]:
    """Sixty short English tasks for an instruction-following model, written for offramp, always in the same order."""
    text = resources.files("offramp").joinpath("data/prompts.json").read_text(encoding="utf-8")
    return [entry["prompt"] for entry in json.loads(text)["prompts"]]


def prompts_of(given: Prompts | None, limit: int | None = None) -> list[Prompt]:
    """The prompts, the first so many; None: the bundled ones."""
    found: list[Prompt] = []
    if given is None or given == BUNDLED:
        found += bundled_prompts()
    elif isinstance(given, str | os.PathLike):
        found += [entry.text for entry in read_prompts(Path(given))]
    else:
        found += given
    return first(found, limit)


def examples_of(task: Task, data: Data | None, target: File | None = None) -> list[Example]:
    """The examples, of all files; an `ArgumentError` where there are none, or two files of which one has a target."""
    given = [data] if isinstance(data, str | os.PathLike) else list(data or ())
    if not given:
        raise ArgumentError(f"`task` {task.name} needs `data`, a file of examples")
    if target is not None and len(given) > 1:
        raise ArgumentError(f"`target` belongs to one `data`, but {len(given)} are given")
    found, second = list[Example](), None if target is None else Path(target)
    for each in given:
        found += [each] if isinstance(each, Example) else read_examples(task, os.fspath(each), second)
    return found


def fitting(
    lm: LanguageModel, task: Task, data: Data, target: File | None, limit: int | None, seed: int, longest: int | None,
    max_new_tokens: int | None,
) -> tuple[list[Example], int]:  # fmt: skip
    """Examples to be answered, chosen at random, whose prompts fit; and how many were cut for it."""
    files = [] if isinstance(data, str | os.PathLike) else [each for each in data if not isinstance(each, Example)]
    if len(files) > 1:
        raise ArgumentError(f"`data` is given {len(files)} times; {task.name} reads one")
    found = take(examples_of(task, data, target), limit, seed)
    examples, cut = fit(lm, task, found, longest=longest, room=max_new_tokens)
    if cut:
        log.info("cut the end of %d of %d examples, whose prompts are too long", cut, len(examples))
    return examples, cut


def named(data: File | Sequence[object]) -> str:
    """What data are called in the record of a run: their files, if they are of any."""
    given = [data] if isinstance(data, str | os.PathLike) else data
    files = [os.fspath(each) for each in given if isinstance(each, str | os.PathLike)]
    return ", ".join(files) if files and len(files) == len(given) else "examples"


def first(rows: list[T], limit: int | None) -> list[T]:
    """The first so many, of which there must be one at least; None: all."""
    if limit is not None and limit < 1:
        raise ValueError(f"the first {limit} are asked for; take at least one, or leave the number out for all")
    return rows[:limit]


def documents_of(
    lm: LanguageModel,
    *,
    texts: Texts | None,
    columns: Sequence[str],
    prompts: Prompts | None,
    task: TaskName | Task | None,
    data: Data | None,
    target: File | None,
    own_answers: bool,
    limit: int | None,
    answering: AnswerConfig,
    window: int,
    folder: Path,
    progress: Callable[..., None] | None,
) -> list[Document]:
    """Texts, examples of a task and answers to prompts, else to the bundled ones, as `offramp.train` is given them."""
    prompted = prompts is not None or (texts is None and task is None)
    _check_answering(lm, answering, prompted=prompted, answers=prompted or own_answers, asked=task is not None)
    documents: list[Document] = []
    if texts is not None:
        found = first(texts_of(texts, columns), limit)
        documents += text_documents(lm, found)
        require_sources(lm, documents)
        if dropped := len(found) - len(documents):
            log.info("left out %d of %d texts, which are shorter than two tokens", dropped, len(found))
    if task is not None:
        what = task_of(task)
        examples = first(examples_of(what, data, target), limit)
        if own_answers:
            documents += _answers(lm, what, examples, answering, window, folder / "answers.jsonl", progress)
        else:
            pairs, shortened = pair_documents(lm, what, examples, longest=window)
            _tell(shortened, len(examples), window)
            documents += [replace(pair, start=0) for pair in pairs] if answering.prompts_too else pairs
    elif data or target or own_answers:
        raise ArgumentError("`data`, `target` and `own_answers` need `task`, which says what the examples are")
    if prompted:
        cache = folder / ("answers-to-prompts.jsonl" if own_answers else "answers.jsonl")
        documents += answer_documents(lm, prompts_of(prompts, limit), answering, cache, progress)
    return documents


def _check_answering(lm: LanguageModel, config: AnswerConfig, *, prompted: bool, answers: bool, asked: bool) -> None:
    """Refuse, before hours of answering, what would have no effect on the answers or cannot be had."""
    if not answers and config.temperature is not None:
        raise ArgumentError(
            "several answers to a prompt and a temperature of answers are for the model's own answers, and none are "
            "asked for; give `prompts`, or `own_answers` with `task`, or leave them out"
        )
    if config.prompts_too and not (answers or asked):
        raise ArgumentError(
            "the words of prompts are asked for as well, and texts have none; give `prompts` or `task`, or leave it out"
        )
    if config.prompts_too and lm.split.is_encoder_decoder:
        raise ValueError("an encoder-decoder reads prompts and never predicts their words; train on answers only")
    if config.chat and not prompted:
        raise ArgumentError("`chat` puts `prompts` into a template, and none are given; leave it out")
    config.of(lm)


def _answers(
    lm: LanguageModel, task: Task, examples: Sequence[Example], config: AnswerConfig, longest: int, cache: Path,
    progress: Callable[..., None] | None,
) -> list[Document]:  # fmt: skip
    kept, shortened = fit(lm, task, examples, longest=longest, room=config.max_new_tokens)
    _tell(shortened, len(examples), longest)
    groups = [example.group for example in kept]
    return answer_documents(lm, task.prompts(lm, kept), replace(config, chat=False), cache, progress, groups=groups)


def _tell(shortened: int, total: int, longest: int) -> None:
    if shortened:
        log.info("shortened the source of %d of %d examples to fit %d tokens", shortened, total, longest)

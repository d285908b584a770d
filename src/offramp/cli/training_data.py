"""What `offramp train` is asked to train on, as documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from offramp.cli import options as o

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.tasks import Example, Task
    from offramp.training.answers import AnswerConfig
    from offramp.training.data import Document

BUNDLED = "bundled"


def documents_of(
    lm: LanguageModel,
    *,
    texts: tuple[list[Path], list[str]],
    task: str | None,
    data: list[str] | None,
    target: Path | None,
    languages: str | None,
    own_answers: bool,
    prompts: str | None,
    count: int | None,
    answering: AnswerConfig,
    window: int,
    folder: Path,
) -> list[Document]:
    """Texts, examples of a task and prompts, as far as they are given; without any, the bundled prompts.

    Args:
        lm: The model they are for.
        texts: Files, and the keys of JSON objects whose texts are joined.
        task: Name of a task.
        data: Its files.
        target: Second file of a parallel text.
        languages: Of a translation.
        own_answers: Train on the model's own answers, not the references.
        prompts: File of prompts, or "bundled".
        count: Most prompts or examples.
        answering: How the model answers.
        window: Longest example with its answer, in tokens.
        folder: Where answers are kept.

    Returns:
        The documents.

    Raises:
        BadParameter: Options that do not go together.
    """
    documents = _from_texts(lm, *texts)
    if task is not None:
        what = o.task_named(task, languages)
        examples = o.first(o.examples_from(what, data, target), count)
        make = _from_questions if own_answers else _from_references
        documents += make(lm, what, examples, answering, folder, window)
    elif data or target or own_answers:
        raise typer.BadParameter("--data, --target and --own-answers need --task, which says what the examples are")
    if prompts is not None or not (texts[0] or task):
        file = folder / ("answers-to-prompts.jsonl" if own_answers else "answers.jsonl")
        documents += _from_prompts(lm, prompts, count, answering, file)
    return documents


def _from_texts(lm: LanguageModel, files: list[Path], fields: list[str]) -> list[Document]:
    from offramp.training.data import read_texts, text_documents

    texts = [text for file in files for text in read_texts(file, fields)]
    documents = text_documents(lm, texts)
    if dropped := len(texts) - len(documents):
        o.note(f"left out {dropped} of {len(texts)} texts, which are shorter than two tokens")
    return documents


def _from_references(
    lm: LanguageModel, task: Task, examples: Sequence[Example], _: AnswerConfig, __: Path, longest: int
) -> list[Document]:
    from offramp.training.data import pair_documents

    documents, shortened = pair_documents(lm, task, examples, longest=longest)
    _tell_shortened(shortened, len(examples), longest)
    return documents


def _from_questions(
    lm: LanguageModel, task: Task, examples: Sequence[Example], config: AnswerConfig, folder: Path, longest: int
) -> list[Document]:
    from dataclasses import replace

    from offramp.tasks import fit
    from offramp.training.answers import answer_documents

    kept, shortened = fit(lm, task, examples, longest=longest, room=config.max_new_tokens)
    _tell_shortened(shortened, len(examples), longest)
    groups = [example.group for example in kept]
    with o.progress("answering") as progress:
        return answer_documents(
            lm, task.prompts(lm, kept), replace(config, chat=False), folder / "answers.jsonl", progress, groups=groups
        )


def _tell_shortened(count: int, total: int, longest: int) -> None:
    if count:
        o.note(f"shortened the source of {count} of {total} examples to fit {longest} tokens")


def _from_prompts(
    lm: LanguageModel, source: str | None, count: int | None, config: AnswerConfig, cache: Path
) -> list[Document]:  # fmt: skip
    from offramp.training.answers import answer_documents

    file = None if source is None or source == BUNDLED else Path(source)
    prompts = o.prompts_from(file, count)
    with o.progress("answering") as progress:
        return answer_documents(lm, prompts, config, cache, progress)

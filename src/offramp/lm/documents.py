"""What a language model learns from, as documents: texts, examples of a task, and its own answers to prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from offramp.lm.given import Data, File, Prompts, TaskName, Texts, examples_of, first, prompts_of, task_of, texts_of
from offramp.tasks import Example, Task, fit
from offramp.training.answers import AnswerConfig, answer_documents
from offramp.training.data import Document, pair_documents, require_sources, text_documents
from offramp.values import ArgumentError

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel

log = logging.getLogger(__name__)


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
    _check_answering(lm, answering, prompted=prompted, answers=prompted or own_answers)
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
            documents += pairs
    elif data or target or own_answers:
        raise ArgumentError("`data`, `target` and `own_answers` need `task`, which says what the examples are")
    if prompted:
        cache = folder / ("answers-to-prompts.jsonl" if own_answers else "answers.jsonl")
        documents += answer_documents(lm, prompts_of(prompts, limit), answering, cache, progress)
    return documents


def _check_answering(lm: LanguageModel, config: AnswerConfig, *, prompted: bool, answers: bool) -> None:
    """Refuse, before hours of answering, what would have no effect on the answers or cannot be had."""
    if not answers and (config.prompts_too or config.temperature is not None):
        raise ArgumentError(
            "the words of prompts, several answers to one and a temperature of answers are for the model's own "
            "answers, and none are asked for; give `prompts`, or `own_answers` with `task`, or leave them out"
        )
    if config.prompts_too and lm.split.is_encoder_decoder:
        raise ValueError("an encoder-decoder reads prompts and never predicts their words; train on answers only")
    if config.chat and not prompted:
        raise ArgumentError("`chat` puts `prompts` into a template, and none are given; leave it out")
    if config.chat and not lm.has_chat_template:
        raise ArgumentError("`chat`: the tokenizer has no chat template; leave it out, and give plain texts")


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

"""`offramp.distill`: a language model learns from another one, on texts or on its own answers to prompts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.distillation.language_models import TokenDistillation, distil
from offramp.distillation.texts import (
    Entry,
    OwnAnswers,
    entry_documents,
    group_names,
    group_numbers,
    read_entries,
    read_prompts,
)
from offramp.lm.given import BUNDLED, File, Prompts, Texts, first, prompts_of, run_folder
from offramp.runs.progress import shown
from offramp.training.answers import AnswerConfig
from offramp.training.data import Data, check_share, check_window, prepare
from offramp.values import ArgumentError

if TYPE_CHECKING:
    from offramp.core.generation_inputs import Prompt
    from offramp.core.language_model import LanguageModel
    from offramp.distillation.token_report import TokenDistillResult

log = logging.getLogger(__name__)


def distill(
    student: LanguageModel,
    teacher: LanguageModel,
    texts: Texts | None = None,
    *,
    columns: Sequence[str] = ("text",),
    prompts: Prompts | None = None,
    prompt_column: str | None = None,
    group_column: str | None = None,
    limit: int | None = None,
    config: TokenDistillation | None = None,
    answering: AnswerConfig | None = None,
    answer_every: int = 100,
    window: int | None = None,
    held_out: float = 0.1,
    report_to: Any = None,
    about: Mapping[str, Any] | None = None,
    out: File | None = None,
    progress: Callable[..., None] | None = None,
) -> TokenDistillResult:
    """Let a language model learn from another one with the same tokens, on texts, or on its own answers to prompts.

    Started again in the same folder, an interrupted distillation goes on. Classifiers are distilled by
    `offramp.distill_grid`:

        result = offramp.distill(offramp.load("small"), offramp.load("large"), "texts.jsonl", out="runs/small")
        print(result.table())

    What is found out on the way (texts left out, sizes) is logged, as "offramp.lm".

    Args:
        student: Its weights change.
        teacher: Does not change.
        texts: A file of texts, or texts; a `Path` among them is a file.
        columns: Keys of JSON objects whose texts are joined.
        prompts: Instead of texts: what the student answers and learns the teacher's distributions on (on-policy); texts
            or chats, a file of them, or "bundled".
        prompt_column: Key of what stands before a text and is not learnt; None: nothing does. Of prompts their key;
            None: "prompt".
        group_column: Key of the group in files of JSON objects, by which results are then told apart.
        limit: Use only the first of the texts or prompts.
        config: How; None: `TokenDistillation()`, all weights in 500 steps; of own answers with `fraction` 1.
        answering: How prompts are answered; None: greedily, in a chat template if there is one, by the config's seed.
        answer_every: Steps between own answers, which are then given anew.
        window: Longest piece of a text, in tokens; None: 256, or the student's context if that is shorter; of a prompt
            with its answer, the context, or 1024 where there is no end of it.
        held_out: Share of the texts or prompts to judge by, which are not trained on.
        report_to: Trackers, see `offramp.training.trainer.train`.
        about: What else the run's config.json should say, as JSON values.
        out: Run folder; None: runs/distill-NAME.
        progress: Called with the steps (or tokens) done and to do, and the loss.
            None: a bar in a terminal or a notebook, unless TQDM_DISABLE is set.

    Returns:
        What was reached, by group, and where the student is.

    Raises:
        ArgumentError: Arguments that do not go together, a ValueError.
        ValueError: The vocabularies differ, the texts are too few or cannot be read, or the folder holds a run with
            other options or data.
        NotFiniteError: The teacher computes NaN or infinity.
        FileNotFoundError: There is no such file of texts.
        TrainingError: The loss is not finite.
    """
    progress = shown(progress, "distilling", answers="answering")
    if (texts is None) == (prompts is None):
        raise ArgumentError("give `texts`, or `prompts` for the student's own answers; one of them is needed")
    data: Data | OwnAnswers
    if texts is not None:
        config = config or TokenDistillation()
        entries = first(_entries(texts, columns, prompt_column, group_column), limit)
        groups = group_names(entries)
        data = _fixed(student, entries, groups, window, held_out, config.training.seed)
    else:
        config = config or TokenDistillation(fraction=1.0)
        asked, attributes, groups = _prompts(prompts, prompt_column, group_column, limit)
        seed = config.training.seed
        answering = (answering or AnswerConfig(chat=None, seed=seed)).of(student)
        longest = (student.split.max_positions or 1024) if window is None else window
        check_window(student, longest)
        check_share(held_out)
        data = OwnAnswers(asked, attributes, answering, answer_every, longest, held_out, seed)
    folder = run_folder("distill", student) if out is None else Path(out)
    return distil(
        student, teacher, data, config, folder, groups=groups, progress=progress, report_to=report_to, about=about
    )


def _entries(texts: Texts, columns: Sequence[str], prompt: str | None, group: str | None) -> list[Entry]:
    found: list[Entry] = []
    for each in [Path(texts)] if isinstance(texts, str | os.PathLike) else texts:
        read = isinstance(each, os.PathLike)
        found += read_entries(Path(each), columns, prompt=prompt, group=group) if read else [Entry(str(each))]
    return found


def _fixed(
    lm: LanguageModel, entries: list[Entry], groups: Sequence[str], window: int | None, share: float, seed: int
) -> Data:
    documents = entry_documents(lm, entries, groups)
    if dropped := len(entries) - len(documents):
        log.info("left out %d of %d texts, which are shorter than two tokens", dropped, len(entries))
    window = min(256, lm.split.max_positions or 256) if window is None else window
    parts = prepare(lm, documents, window=window, share=share, seed=seed)
    size = f"{parts.train.positions} tokens to learn, {parts.held_out.positions} held out"
    log.info("%d documents: %s", len(documents), size)
    return parts


def _prompts(
    given: Prompts | None, key: str | None, group: str | None, limit: int | None
) -> tuple[list[Prompt], list[int] | None, tuple[str, ...]]:
    """Prompts, the numbers of their groups if they are of a file, and the groups' names."""
    if not isinstance(given, str | os.PathLike) or given == BUNDLED:
        return prompts_of(given, limit), None, ()
    entries = first(read_prompts(Path(given), key, group=group), limit)
    groups = group_names(entries)
    return [entry.text for entry in entries], group_numbers(entries, groups), groups

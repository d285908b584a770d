"""`offramp.train`: exits for a language model, or a model with them, from texts, tasks and its own answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.hub.pretrained import agreed
from offramp.lm.given import Data, File, Prompts, TaskName, Texts, documents_of, run_folder
from offramp.runs.codec import encode
from offramp.runs.progress import shown
from offramp.training.answers import AnswerConfig
from offramp.training.config import TrainConfig
from offramp.training.data import check_share, check_window, prepare, steps_per_epoch
from offramp.training.frequent import checked
from offramp.training.placement import check_most, placed
from offramp.training.precision import fast_precision
from offramp.training.trainable import check_trainable
from offramp.training.trainer import TrainResult
from offramp.training.trainer import train as train_exits
from offramp.values import ArgumentError

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.tasks import Task
    from offramp.training.data import Data as Windows

log = logging.getLogger(__name__)


def train(
    lm: LanguageModel,
    texts: Texts | None = None,
    *,
    columns: Sequence[str] = ("text",),
    prompts: Prompts | None = None,
    task: TaskName | Task | None = None,
    data: Data | None = None,
    target: File | None = None,
    own_answers: bool = False,
    limit: int | None = None,
    config: TrainConfig | None = None,
    answering: AnswerConfig | None = None,
    window: int | None = None,
    held_out: float = 0.1,
    epochs: int | None = None,
    fastest: bool = False,
    place: int | None = None,
    place_tokens: int | None = None,
    coverage: float | None = None,
    report_to: Any = None,
    about: Mapping[str, Any] | None = None,
    out: File | None = None,
    progress: Callable[..., None] | None = None,
) -> TrainResult:
    """Train exits, or a model with them, on texts, on examples of a task and on the model's own answers to prompts.

    Started again in the same folder, an interrupted training goes on. The exits are written, not attached:

        result = lm.train("texts.jsonl", config=offramp.TrainConfig(steps=200), out="runs/lenses")
        lm = offramp.load("smollm2", exits=result.exits)

    What is found out on the way (texts left out, the number format chosen) is logged, as "offramp.lm".

    Args:
        lm: The model.
        texts: A file of texts, or texts; a `Path` among them is a file.
        columns: Keys of JSON objects whose texts are joined.
        prompts: Texts or chats that the model answers, a file of them, or "bundled", as they are if nothing else is
            given.
        task: What `data` are examples of.
        data: Files of examples in the layouts of `offramp.tasks.read_examples`, or examples.
        target: Second file of a parallel text.
        own_answers: Learn the model's own answers to the task's questions, not the references.
        limit: Use only the first of the texts, prompts and examples.
        config: What is trained, and how; None: `TrainConfig()`, a lens for each of a few layers in 500 steps.
        answering: How prompts are answered; None: greedily, in a chat template if there is one, by the config's seed.
        window: Longest piece of a text, in tokens; None: 256, with a task 512, or the model's context if that is
            shorter.
        held_out: Share of the texts and answers to judge by, which are not trained on.
        epochs: Passes over the data, instead of the config's steps or tokens.
        fastest: Compute in bfloat16 where that is faster on this device, see
            `offramp.training.precision.fast_precision`, instead of the config's precision.
        place: Choose up to this many exit layers by measuring where layers agree with the last one and what leaving
            there saves, see `offramp.training.placement`.
        place_tokens: Tokens that a test will score, for the price of one; None: all.
        coverage: See `offramp.training.trainer.train`, as for `report_to` and `progress`, which is also called with the
            answers done and asked for, and "answers".
        report_to: Trackers.
        about: What else the run's config.json should say, as JSON values.
        out: Run folder; None: runs/train-NAME.
        progress: Called with the steps (or tokens) done and to do, and the loss.
            None: a bar in a terminal or a notebook, unless TQDM_DISABLE is set.

    Returns:
        What was reached, and where the exits are.

    Raises:
        ArgumentError: Arguments that do not go together, a ValueError.
        ValueError: Texts, examples or prompts are too few or cannot be read, no exit is possible as asked for, or the
            folder holds a run with other options or data.
        FileNotFoundError: There is no such file of texts.
        TrainingError: The loss is not finite.
    """
    progress = shown(progress, "training", answers="answering")
    config = config or TrainConfig()
    _check_place(config, place, place_tokens)
    answering = answering or AnswerConfig(chat=None, seed=config.seed)
    folder = run_folder("train", lm) if out is None else Path(out)
    if window is None:
        window = min(256 if task is None else 512, lm.split.max_positions or 512)
    _check_before(lm, config, window, held_out, place, coverage)
    documents = documents_of(
        lm, texts=texts, columns=columns, prompts=prompts, task=task, data=data, target=target,
        own_answers=own_answers, limit=limit, answering=answering, window=window, folder=folder, progress=progress,
    )  # fmt: skip
    parts = prepare(lm, documents, window=window, share=held_out, seed=config.seed)
    _tell(parts, len(documents), window)
    about = dict(about or {})
    if epochs is not None:
        config = replace(config, steps=epochs * steps_per_epoch(parts.train, config.batch_size), tokens=None)
    if fastest:
        found = agreed(fast_precision(lm.split.device, lm.model.dtype, folder, config.trainable))
        config, about["precision"] = replace(config, precision=found.value), f"{found.name}: {found.why}"
        log.info("computing in %s", about["precision"])
    if place is not None:
        best = agreed(placed(lm.split, parts, config, place, kept=place_tokens, folder=folder))
        config, about["placement"] = replace(config, layers=best.layers), encode(best)
        log.info(best.table())
    return train_exits(lm, parts, config, folder, progress, report_to, about, coverage)


def _check_before(
    lm: LanguageModel, config: TrainConfig, window: int, held_out: float, place: int | None, coverage: float | None
) -> None:
    """Say what cannot be trained before prompts are answered, which may take hours."""
    if place is not None:
        check_most(place, lm.num_layers)
        config = replace(config, layers=(1,))  # some that there are
    check_trainable(lm, config)
    check_window(lm, window)
    check_share(held_out)
    if coverage is not None:
        checked(coverage)


def _tell(parts: Windows, documents: int, window: int) -> None:
    if cut := parts.settings.get("shortened"):
        where = "prompts lose their beginning, answers their end"
        log.info("cut %d of %d documents to %d tokens: %s", cut, documents, window, where)
    size = f"{parts.train.positions} positions to train on, {parts.held_out.positions} held out"
    log.info("%d documents: %s", documents, size)


def _check_place(config: TrainConfig, place: int | None, tokens: int | None) -> None:
    """Arguments that `place` does not go with."""
    if place is None and tokens is not None:
        raise ArgumentError("`place_tokens` is for `place`, which measures where exits pay")
    if place is not None and config.drafter:
        raise ArgumentError("`place` chooses layers of exits; a drafter stands before the first one, leave it out")
    if place is not None and (config.layers is not None or config.classifiers):
        other = (
            "`layers`, which names"
            if config.layers is not None
            else f"`objective` {config.objective}, whose exits have"
        )
        raise ArgumentError(f"`place` chooses layers; it does not go with {other} them")

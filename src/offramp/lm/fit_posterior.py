"""`offramp.fit_posterior`: what the confidences "laplace", "conformal" and "avcs" need, fitted to a model's exits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.calibration.posterior import PosteriorConfig
from offramp.calibration.posterior import fit_posterior as fit
from offramp.core.exits import Exits
from offramp.lm.given import Data, File, Prompts, TaskName, Texts, documents_of, named, run_folder, task_of
from offramp.runs.progress import shown
from offramp.training.answers import AnswerConfig

if TYPE_CHECKING:
    from offramp.calibration.posterior_report import PosteriorReport
    from offramp.core.language_model import LanguageModel
    from offramp.tasks import Task


def fit_posterior(
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
    config: PosteriorConfig | None = None,
    answering: AnswerConfig | None = None,
    window: int | None = None,
    about: Mapping[str, Any] | None = None,
    out: File | None = None,
    progress: Callable[..., None] | None = None,
) -> PosteriorReport:
    """Fit what the confidences "laplace", "conformal" and "avcs" need to the exits, and judge it on held-out texts.

    Exits with the posterior are written, not attached. A model without exits gets some of rank 0, and keeps them:

        print(offramp.fit_posterior(lm, task="summarisation", data="dev.json", out="runs/honest").table())
        lm = offramp.load("smollm2", exits="runs/honest/exits")

    Args:
        lm: The model, with its exits.
        texts: As for `offramp.train`, like all down to `limit`.
        columns: Keys of JSON objects whose texts are joined.
        prompts: Texts or chats that the model answers.
        task: What `data` are examples of.
        data: Files of examples, or examples.
        target: Second file of a parallel text.
        own_answers: Fit on the model's own answers to the task's questions, not on the references.
        limit: Use only the first of the texts, prompts and examples.
        config: What is fitted; None: `PosteriorConfig()`, all three.
        answering: How prompts are answered; None: greedily, in as many tokens as the task has, with the config's seed.
        window: Longest piece of a text, in tokens; None: 512, or the model's context if that is shorter.
        about: What else the record should say, as JSON values.
        out: Run folder; None: runs/posterior-NAME-TASK, with "text" for a task where there is none.
        progress: Called with what is done and asked for, and what it is.
            None: a bar in a terminal or a notebook, unless TQDM_DISABLE is set.

    Returns:
        How good it is, by exit; the exits are in the folder's exits/.

    Raises:
        ArgumentError: Arguments that do not go together, a ValueError.
        ValueError: Too few documents, layers that are no exits, or a folder of something else.
    """
    progress = shown(progress, "fitting", answers="answering")
    config = config or PosteriorConfig()
    what = None if task is None else task_of(task)
    if lm.exits is None:
        lm.attach_exits(Exits.fresh(lm.split, config.layers, rank=0))
    folder = run_folder("posterior", lm, "text" if what is None else what.name) if out is None else Path(out)
    window = window or min(512, lm.split.max_positions or 512)
    room = AnswerConfig.max_new_tokens if what is None else what.max_new_tokens
    own = own_answers or (what is not None and what.name == "prompts")  # which have no references
    documents = documents_of(
        lm, texts=texts, columns=columns, prompts=prompts, task=what, data=data, target=target,
        own_answers=own, limit=limit, answering=answering or AnswerConfig(room, chat=None, seed=config.seed),
        window=window, folder=folder, progress=progress,
    )  # fmt: skip
    given = next((each for each in (texts, data, prompts) if each is not None), None)
    said = {
        "data": "bundled" if given is None else named(given), "task": "text" if what is None else what.name,
        "own_answers": own_answers, "limit": limit, **(about or {}),
    }  # fmt: skip
    return fit(lm, documents, folder, config, window=window, about=said, progress=progress)

"""What `offramp` does with a language model and files: `train`, `evaluate`, `calibrate` and `distill`.

Each reads the files, makes what they say fit the model, and hands it to the function that does the work, which takes
the same and more. All but `distill` are methods of a `LanguageModel` as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offramp.calibration.calibrate import calibrate as certify
from offramp.calibration.promise import Promise
from offramp.core.policy import ExitPolicy
from offramp.distillation.language_models import TokenDistillation, distil
from offramp.evaluation.evaluate import evaluate as compare
from offramp.hub.prompts import bundled_prompts
from offramp.tasks import TASKS, Example, Task, fit, read_examples, take
from offramp.training.answers import AnswerConfig, answer_documents
from offramp.training.config import TrainConfig
from offramp.training.data import Document, prepare, read_texts, text_documents
from offramp.training.trainer import TrainResult
from offramp.training.trainer import train as train_exits
from offramp.values import choice

if TYPE_CHECKING:
    from offramp.calibration.grid import Grid
    from offramp.calibration.result import Calibration
    from offramp.core.language_model import LanguageModel, Prompt
    from offramp.distillation.token_report import TokenDistillResult
    from offramp.evaluation.result import Evaluation

File = str | os.PathLike[str]
TaskName = Literal["question-answering", "summarisation", "translation", "prompts"]
Texts = File | Sequence[str]
"""A file, as `offramp.training.data.read_texts` reads it, or the texts themselves."""


def train(
    lm: LanguageModel,
    texts: Texts | None = None,
    *,
    prompts: Sequence[Prompt] | None = None,
    config: TrainConfig | None = None,
    answering: AnswerConfig | None = None,
    window: int | None = None,
    held_out: float = 0.1,
    out: File | None = None,
    progress: Callable[..., None] | None = None,
) -> TrainResult:
    """Train exits, or a model with them, on texts and on the model's own answers to prompts.

    Started again in the same folder, an interrupted training goes on. The exits are written, not attached:

        result = lm.train("texts.jsonl", config=offramp.TrainConfig(steps=200), out="runs/lenses")
        lm = offramp.load("smollm2", exits=result.exits)

    Args:
        lm: The model.
        texts: A file of texts, or texts.
        prompts: Texts or chats that the model answers; None: the bundled ones if there are no texts either, else none.
        config: What is trained, and how; None: a lens for each of a few layers, 500 steps.
        answering: How prompts are answered; None: greedily, in the chat template if there is one.
        window: Longest piece of a text, in tokens; None: 256, or the model's context if that is shorter.
        held_out: Share of the texts and answers to judge by, which are not trained on.
        out: Run folder; None: runs/train-NAME.
        progress: See `offramp.training.trainer.train`.

    Returns:
        What was reached, and where the exits are.

    Raises:
        ValueError: The texts or prompts are too few or cannot be read, no exit is possible as asked for, or the folder
            holds a run with other options or data.
        FileNotFoundError: There is no such file of texts.
        TrainingError: The loss is not finite.
    """
    config = config or TrainConfig(steps=500)
    folder = _folder(out, "train", lm)
    documents = [] if texts is None else _documents(lm, texts)
    if prompts is not None or texts is None:
        answering = answering or AnswerConfig(chat=lm.has_chat_template, seed=config.seed)
        asked = bundled_prompts() if prompts is None else prompts
        documents += answer_documents(lm, asked, answering, folder / "answers.jsonl", progress)
    data = prepare(lm, documents, window=_window(lm, window), share=held_out, seed=config.seed)
    return train_exits(lm, data, config, folder, progress)


def evaluate(
    lm: LanguageModel,
    task: TaskName | Task,
    data: File | Sequence[Example],
    arms: Mapping[str, ExitPolicy | File] | None = None,
    *,
    static_layers: Sequence[int] | None = None,
    limit: int | None = None,
    longest: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    resamples: int = 2000,
    seed: int = 0,
    out: File | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare exit policies with static exits and the full model on a task.

    Started again in the same folder, an interrupted evaluation goes on:

        result = lm.evaluate("summarisation", "dev.json", {"mine": offramp.ExitPolicy(threshold=0.8)}, limit=50)
        print(result.table())

    Args:
        lm: The model.
        task: What is asked.
        data: A file of examples in one of the layouts of `offramp.tasks.read_examples`, or examples.
        arms: Policies, or files of them, by name; the full model and static exits are always there.
        static_layers: Layers of the static exits; None: those of the policies.
        limit: Use only this many examples, chosen at random by the seed.
        longest: Cut examples so that prompt and answer have at most this many tokens; None: the model's context.
        max_new_tokens: Longest answer; None: the task's.
        batch_size: Examples answered together.
        resamples: Of the bootstrap behind the intervals.
        seed: Of the choice and of the bootstrap.
        out: Run folder; None: runs/evaluate-NAME-TASK.
        progress: Called with the answers done and asked for, over all arms.

    Returns:
        Quality and cost of each policy, also written to the folder.

    Raises:
        ValueError: There is no such task, the file cannot be read, a policy does not fit the model, or the folder holds
            an evaluation of something else.
    """
    what, examples, about = _asked(lm, task, data, limit, longest, max_new_tokens, seed)
    policies = {name: _policy(policy) for name, policy in (arms or {}).items()}
    return compare(
        lm, what, examples, policies, _folder(out, "evaluate", lm, what.name), static_layers=static_layers,
        max_new_tokens=max_new_tokens, batch_size=batch_size, about=about, resamples=resamples, seed=seed,
        progress=progress,
    )  # fmt: skip


def calibrate(
    lm: LanguageModel,
    task: TaskName | Task,
    data: File | Sequence[Example],
    policy: ExitPolicy | File | None = None,
    *,
    tolerance: float = 0.05,
    failure: float = 0.05,
    kind: Literal["risk", "signed", "tail", "textual"] = "risk",
    metric: str | None = None,
    margin: float | None = None,
    bound: Literal["hoeffding", "hoeffding-bentkus", "binomial", "wsr", "crc"] | None = None,
    unit: Literal["prompt", "group"] = "prompt",
    grid: Grid | None = None,
    minimise: Literal["flops-per-token", "flops", "seconds-per-token", "seconds"] = "flops-per-token",
    must_pay: bool = True,
    order: Literal["auto", "path", "chains", "pareto"] = "auto",
    tuning: float | None = None,
    test: float = 0.25,
    limit: int | None = None,
    longest: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    out: File | None = None,
    progress: Callable[..., None] | None = None,
) -> Calibration:
    """Certify the cheapest exit policy that keeps a promise on how much answers lose.

    The mean loss of new prompts is at most `tolerance`, and saying so is wrong with probability `failure` at most:

        result = lm.calibrate("summarisation", "dev.json", tolerance=0.05, failure=0.1)
        print(result.certificate.finding())
        lm.generate("The sun", policy="runs/calibrate-smollm2-summarisation/policy.json")

    Args:
        lm: The model.
        task: What is asked.
        data: A file of examples in one of the layouts of `offramp.tasks.read_examples`, or examples.
        policy: What to find a threshold for, or its file; None: `ExitPolicy()`.
        tolerance: What the mean loss of new prompts is to stay below, in (0, 1).
        failure: Probability with which that may fail, in (0, 1).
        kind: Of losses, as is `margin`: see `offramp.calibration.Promise`.
        metric: That losses are made of; None: the task's first.
        margin: Of the kind "tail".
        bound: By which it is certified; None: the one that suits the kind.
        unit: What is drawn independently: each prompt, or only each group of them.
        grid: What is tried; None: thresholds from 0.999 to 0, and static exits.
        minimise: The cost to have the least of, over the full model's.
        must_pay: Take no policy that does not cost less than the full model.
        order: How the grid is gone through: see `offramp.calibration.calibrate`, as for `tuning`.
        tuning: Share of the examples to choose by; None: 0.3 where something is chosen by them, else 0.
        test: Share of the examples held out to report by.
        limit: Use only this many examples, chosen at random by the seed.
        longest: Cut examples so that prompt and answer have at most this many tokens; None: the model's context.
        max_new_tokens: Longest answer; None: the task's.
        batch_size: Examples answered together.
        seed: Of the choice, of the division and of draws.
        out: Run folder; None: runs/calibrate-NAME-TASK.
        progress: Called with the answers done, asked for at most, and what comes next.

    Returns:
        The policy and its certificate, also written to the folder.

    Raises:
        ValueError: There is no such task, the file cannot be read, a value is not allowed, there are too few examples
            for the promise, or the folder holds answers made otherwise.
    """
    what, examples, about = _asked(lm, task, data, limit, longest, max_new_tokens, seed)
    promise = Promise(metric or what.metrics[0], tolerance, failure, kind, margin, bound, unit)
    base = ExitPolicy() if policy is None else _policy(policy)
    return certify(
        lm, what, examples, base, promise, _folder(out, "calibrate", lm, what.name), grid=grid, minimise=minimise,
        must_pay=must_pay, order=order, tuning=tuning, test=test, seed=seed, max_new_tokens=max_new_tokens,
        batch_size=batch_size, about=about, progress=progress,
    )  # fmt: skip


def distill(
    student: LanguageModel,
    teacher: LanguageModel,
    texts: Texts,
    *,
    config: TokenDistillation | None = None,
    window: int | None = None,
    held_out: float = 0.1,
    out: File | None = None,
    progress: Callable[..., None] | None = None,
) -> TokenDistillResult:
    """Let a language model learn from another one with the same tokens, on texts.

    Started again in the same folder, an interrupted distillation goes on. `offramp.distillation` has classifiers, own
    answers and groups:

        result = offramp.distill(offramp.load("small"), offramp.load("large"), "texts.jsonl", out="runs/small")
        print(result.table())

    Args:
        student: Its weights change.
        teacher: Does not change.
        texts: A file of texts, or texts.
        config: How; None: `TokenDistillation()`, all weights in 500 steps.
        window: Longest piece of a text, in tokens; None: 256, or the student's context if that is shorter.
        held_out: Share of the texts to judge by, which are not trained on.
        out: Run folder; None: runs/distill-NAME.
        progress: Called with the steps (or tokens) done and to do, and the loss.

    Returns:
        What was reached, and where the student is.

    Raises:
        ValueError: The vocabularies differ, the texts are too few or cannot be read, or the folder holds a run with
            other options or data.
        NotFiniteError: The teacher computes NaN or infinity.
        FileNotFoundError: There is no such file of texts.
        TrainingError: The loss is not finite.
    """
    config = config or TokenDistillation()
    documents = _documents(student, texts)
    data = prepare(student, documents, window=_window(student, window), share=held_out, seed=config.training.seed)
    return distil(student, teacher, data, config, _folder(out, "distill", student), progress=progress)


# ---------------------------------------------------------------- what is given


def _folder(out: File | None, verb: str, lm: LanguageModel, *task: str) -> Path:
    """Where a run is written, as on the command line: of an address of a model, the end is its name."""
    return Path("runs") / "-".join((verb, Path(lm.name).name, *task)) if out is None else Path(out)


def _documents(lm: LanguageModel, texts: Texts) -> list[Document]:
    given = read_texts(Path(texts)) if isinstance(texts, str | os.PathLike) else texts
    return text_documents(lm, given)


def _window(lm: LanguageModel, window: int | None) -> int:
    return min(256, lm.split.max_positions or 256) if window is None else window


def _policy(policy: ExitPolicy | File) -> ExitPolicy:
    return policy if isinstance(policy, ExitPolicy) else ExitPolicy.load(policy)


def _asked(
    lm: LanguageModel, task: TaskName | Task, data: File | Sequence[Example], limit: int | None, longest: int | None,
    room: int | None, seed: int,
) -> tuple[Task, list[Example], dict[str, Any]]:  # fmt: skip
    """The task, examples whose prompts fit, and what is to be said of them."""
    if not isinstance(task, Task):
        choice("task", task, tuple(TASKS))
        task = TASKS[task]
    named = isinstance(data, str | os.PathLike)
    found = read_examples(task, os.fspath(data)) if isinstance(data, str | os.PathLike) else data
    examples, cut = fit(lm, task, take(found, limit, seed), longest=longest, room=room)
    return task, examples, {"name": str(data) if named else "examples", "limit": limit, "shortened": cut}

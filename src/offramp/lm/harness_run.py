"""`offramp evaluate --harness`: exit policies on tasks of lm-evaluation-harness, beside the full model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

import lm_eval

from offramp.lm.harness import HarnessModel, Spent
from offramp.metrics.intervals import Bootstrap, Interval
from offramp.runs.machine import describe
from offramp.runs.results import Result
from offramp.runs.tables import cell, markdown

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy

FULL = "full"


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task under one arm.

    Attributes:
        task: Its name; of a group, also the group's and those of its parts.
        metric: The metric and the filter of answers, such as "acc,none".
        arm: Name of the policy, or "full".
        value: As lm-eval reports it.
        stderr: Its standard error, as lm-eval reports it; None where it does not.
        difference: The mean over documents of their score minus the full model's of the same document, with a 95 %
            bootstrap interval over documents. None of the full model, and where documents have no scores of their own.
        documents: How many the difference is over.
    """

    task: str
    metric: str
    arm: str
    value: float
    stderr: float | None
    difference: Interval | None
    documents: int


@dataclass(frozen=True)
class HarnessCost:
    """What one arm's requests of one task cost.

    Attributes:
        task: As it was asked for.
        arm: Name of the policy, or "full".
        tokens: Generated or scored.
        mean_layer: That they left at, 1..L.
        flops_over_full: FLOPs over those of the full model for the same prompts and as many tokens, prompts included.
        seconds: Wall-clock time of all requests.
        seconds_over_full: Over those of the full model's own requests, whose answers may have other lengths. Arms ran
            one after the other, once: no figure to compare small differences by.
    """

    task: str
    arm: str
    tokens: int
    mean_layer: float
    flops_over_full: float
    seconds: float
    seconds_over_full: float


@dataclass(frozen=True)
class HarnessResult(Result):
    """Scores and costs of all arms.

    Attributes:
        model: Name of the model.
        num_layers: L.
        policies: By arm; the full model's is None.
        scores: In the order of tasks, metrics and arms.
        costs: In the order of tasks and arms.
        settings: Settings of lm-eval: few-shot examples, limit, batch size, its version.
        machine: What it ran on.
    """

    schema: ClassVar[str] = "offramp/harness/1"
    noun: ClassVar[str] = "evaluation by lm-evaluation-harness"

    model: str
    num_layers: int
    policies: dict[str, dict[str, Any] | None]
    scores: list[HarnessScore]
    costs: list[HarnessCost]
    settings: dict[str, Any]
    machine: dict[str, Any]

    def _rows(self) -> Iterable[Any]:
        """A row per score, as `HarnessScore` has them."""
        return self.scores

    def table(self) -> str:
        """Scores, then costs."""
        scores = [
            [one.task, one.metric, one.arm, _with_error(one), _with_ends(one.difference), str(one.documents or "")]
            for one in self.scores
        ]
        costs = [
            [one.task, one.arm, str(one.tokens), cell(one.mean_layer, ".1f"), cell(one.flops_over_full),
             cell(one.seconds, ".1f"), cell(one.seconds_over_full)]
            for one in self.costs
        ]  # fmt: skip
        return "\n\n".join((
            markdown(["task", "metric", "arm", "score ± stderr", "minus full's (95 %)", "documents"], scores),
            markdown(["task", "arm", "tokens", f"of {self.num_layers} layers", "FLOPs/full's", "s", "s/full's"], costs),
            "Differences are paired by document. Log-likelihoods force the text on the generation loop, token by "
            "token, also for the full model; the first token of each is read off the prompt's pass. FLOPs and seconds "
            "include prompts. Arms ran one after the other, once.",
        ))  # fmt: skip


def evaluate_harness(
    lm: LanguageModel,
    tasks: Sequence[str],
    policies: Mapping[str, ExitPolicy],
    *,
    include: str | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    chat: bool = False,
    resamples: int = 2000,
    seed: int = 0,
    manager: Any = None,
    progress: Callable[..., None] | None = None,
) -> HarnessResult:
    """Let lm-evaluation-harness judge a model with exits and the full one, on the same documents.

    Args:
        lm: The model, decoder-only.
        tasks: Names of tasks or groups that lm-eval knows.
        policies: By the names they are to have; the full model is always judged as well.
        include: Folder of further tasks.
        fewshot: Examples in each prompt; None: the task's.
        limit: Only the first documents of each task; None: all.
        batch_size: Requests answered together.
        chat: Whether prompts are put in the chat template.
        resamples: Draws of the bootstrap.
        seed: Seed of these draws.
        manager: An `lm_eval.tasks.TaskManager`; None: one with lm-eval's tasks and those of `include`.
        progress: Called with the tasks done under one arm, all of them, and what is next.

    Returns:
        Scores and costs.

    Raises:
        ValueError: No task, an unknown one, a policy named "full", or one that does not fit the model or the task.
    """
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise ValueError("no task is given; name one that lm-eval knows, such as arc_easy")
    if FULL in policies:
        raise ValueError(f"a policy is called {FULL!r}, which is the full model's name; rename it")
    manager = manager or TaskManager(include_path=include)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"lm-eval knows no task {unknown[0]!r}; `lm_eval ls tasks` lists them, --include adds yours")
    arms: dict[str, ExitPolicy | None] = {FULL: None, **policies}
    models = {name: HarnessModel(lm, policy, batch_size=batch_size) for name, policy in arms.items()}
    scores: list[HarnessScore] = []
    costs: list[HarnessCost] = []
    for place, task in enumerate(tasks):
        found, spent = {}, {}
        for turn, (name, model) in enumerate(models.items()):
            if progress is not None:
                progress(place * len(arms) + turn, len(tasks) * len(arms), f"{task}, {name}")
            model.spent = Spent()
            found[name] = lm_eval.simple_evaluate(
                model, tasks=[task], num_fewshot=fewshot, limit=limit, batch_size=batch_size, task_manager=manager,
                apply_chat_template=chat, bootstrap_iters=1000,
            )  # fmt: skip
            spent[name] = model.spent
        scores += _scores(found, resamples, seed)
        costs += [_cost(task, name, one, spent[FULL]) for name, one in spent.items()]
    settings = {
        "fewshot": fewshot, "limit": limit, "batch_size": batch_size, "chat": chat, "resamples": resamples,
        "seed": seed, "dtype": lm.number_format, "lm_eval": version("lm-eval"),
    }  # fmt: skip
    saved = {name: None if policy is None else policy.to_dict() for name, policy in arms.items()}
    return HarnessResult(lm.name, lm.num_layers, saved, scores, costs, settings, describe(lm.split.device))


def _scores(found: Mapping[str, Any], resamples: int, seed: int) -> list[HarnessScore]:
    """All metrics of what was asked for, arm by arm."""
    scores = []
    for task, values in found[FULL]["results"].items():
        for metric in (name for name, value in values.items() if "," in name and _is_score(name, value)):
            theirs = _by_document(found[FULL], task, metric)
            for arm, result in found.items():
                mine = {} if arm == FULL else _by_document(result, task, metric)
                both = sorted(set(mine) & set(theirs))
                difference = None
                if both:
                    draws = Bootstrap([str(document) for document in both], resamples=resamples, seed=seed)
                    difference = draws.mean([mine[document] - theirs[document] for document in both])
                reported = result["results"][task]
                error = reported.get(metric.replace(",", "_stderr,", 1))
                scores.append(
                    HarnessScore(
                        task, metric, arm, float(reported[metric]), float(error) if _is_number(error) else None,
                        difference, len(both),
                    )
                )  # fmt: skip
    return scores


def _is_score(name: str, value: Any) -> bool:
    return "_stderr," not in name and _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _by_document(result: Mapping[str, Any], task: str, metric: str) -> dict[int, float]:
    """Scores of single documents; empty where a metric has none, such as a perplexity or a group's."""
    name, _, chosen = metric.partition(",")
    samples = [one for one in result["samples"].get(task, ()) if one["filter"] == chosen and name in one]
    if not all(_is_number(one[name]) for one in samples):
        return {}
    return {one["doc_id"]: float(one[name]) for one in samples}


def _cost(task: str, arm: str, spent: Spent, full: Spent) -> HarnessCost:
    values = spent.to_dict()
    return HarnessCost(
        task, arm, spent.tokens, values["mean_layer"], values["flops_over_full"], spent.seconds,
        spent.seconds / full.seconds if full.seconds else 1.0,
    )  # fmt: skip


def _with_error(score: HarnessScore) -> str:
    return cell(score.value) if score.stderr is None else f"{cell(score.value)} ± {cell(score.stderr)}"


def _with_ends(found: Interval | None) -> str:
    if found is None:
        return ""
    ends = "" if found.low is None or found.high is None else f" ({found.low:+.3f} to {found.high:+.3f})"
    return f"{found.value:+.3f}{ends}"

"""`offramp.calibrate`: the cheapest exit policy that keeps a promise, with its certificate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offramp.calibration import Promise
from offramp.calibration.calibrate import calibrate as certify
from offramp.core.policy import ExitPolicy
from offramp.lm.given import Data, File, TaskName, fitting, named, run_folder, task_of
from offramp.runs.progress import shown
from offramp.tasks import Task

if TYPE_CHECKING:
    from offramp.calibration.grid import Grid
    from offramp.calibration.result import Calibration
    from offramp.core.language_model import LanguageModel


def calibrate(
    lm: LanguageModel,
    task: TaskName | Task,
    data: Data,
    policy: ExitPolicy | File | None = None,
    *,
    target: File | None = None,
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
    repeats: int = 0,
    reference: LanguageModel | None = None,
    limit: int | None = None,
    longest: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
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
        target: Second file of a parallel text.
        tolerance: What the mean loss of new prompts is to stay below, in (0, 1).
        failure: Probability with which that may fail, in (0, 1).
        kind: Kind of losses, as is `margin`: see `offramp.calibration.Promise`.
        metric: That losses are made of; None: the task's first.
        margin: Margin of the kind "tail".
        bound: By which it is certified; None: the one that suits the losses.
        unit: What is drawn independently: each prompt, or only each group of them.
        grid: What is tried; None: thresholds from 0.999 to 0, and static exits.
        minimise: The cost to have the least of, over the full model's.
        must_pay: Take no policy that does not cost less than the full model.
        order: How the grid is gone through: see `offramp.calibration.calibrate`, as for `tuning`.
        tuning: Share of the examples to choose by; None: 0.3 where something is chosen by them, else 0.
        test: Share of the examples held out to report by.
        repeats: Calibrations repeated over random splits, to see how often the promise is broken.
        reference: The same model in another number format, whose full depth losses and costs are relative to; None:
            `lm` itself.
        limit: Use only this many examples, chosen at random by the seed.
        longest: Cut examples so that prompt and answer have at most this many tokens; None: the model's context.
        max_new_tokens: Longest answer; None: the task's.
        batch_size: Examples answered together.
        seed: Seed of the choice, of the division and of draws.
        about: What else the certificate should say of the data, as JSON values.
        out: Run folder; None: runs/calibrate-NAME-TASK.
        progress: Called with the answers done, asked for at most, and what comes next.
            None: a bar in a terminal or a notebook, unless TQDM_DISABLE is set.

    Returns:
        The policy and its certificate, also written to the folder.

    Raises:
        ArgumentError: Arguments that do not go together, a ValueError.
        ValueError: There is no such task, the file cannot be read, a value is not allowed, there are too few examples
            for the promise, or the folder holds answers made otherwise.
    """
    progress = shown(progress, "calibrating")
    what = task_of(task)
    promise = Promise(metric or what.metrics[0], tolerance, failure, kind, margin, bound, unit)
    base = ExitPolicy() if policy is None else policy if isinstance(policy, ExitPolicy) else ExitPolicy.load(policy)
    examples, cut = fitting(lm, what, data, target, limit, seed, longest, max_new_tokens)
    return certify(
        lm, what, examples, base, promise, run_folder("calibrate", lm, what.name) if out is None else Path(out),
        grid=grid, minimise=minimise, must_pay=must_pay, order=order, tuning=tuning, test=test, seed=seed,
        max_new_tokens=max_new_tokens, batch_size=batch_size, repeats=repeats, reference=reference, progress=progress,
        about={"name": named(data), "limit": limit, "shortened": cut, **(about or {})},
    )  # fmt: skip

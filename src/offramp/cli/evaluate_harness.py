"""`offramp evaluate --harness`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.cli import options as o


def evaluate_harness(
    model: o.Model,
    harness: Annotated[
        str, typer.Option(metavar="TASK[,TASK]", help="Tasks or groups of lm-evaluation-harness: arc_easy,gsm8k, …")
    ],
    policy: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A policy saved as JSON; may be given several times. None: the full model."),
    ] = None,
    exits: o.Exits = None,
    include: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder of further tasks, as YAML.")] = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples in each prompt; default: the task's.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first documents of each task.")] = None,
    batch_size: o.AnsweredTogether = 1,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Put prompts in the chat template.")] = False,
    resamples: Annotated[int, typer.Option(help="Draws of the bootstrap behind the intervals.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the intervals.")] = 0,
    dtype: o.Dtype = "float32",
    engine: o.Engine = "auto",
    device: o.Device = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where results go; default: runs/harness-MODEL.")
    ] = None,
    json: o.JsonPath = None,
) -> None:
    """Exit policies on tasks of lm-evaluation-harness, beside the full model: scores, and what they cost.

    Answers are generated with exits. A log-likelihood scores each token of the continuation by the readout of the exit
    at which the policy would leave it; the first is read off the prompt's pass, so choices of one token score as the
    full model's.
    """
    import offramp
    from offramp.lm.given import run_folder

    run, chosen = _harness(), o.policies_of(policy)
    lm = offramp.load(model, dtype=dtype, device=device, exits=exits, engine=engine)
    with o.progress("evaluating") as progress:
        result = run(
            lm, o.names(harness), chosen,
            include=None if include is None else str(include), fewshot=fewshot, limit=limit, batch_size=batch_size,
            chat=chat, resamples=resamples, seed=seed, progress=progress,
        )  # fmt: skip
    o.say(result.table(), json)
    for path in result.save(out or run_folder("harness", lm)):
        o.note(f"wrote {path}")
    o.write_result(result.to_dict(), json)


def _harness() -> Any:
    """The function that does it, or an error that says what to install."""
    try:
        from offramp.lm.harness_run import evaluate_harness as run
    except ModuleNotFoundError as error:
        raise ValueError(f"--harness needs {error.name}; install it with: pip install 'offramp[harness]'") from None
    return run

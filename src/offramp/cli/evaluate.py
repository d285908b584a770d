"""`offramp evaluate`, with `--harness` or without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy
    from offramp.evaluation import Evaluation

PERPLEXITY = "perplexity"
SWEEP = {"confidence": "softmax,jsd", "threshold": "0.5,0.7,0.9", "vocabulary": "none,fixed"}


def evaluate(
    model: o.Model,
    task: Annotated[
        str,
        typer.Option(
            help="summarisation, question-answering, translation, prompts (of your own), or perplexity of a text. With "
            "image-classification and text-classification this is evaluate-classifier."
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="The examples: SQuAD's JSON, rows of dialogue and summary, parallel text, plain text for perplexity; "
            "or hub:OWNER/NAME. Several only for perplexity.",
        ),
    ],
    target: Annotated[Path | None, typer.Option(metavar="FILE", help="Translations of the lines of --data.")] = None,
    languages: o.Languages = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate only this many examples, chosen at random.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of examples and of the intervals.")] = 0,
    arms: Annotated[
        str | None,
        typer.Option(help="default: the source documents' policies (softmax, its prunings, contrastive, jsd) at 0.9."),
    ] = None,
    policy: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A policy saved as JSON; may be given several times.")
    ] = None,
    static: Annotated[
        str | None,
        typer.Option(
            help="Static exits, such as 15,20,25, or none; default: the trained exits; without any, three layers, with "
            "--sweep every layer from the first one tested."
        ),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="All combinations of the four options below; what is not given: softmax,jsd × 0.5,0.7,0.9 × two "
            "layers × none,fixed.",
        ),
    ] = False,
    confidence: Annotated[
        str | None,
        typer.Option(
            help="softmax, max, entropy, state, classifier, contrastive, jsd, laplace, conformal or avcs; several with "
            "commas make several arms."
        ),
    ] = None,
    threshold: Annotated[str | None, typer.Option(help="Leave above this confidence; several with commas.")] = None,
    min_layer: Annotated[
        str | None,
        typer.Option(help="First layer tested (of the trained exits, if there are any); several with commas."),
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            help="none, fixed, decaying, adaptive, frequent, frequent-fixed, …; several with commas (see generate)."
        ),
    ] = None,
    vocabulary_size: o.VocabularySize = None,
    skipped: o.Skipped = None,
    prompt_layer: o.PromptLayer = None,
    exits: o.Exits = None,
    max_new_tokens: o.AnswerTokens = None,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens of a passage of text, for perplexity; default: 256, or what the context holds."),
    ] = None,
    longest: o.Longest = None,
    batch_size: o.AnsweredTogether = 1,
    resamples: Annotated[int, typer.Option(help="Draws of the bootstrap behind the intervals.")] = 2000,
    dtype: o.Dtype = "float32",
    engine: o.Engine = "auto",
    device: o.Device = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the run is written; default: runs/evaluate-MODEL-TASK.")
    ] = None,
    json: o.JsonPath = None,
) -> None:
    """Quality and cost of exit policies on a task, beside the full model and static exits, with intervals.

    Started again with the same options, an interrupted evaluation goes on; other policies may be added to its folder.
    `--harness TASK` instead of --task and --data takes tasks of lm-evaluation-harness (`evaluate-harness --help`).
    `accelerate launch -m offramp evaluate …` (on CPUs `torchrun --nproc-per-node N -m offramp evaluate …`) divides the
    examples among processes.
    """
    import offramp
    from offramp.evaluation import static_sweep
    from offramp.hub.pretrained import process_device
    from offramp.lm.given import run_folder

    what = _asked(task, languages)
    state, place = process_device(device)
    lm = offramp.load(model, dtype=dtype, device=place, exits=exits, engine=engine)
    chosen = _arms(
        lm, arms=arms, files=policy or [], sweep=sweep, confidence=confidence, threshold=threshold,
        min_layer=min_layer, vocabulary=vocabulary, vocabulary_size=vocabulary_size, skipped=skipped,
        prompt_layer=prompt_layer,
    )  # fmt: skip
    layers = o.numbers(static, "--static", int, none=True)
    if layers is None and sweep:
        layers = static_sweep(lm, chosen)
    folder = out or run_folder("evaluate", lm, task)
    with o.progress("evaluating") as progress:
        result = offramp.evaluate(
            lm, what, data, {**chosen, **{file.stem: file for file in policy or []}}, target=target,
            static_layers=layers, limit=limit, longest=longest, max_new_tokens=max_new_tokens, window=window,
            batch_size=batch_size, resamples=resamples, seed=seed, about={"command": o.command_line()}, out=folder,
            progress=progress,
        )  # fmt: skip
    if not state.is_main_process:
        return
    o.say(result.table(), json)
    o.note(f"wrote {folder}: records, results.json, table.md and pictures")
    o.next_steps({"look at it with": ["report", str(folder)], **_promises(result, model, task, data, exits, dtype)})
    o.write_result(result.to_dict(), json)


def _asked(task: str, languages: str | None) -> Any:
    """What the verb is asked; perplexity is of a text, in whatever language."""
    if task != PERPLEXITY:
        return o.task_named(task, languages)
    if languages is not None:
        raise typer.BadParameter(f"--languages with --task {task}: only for examples and answers; leave it out")
    return task


def _promises(
    result: Evaluation, model: str, task: str, data: list[str], exits: str | None, dtype: str
) -> dict[str, list[str | None]]:  # fmt: skip
    """The command that makes a promise of the first recommended policy."""
    good = result.recommended() if task != PERPLEXITY else []
    if not good:
        return {}
    policy = result.arm(good[0]).policy or {}
    words: list[str | None] = ["calibrate", model, "--task", task, "--data", *data]
    given = {"--exits": exits, "--dtype": None if dtype == "float32" else dtype}
    given |= {f"--{name.replace('_', '-')}": policy[name] for name in ("confidence", "vocabulary", "prompt_layer")}
    given["--skipped"] = None if policy["skipped"] == "propagate" else policy["skipped"]
    words += [str(word) for option, value in given.items() if value is not None for word in (option, value)]
    return {f"find a threshold with a promise for {good[0]}, on examples that it was not chosen by, with": words}


def _arms(
    lm: LanguageModel, *, arms: str | None, files: list[Path], sweep: bool, vocabulary_size: int | None,
    skipped: str | None, prompt_layer: int | None, **given: str | None,
) -> dict[str, ExitPolicy]:  # fmt: skip
    """The policies asked for, by name."""
    from offramp.core.vocabulary import rule_of
    from offramp.evaluation import document_arms, grid, sweep_layers

    if arms not in (None, "default"):
        raise typer.BadParameter(f"--arms {arms}: there is only 'default'; name policies with --policy or --confidence")
    chosen: dict[str, ExitPolicy] = {}
    if arms is not None:
        chosen |= document_arms(lm, prompt_layer=prompt_layer)
    chosen |= o.policies_of(files, chosen)
    if sweep:
        layers = ",".join(map(str, sweep_layers(lm)))
        given = {name: value or {**SWEEP, "min_layer": layers}[name] for name, value in given.items()}
    kinds = [None if kind == "none" else kind for kind in (given["vocabulary"] or "none").split(",")]
    if vocabulary_size is not None and not any(map(rule_of, kinds)):
        raise typer.BadParameter(
            f"--vocabulary-size {vocabulary_size}: no readout is pruned; add --vocabulary fixed, decaying or adaptive"
        )
    if not sweep and not any((*given.values(), vocabulary_size, skipped, prompt_layer and arms is None)):
        return chosen
    return chosen | grid(
        lm,
        confidences=(given["confidence"] or "softmax").split(","),
        thresholds=o.numbers(given["threshold"], "--threshold", float) or (0.9,),
        min_layers=o.numbers(given["min_layer"], "--min-layer", int) or (None,),
        vocabularies=kinds,
        vocabulary_size=vocabulary_size,
        skipped=skipped or "propagate",
        prompt_layer=prompt_layer,
    )


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

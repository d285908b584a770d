"""`offramp calibrate`, with `--posterior` or without."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o

if TYPE_CHECKING:
    from offramp.calibration import Certificate


_FITTED = ("alpha", "candidates", "draws", "evidence", "to_text", "own_answers", "layers")
"""Options of --posterior alone."""
_PROMISED = (
    "tolerance", "failure", "kind", "metric", "margin", "bound", "unit", "minimise", "even_if_it_does_not_pay",
    "confidence", "static", "skipped", "accept", "prompt_layer", "policy", "threshold", "min_layer", "per_layer",
    "gains", "order", "tuning_share", "test_share", "validate", "batch_size", "reference_dtype", "engine",
)  # fmt: skip
"""Options of a policy with a promise, which --posterior does not look for."""


def calibrate(
    context: typer.Context,
    model: o.Model,
    task: Annotated[
        str,
        typer.Option(
            help="summarisation, question-answering, translation, or prompts (of your own). With image-classification "
            "and text-classification this is calibrate-classifier."
        ),
    ],
    data: Annotated[
        str, typer.Option(metavar="FILE", help="The examples, in the layouts of evaluate; or hub:OWNER/NAME.")
    ],
    target: Annotated[Path | None, typer.Option(metavar="FILE", help="Translations of the lines of --data.")] = None,
    languages: o.Languages = None,
    tolerance: Annotated[float, typer.Option(help="What the mean loss of new prompts is to stay below.")] = 0.05,
    failure: Annotated[float, typer.Option(help="Probability with which that may fail.")] = 0.05,
    kind: Annotated[
        str,
        typer.Option(
            help="Kind of losses. risk: how much worse than the full model's the answer is, clipped at 0 prompt by "
            "prompt; signed: the same unclipped; tail: whether it is worse by more than --margin; textual: how far "
            "it is from the full model's answer, without references."
        ),
    ] = "risk",
    metric: Annotated[str | None, typer.Option(help="That losses are made of; default: the task's first.")] = None,
    margin: Annotated[float | None, typer.Option(help="Margin of --kind tail.")] = None,
    bound: Annotated[
        str | None,
        typer.Option(
            help="hoeffding, hoeffding-bentkus, binomial (losses of 0 or 1), wsr (betting), or crc (a guarantee on the "
            "mean, without failure probability); default: binomial where losses are 0 or 1 (tail, exact_match), wsr "
            "for signed, else hoeffding-bentkus."
        ),
    ] = None,
    unit: Annotated[
        str,
        typer.Option(help="What is independent: each prompt, or only each group of them (questions on one article)."),
    ] = "prompt",
    minimise: Annotated[
        str,
        typer.Option(
            help="The cost that the policy has the least of, over the full model's on the same prompts: "
            "flops-per-token (generated after the prompt), flops (prompts included), seconds-per-token or seconds (of "
            "the tuning part, on which all settings then take turns)."
        ),
    ] = "flops-per-token",
    even_if_it_does_not_pay: Annotated[
        bool,
        typer.Option(
            "--even-if-it-does-not-pay",
            help="Write the cheapest certified policy even where the full model, which loses nothing, costs no more.",
        ),
    ] = False,
    confidence: o.Confidence = None,
    static: Annotated[
        str | None,
        typer.Option(
            help="Static exits to try beside the policy, such as 20,25, or none; default: up to four of the trained "
            "exits."
        ),
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            help="Prune the readout: none, fixed, decaying, adaptive, frequent, frequent-fixed, …; several, with "
            "commas, are tried."
        ),
    ] = None,
    skipped: Annotated[
        str | None,
        typer.Option(
            help="Keys and values of skipped layers: propagate (approximate), defer (exact), verify (lossless); "
            "several, with commas, are tried."
        ),
    ] = None,
    accept: Annotated[
        str | None,
        typer.Option(
            help="Under --skipped verify: a drafted token also stands as the full model's second choice with at least "
            "this share of the first one's probability; 1 is lossless; several, with commas, are tried."
        ),
    ] = None,
    prompt_layer: o.PromptLayer = None,
    policy: o.PolicyFile = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            help="To try, with commas; default: 16 from 0.999 to 0, finer near 1. none: no exit of the policy is "
            "tried, so that with --reference-dtype and --static none the number format alone is certified."
        ),
    ] = None,
    min_layer: Annotated[str | None, typer.Option(help="First layers tested, to try, such as 10,15,20.")] = None,
    vocabulary_size: Annotated[str | None, typer.Option(help="Tokens kept, to try, such as 500,2000.")] = None,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer",
            help="A threshold for each layer, from the tuning part: --threshold are then shares of the tokens that "
            "would leave wrongly and are kept in; default: 14 from 1 to 0.1.",
        ),
    ] = False,
    gains: Annotated[
        str | None,
        typer.Option(
            help="Try thresholds for each layer by gain, too: leave where the tuning part's share of wrong tokens is "
            "below this times the FLOPs that leaving saves (of a full token's); with commas, or default: 10 from 0.02 "
            "to 2."
        ),
    ] = None,
    order: Annotated[
        str,
        typer.Option(
            help="How the grid is gone through. path: one sequence, from safe to bold; chains: one per combination of "
            "all but thresholds; static exits have a sequence of their own in both, and each its share of the failure; "
            "pareto: the front of loss and cost on the tuning part, of what pays there; auto: "
            "pareto for several combinations and 400 examples or more, else path."
        ),
    ] = "auto",
    tuning_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the examples, to choose by; default: 0.3 for pareto, --per-layer, --gains and seconds, "
            "else 0."
        ),
    ] = None,
    test_share: Annotated[float, typer.Option(help="Share of the examples, held out to report by.")] = 0.25,
    limit: Annotated[int | None, typer.Option(help="Use only this many examples, chosen at random.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice, of the splits and of the order of draws.")] = 0,
    validate: Annotated[
        int,
        typer.Option(
            metavar="R",
            help="Repeat the calibration R times, by draws with replacement and by splits; count broken promises.",
        ),
    ] = 0,
    posterior: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Instead of a policy, fit what these confidences need to the exits: some of laplace,conformal,avcs; "
            "of --task text as well, for plain texts. Writes exits; options from --alpha to --layers belong to it.",
        ),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Share of tokens whose sets may miss the true one.")] = 0.1,
    candidates: Annotated[int, typer.Option(help="Most probable tokens that are uncertain, or in a set.")] = 64,
    draws: Annotated[int, typer.Option(help="Draws of the posterior of laplace.")] = 20,
    evidence: Annotated[
        float, typer.Option(help="What laplace multiplies the number of tokens with: texts are dependent.")
    ] = 0.1,
    to_text: Annotated[
        bool, typer.Option("--to-text", help="True tokens are the text's own; default: those of the full model.")
    ] = False,
    own_answers: Annotated[
        bool, typer.Option("--own-answers", help="Fit on the model's own answers, not on the references of --data.")
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(help="Exits to fit, such as 15,20,25; default: those of --exits, or chosen by the depth."),
    ] = None,
    exits: o.Exits = None,
    max_new_tokens: o.AnswerTokens = None,
    longest: o.Longest = None,
    batch_size: o.AnsweredTogether = 1,
    dtype: o.Dtype = "float32",
    reference_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Number format of the full model that losses and costs are relative to, such as bfloat16 for --dtype "
            "int8; default: that of --dtype.",
        ),
    ] = None,
    engine: o.Engine = "auto",
    device: o.Device = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the run is written; default: runs/calibrate-MODEL-TASK."),
    ] = None,
    json: o.JsonPath = None,
) -> None:
    """Find the cheapest exit policy that keeps a promise, and write it with its certificate.

    Settings are tried from safe to bold, until one fails; static exits, and a shortened prompt without exits, are among
    them. If none passes, or none that passes costs less than the full model, the policy that is written never leaves
    early. Started again with the same options, an interrupted calibration goes on. `accelerate launch -m offramp
    calibrate …` (on CPUs `torchrun --nproc-per-node N -m offramp calibrate …`) divides the examples among processes.

    With --posterior, fit what the confidences laplace, conformal and avcs need, on the tokens of texts, instead: exits
    with a posterior are written, with how well calibrated they are on held-out texts.
    """
    if posterior is None:
        o.refuse(context, _FITTED, "only for --posterior, which fits probabilities; a promise has --tolerance instead")
    else:
        o.refuse(context, _PROMISED, "only for a policy with a promise; leave out either these or --posterior")
        _fit_posterior(
            model, posterior, task=task, data=data, target=target, languages=languages, own_answers=own_answers,
            limit=limit, max_new_tokens=max_new_tokens, longest=longest, exits=exits, layers=layers, dtype=dtype,
            device=device, out=out, json=json, candidates=candidates, alpha=alpha, draws=draws, evidence=evidence,
            vocabulary=vocabulary, vocabulary_size=_one_size(vocabulary_size), to_text=to_text, seed=seed,
        )  # fmt: skip
        return
    import offramp
    from offramp.calibration import GAINS, Grid
    from offramp.calibration.statement import warning
    from offramp.hub.pretrained import process_device
    from offramp.lm.given import run_folder

    asked = o.task_named(task, languages)
    starts = o.numbers(min_layer, "--min-layer", int)
    first = None if starts is None or confidence != "static" else max(starts)  # a static policy cannot do without
    kinds, ways = _several(vocabulary), _several(skipped)
    base = o.policy_from(
        policy, confidence=confidence, vocabulary=kinds[0] if len(kinds) == 1 else None,
        skipped=ways[0] if len(ways) == 1 else None, min_layer=first, prompt_layer=prompt_layer,
    )  # fmt: skip
    grid = Grid(
        o.numbers(threshold, "--threshold", float, none=True), starts,
        o.numbers(vocabulary_size, "--vocabulary-size", int),
        per_layer, o.numbers(static, "--static", int, none=True),
        kinds if len(kinds) > 1 else None, tuple(filter(None, ways)) if len(ways) > 1 else None,
        GAINS if gains == "default" else o.numbers(gains, "--gains", float),
        o.numbers(accept, "--accept", float),
    )  # fmt: skip
    choices: dict[str, Any] = {"kind": kind, "bound": bound, "unit": unit, "minimise": minimise, "order": order}
    state, place = process_device(device)
    lm = offramp.load(model, dtype=dtype, device=place, exits=exits, engine=engine)
    reference = None
    if reference_dtype not in (None, dtype):
        reference = offramp.load(model, dtype=reference_dtype, device=place, engine=engine)
    folder = out or run_folder("calibrate", lm, task)
    with o.progress("calibrating") as progress:
        result = offramp.calibrate(
            lm, asked, data, base, target=target, tolerance=tolerance, failure=failure, metric=metric, margin=margin,
            grid=grid, must_pay=not even_if_it_does_not_pay, tuning=tuning_share, test=test_share, repeats=validate,
            reference=reference, limit=limit, longest=longest, max_new_tokens=max_new_tokens, batch_size=batch_size,
            seed=seed, about={"command": o.command_line()}, out=folder, progress=progress, **choices,
        )  # fmt: skip
    if not state.is_main_process:
        return
    o.say(result.table(), json)
    o.note(result.certificate.finding())
    if not result.certificate.certified and not result.certificate.pays_nothing:
        o.note(f"NOTHING CERTIFIED: {folder / 'policy.json'} never leaves early ({_why(result.certificate)})")
    elif against := warning(result.certificate):
        o.note(against)
    room = asked.max_new_tokens if max_new_tokens is None else max_new_tokens
    use = ["offramp", "generate", model, "--policy", str(folder / "policy.json"), "--max-new-tokens", str(room)]
    use += [] if exits is None else ["--exits", exits]
    use += [] if dtype == "float32" else ["--dtype", dtype]
    left = f"use the full model in {reference_dtype}" if reference else "its policy is the full model"
    then = f"use its policy with: {shlex.join(use)}" if result.certificate.certified else left
    o.note(f"wrote {folder}; {then}")
    o.next_steps({"look at it with": ["report", str(folder)]})
    o.write_result(result.to_dict(), json)


def _fit_posterior(
    model: str, names: str, *, task: str, data: str, target: Path | None, languages: str | None, own_answers: bool,
    limit: int | None, max_new_tokens: int | None, longest: int | None, exits: str | None, layers: str | None,
    dtype: str, device: str | None, out: Path | None, json: Path | None, draws: int, evidence: float, seed: int,
    candidates: int, alpha: float, vocabulary: str | None, vocabulary_size: int | None, to_text: bool,
) -> None:  # fmt: skip
    """Fit, write the exits with the posterior, and say how good it is."""
    import offramp
    from offramp.calibration import PosteriorConfig
    from offramp.lm.given import run_folder
    from offramp.training.answers import AnswerConfig
    from offramp.uncertainty.candidates import LaplaceConfig

    methods = tuple(dict.fromkeys(o.names(names)))
    config = PosteriorConfig(
        methods, candidates, alpha, LaplaceConfig(draws, seed, evidence), vocabulary, vocabulary_size, to_text,
        o.numbers(layers, "--layers", int), seed,
    )  # fmt: skip
    if task == "text" and own_answers:
        raise typer.BadParameter("--own-answers: a text asks nothing; name a --task with questions, or leave it out")
    what = None if task == "text" else o.task_named(task, languages)
    given: dict[str, Any] = {"texts": Path(data)} if what is None else {"task": what, "data": data, "target": target}
    lm = offramp.load(model, dtype=dtype, device=device, exits=exits)
    folder = out or run_folder("posterior", lm, task)
    with o.progress("fitting", answers="answering") as progress:
        report = offramp.fit_posterior(
            lm, **given, own_answers=own_answers, limit=limit, config=config, window=longest,
            answering=None if max_new_tokens is None else AnswerConfig(max_new_tokens, seed=seed),
            about={"command": o.command_line()}, out=folder, progress=progress,
        )  # fmt: skip
    o.say(report.table(), json)
    pruned = "" if vocabulary is None else f" --vocabulary {vocabulary}"
    pruned += "" if vocabulary_size is None else f" --vocabulary-size {vocabulary_size}"
    usage = f"offramp generate {model} --exits {folder / 'exits'} --confidence {methods[0]}{pruned}"
    o.note(f"wrote {folder / 'exits'}; use them with: {usage}")
    o.write_result(report.to_dict(), json)


def _why(certificate: Certificate) -> str:
    """Why nothing was certified, in short."""
    if not certificate.tests:
        return "the promise would say nothing"
    if certificate.needed is None:
        return "no number of prompts would do"
    return f"about {certificate.needed} certification {certificate.promise.unit}s would do"


def _several(names: str | None) -> tuple[str | None, ...]:
    """Names with commas between them; "none" is None."""
    return tuple(None if name == "none" else name for name in names.split(",")) if names else ()


def _one_size(sizes: str | None) -> int | None:
    """The tokens kept by the pruning that a posterior is for."""
    found = o.numbers(sizes, "--vocabulary-size", int)
    if found is not None and len(found) > 1:
        raise typer.BadParameter(f"--vocabulary-size {sizes}: a posterior is for one size")
    return None if found is None else int(found[0])

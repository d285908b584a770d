"""`offramp classify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o
from offramp.cli.classifiers import options as c

if TYPE_CHECKING:
    from offramp.classifiers.answers import Answer
    from offramp.classifiers.calibrated import Calibrated

SCHEMA = "offramp/classify/2"
SHOWN = 60
"""Characters of an input that are printed; JSON has all of it."""
CUT_SHOWN = 10
"""Inputs of which it is said by number that they were cut."""


def classify(
    model: c.Model,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="Files of images, or texts (pairs with a tab between them); default: one per line of standard input.",
        ),
    ] = None,
    posterior: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Result of offramp calibrate for this model; default: its plain softmax."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Cost on average: a share of the plain full network's FLOPs, such as 0.5 for half of what the "
            "backbone and its last exit cost, or FLOPs; needs --posterior."
        ),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(help="Leave when the confidence is above this, one number or one per exit, instead of --budget."),
    ] = None,
    confidence: Annotated[str, typer.Option(help="Compared with --threshold: max, gap or entropy.")] = "max",
    batch_size: c.BatchSize = 32,
    device: o.Device = None,
    json: o.JsonPath = None,
) -> None:
    """Classify images or texts, each at the first exit that is sure enough; later blocks are not run for it.

    Without --budget and --threshold the certified threshold is used, if --posterior holds one; else no input leaves
    early.
    """
    from offramp.classifiers.answers import answers
    from offramp.classifiers.calibrated import load_calibrated
    from offramp.classifiers.loading import load
    from offramp.runs.digests import fingerprint

    _check(budget, threshold, posterior, confidence)
    classifier = load(model, device=device)
    calibrated = None if posterior is None else load_calibrated(posterior, fingerprint(classifier))
    thresholds, rule = _rule(calibrated, budget, o.numbers(threshold, "--threshold", float), confidence)
    given = inputs or [line for line in o.standard_input("the inputs, one per line,").split("\n") if line.strip()]
    with c.noted():
        found = answers(
            classifier,
            given,
            calibrated=calibrated,
            thresholds=thresholds,
            confidence=confidence,
            batch_size=batch_size,
        )
    if str(json) != "-":
        width = max(len(answer.label) for answer in found)
        for answer in found:
            typer.echo(_line(answer, width, len(classifier.layers)))
    mean = sum(answer.share for answer in found) / len(found)
    o.note(f"{rule['words']}; {len(found)} inputs, on average {mean:.3f} of the plain full network's FLOPs")
    if cut := [str(place) for place, answer in enumerate(found, 1) if answer.tokens_cut]:
        shown = ", ".join(cut[:CUT_SHOWN]) + (", …" if len(cut) > CUT_SHOWN else "")
        o.note(f"{len(cut)} of {len(found)} texts were too long and were classified without their end: input {shown}")
    values = {
        "schema": SCHEMA, "model": c.title(model), "posterior": None if posterior is None else str(posterior),
        "rule": rule, "mean_share": mean, "texts_cut": len(cut), "answers": [asdict(answer) for answer in found],
    }  # fmt: skip
    o.write_result(values, json)


def _check(budget: float | None, threshold: str | None, posterior: Path | None, confidence: str) -> None:
    """Options that do not go together."""
    if budget is not None and threshold is not None:
        raise typer.BadParameter("give one of --budget and --threshold")
    if budget is not None and posterior is None:
        raise typer.BadParameter("--budget needs --posterior: thresholds come from the rows of offramp calibrate")
    if budget is not None and confidence != "max":
        raise typer.BadParameter("--budget has thresholds for --confidence max only")


def _rule(
    calibrated: Calibrated | None, budget: float | None, threshold: tuple[float, ...] | None, confidence: str
) -> tuple[Any, dict[str, Any]]:
    """Thresholds, and where they come from."""
    if budget is not None and calibrated is not None:
        found = calibrated.budget(budget)
        full = calibrated.full_cost
        met = (
            f"{found.target:.4g} FLOPs per row (on the threshold split {found.realised:.4g})"
            if full is None
            else f"{found.target / full:.3f} of the plain full network's FLOPs (on the threshold split "
            f"{found.realised / full:.3f})"
        )
        limits = found.thresholds.tolist()
        said = [value if abs(value) != float("inf") else None for value in limits]
        return limits, {"words": f"a budget of {met}", "budget": budget, "q": _finite(found.q), "thresholds": said}
    if threshold is not None:
        limit = threshold[0] if len(threshold) == 1 else threshold
        return limit, {"words": f"leaving above {limit}", "thresholds": list(threshold)}
    if calibrated is not None and calibrated.certified is not None:
        if confidence != "max":
            raise typer.BadParameter(
                f"the threshold in --posterior is certified for --confidence max, not for {confidence}; give a "
                "--threshold for it, or leave out --confidence"
            )
        certified, certificate = calibrated.certified, calibrated.certificate or {}
        against = certificate["promise"].get("reference") or "the last exit with the posterior"  # as it once was
        words = (
            f"the certified threshold, {certified:.6g} (its promise is against {against})"
            if certificate["index"]
            else "full depth, for no early leaving is certified"
        )
        return certified, {"words": words, "thresholds": [_finite(certified)]}
    return None, {"words": "full depth, for want of --budget or --threshold", "thresholds": []}


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value


def _line(answer: Answer, width: int, exits: int) -> str:
    inside = "" if answer.set is None else f"  {{{', '.join(answer.set)}}}"
    where = f"exit {answer.exit}/{exits}  {answer.share:.3f} of the full network's FLOPs"
    shown = "\\n".join(answer.given.splitlines())  # tabs stay, as between the texts of a pair
    shown = shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 1]}…"
    return f"{answer.label.ljust(width)}  {answer.probability:.3f}  {where}{inside}  {shown}"

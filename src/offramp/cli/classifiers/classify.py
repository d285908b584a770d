"""`offramp classify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o
from offramp.cli.classifiers import options as c

if TYPE_CHECKING:
    from offramp.classifiers.classify import Answer

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
    import offramp
    from offramp.classifiers.calibrated import load_calibrated
    from offramp.classifiers.classify import rule_of
    from offramp.classifiers.loading import load, title
    from offramp.runs.digests import fingerprint

    asked = o.numbers(threshold, "--threshold", float)
    classifier = load(model, device=device)
    calibrated = None if posterior is None else load_calibrated(posterior, fingerprint(classifier))
    rule = rule_of(calibrated, budget, asked[0] if asked and len(asked) == 1 else asked, confidence)
    given = inputs or [line for line in o.standard_input("the inputs, one per line,").split("\n") if line.strip()]
    compared: Any = confidence
    with c.noted():
        found = offramp.classify(
            classifier, given, posterior=calibrated, thresholds=rule.thresholds, confidence=compared,
            batch_size=batch_size,
        )  # fmt: skip
    if str(json) != "-":
        width = max(len(answer.label) for answer in found)
        for answer in found:
            typer.echo(_line(answer, width, len(classifier.layers)))
    mean = sum(answer.share for answer in found) / len(found)
    o.note(f"{rule.words}; {len(found)} inputs, on average {mean:.3f} of the plain full network's FLOPs")
    if cut := [str(place) for place, answer in enumerate(found, 1) if answer.tokens_cut]:
        shown = ", ".join(cut[:CUT_SHOWN]) + (", …" if len(cut) > CUT_SHOWN else "")
        o.note(f"{len(cut)} of {len(found)} texts were too long and were classified without their end: input {shown}")
    values = {
        "schema": SCHEMA, "model": title(model), "posterior": None if posterior is None else str(posterior),
        "rule": rule.to_dict(), "mean_share": mean, "texts_cut": len(cut),
        "answers": [asdict(answer) for answer in found],
    }  # fmt: skip
    o.write_result(values, json)


def _line(answer: Answer, width: int, exits: int) -> str:
    inside = "" if answer.set is None else f"  {{{', '.join(answer.set)}}}"
    where = f"exit {answer.exit}/{exits}  {answer.share:.3f} of the full network's FLOPs"
    shown = "\\n".join(answer.given.splitlines())  # tabs stay, as between the texts of a pair
    shown = shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 1]}…"
    return f"{answer.label.ljust(width)}  {answer.probability:.3f}  {where}{inside}  {shown}"

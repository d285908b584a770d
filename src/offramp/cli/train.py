"""`offramp train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.cli import options as o
from offramp.cli.options import options_of
from offramp.training.config import TrainConfig


@options_of(TrainConfig, but=("layers", "precision"), before="epochs")
def train(
    model: o.Model,
    task: Annotated[
        str | None,
        typer.Option(
            help="Train on examples of a task, from --data: question-answering, summarisation, translation. With "
            "image-classification and text-classification this is train-classifier."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Examples of the task: SQuAD, SAMSum or DialogSum layout, parallel text, or hub:OWNER/NAME[:SPLIT]; "
            "may be given several times.",
        ),
    ] = None,
    target: Annotated[Path | None, typer.Option(metavar="FILE", help="Second file of a parallel text.")] = None,
    languages: o.Languages = None,
    text: o.TrainingText = None,
    text_column: o.TextColumn = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|bundled",
            help="Train on the model's own answers to these prompts, one per line or JSON objects with prompt; default "
            "without --text and --task: bundled.",
        ),
    ] = None,
    own_answers: Annotated[
        bool,
        typer.Option("--own-answers", help="On the model's own answers to the task's questions, not the references."),
    ] = False,
    limit: o.Limit = None,
    max_new_tokens: o.OwnAnswerTokens = 128,
    answers: Annotated[int, typer.Option(help="Answers to each prompt; several need --answer-temperature.")] = 1,
    answer_temperature: o.AnswerTemperature = None,
    with_prompts: Annotated[
        bool,
        typer.Option(
            "--with-prompts",
            help="Train on the words of the prompts too (of --prompts or --task), not only of the answers.",
        ),
    ] = False,
    chat: o.Chat = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Longest piece of a document, in tokens (default: 256), or of an example with its answer (default: "
            "512; longer sources are shortened and counted)."
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Exits after these layers, for example 15,20,25; default: chosen by the depth.")
    ] = None,
    place: Annotated[
        int | None,
        typer.Option(
            help="Choose up to this many exit layers by measuring, before training, where layers agree with the last "
            "one and what leaving there saves."
        ),
    ] = None,
    place_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that a test will score (--vocabulary), for the price of one; default: all."),
    ] = None,
    exits: Annotated[
        str | None,
        typer.Option(
            "--exits",
            metavar="FOLDER",
            help="Exits that get classifiers (--objective consistency) or a drafter (--trainable drafter).",
        ),
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(
            help="Share of the tokens trained on that the exits' list of frequent tokens covers (generate --vocabulary "
            "frequent); default: 0.995, for a drafter 0.95, or the list that --exits have."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data instead of --steps.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            callback=o.number_format,
            help="auto: bfloat16 where its matrix products are faster, asked once of this device, and not with "
            "--trainable all; bfloat16; float32: as loaded. Weights stay as they are loaded.",
        ),
    ] = "auto",
    held_out: o.HeldOut = 0.1,
    report_to: o.ReportTo = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Put the trained exits there in the end, with lora and all beside the trained model.",
        ),
    ] = None,
    dtype: o.Dtype = "float32",
    device: o.Device = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the run is written; default: runs/train-MODEL.")
    ] = None,
    json: o.JsonPath = None,
    **fields: Any,
) -> None:
    """Train early exits: readouts after some layers learn to say what the last layer will say.

    By default the model itself is not changed, its full output stays the same bit for bit. Started again with the same
    options, an interrupted run goes on from its last checkpoint. `accelerate launch -m offramp train …` (on CPUs
    `torchrun --nproc-per-node N -m offramp train …`) divides each step among processes.
    """
    import offramp
    from offramp.hub.pretrained import process_device
    from offramp.lm.given import run_folder
    from offramp.training.answers import AnswerConfig

    _check(exits, fields, epochs, fields["steps"], fields["tokens"])
    config = TrainConfig(
        layers=o.numbers(layers, "--layers", int), precision=None if precision == "auto" else precision, **fields
    )
    columns, what = o.columns_of(text_column, text), None if task is None else o.task_named(task, languages)
    answering = AnswerConfig(max_new_tokens, answer_temperature, answers, with_prompts, chat, config.seed)
    state, chosen = process_device(device)
    lm = offramp.load(model, dtype=dtype, device=chosen, exits=exits)
    folder = out or run_folder("train", lm)
    with o.progress("training", answers="answering") as progress:
        result = offramp.train(
            lm, text or None, columns=columns, prompts=prompts, task=what, data=data or None, target=target,
            own_answers=own_answers, limit=limit, config=config, answering=answering, window=window, held_out=held_out,
            epochs=epochs, fastest=precision == "auto", place=place, place_tokens=place_tokens, coverage=coverage,
            report_to=report_to, about={"command": o.command_line()}, out=folder,
            progress=progress if state.is_main_process else None,
        )  # fmt: skip
    if not state.is_main_process:
        return
    o.say(result.table(), json)
    trained = str(result.model or model)
    use = o.DRAFTING if config.drafter else "--threshold 0.9"
    o.note(f"wrote {result.exits}; use them with: offramp generate {trained} --exits {result.exits} {use}")
    o.next_steps({"look at it with": ["report", str(folder)]})
    if push_to_hub is not None:
        from offramp.hub.exit_files import push

        address = push(result.exits, push_to_hub, model=result.model)
        if result.model is None:
            o.note(f"pushed the exits to {address}")
        else:
            command = f"offramp generate {push_to_hub} --exits {push_to_hub} {use}"
            o.note(f"pushed the model and its exits to {address}; use them with: {command}")
    o.write_result({**result.to_dict(), "name": model, "dtype": o.dtype_of(lm)}, json)


def _check(exits: str | None, fields: Mapping[str, Any], *ends: int | None) -> None:
    """Options that do not go together."""
    if exits is not None and not (fields["objective"].startswith("consistency") or fields["trainable"] == "drafter"):
        raise typer.BadParameter(
            "--exits is for --objective consistency and --trainable drafter; else new exits are trained"
        )
    if sum(end is not None for end in ends) > 1:
        raise typer.BadParameter("give one of --epochs, --steps and --tokens")

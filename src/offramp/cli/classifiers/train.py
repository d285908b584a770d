"""`offramp train ARCHITECTURE --task image-classification`, or text-classification."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.classifiers.config import ClassifierTrainConfig
from offramp.cli import options as o
from offramp.cli.classifiers import options as c
from offramp.cli.from_fields import options_of

FIELDS = ("momentum", "nesterov", "label_smoothing", "validate_every", "save_every")


@options_of(ClassifierTrainConfig, FIELDS, before="clip")
def train_classifier(
    architecture: Annotated[
        str,
        typer.Argument(
            metavar="ARCHITECTURE",
            help="For images msdnet-small, msdnet-medium, msdnet-large or resnet, trained from nothing; or a "
            "pretrained encoder: packaged name (minilm), local folder or hub id.",
        ),
    ],
    task: c.Task,
    data: c.Data,
    test_data: c.TestData = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="Layout of images: idx (MNIST and its kin), cifar10, cifar100, folder (one folder per class); "
            "default: by the files. Of texts: sst2, snli, snli-published, or columns, the default."
        ),
    ] = None,
    text_column: Annotated[
        str, typer.Option(help="Column of texts: a name in the header, or a place from 0 without header.")
    ] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the label, likewise.")] = "label",
    pair_column: Annotated[str | None, typer.Option(help="Column of the second text of pairs, likewise.")] = None,
    cluster_column: Annotated[
        str | None,
        typer.Option(help="Column, likewise: rows that are the same there are never divided between splits."),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Names of the classes, with commas, in their order; default: as the files say.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use only so many rows, drawn at random; a published test split stays whole.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Bring images of a folder to this side; default: they are all of one size.")
    ] = None,
    longest: Annotated[int | None, typer.Option(help="Most tokens of a text; default: what the encoder takes.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Exits after these layers besides the last, such as 2,4; default: all, of many layers six."),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="Pooling of states: mean, or first (CLS); default: first for ViT, mean for texts."),
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of a dense layer in each exit; default: none.")] = None,
    dropout: Annotated[float, typer.Option(help="Dropout of the exits' features.")] = 0.0,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; default: 20, of an encoder 3.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step; default: 64, of an encoder 32.")] = None,
    optimiser: Annotated[str | None, typer.Option(help="sgd, or adamw, an encoder's default.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 0.1 for sgd, 5e-5 for adamw.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: 1e-4, of an encoder 0.01.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="step, cosine, linear (an encoder's default) or constant.")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Steps of rising learning rate; default: 0, of an encoder 20.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Weights of the exits' losses: uniform, layer, or numbers with commas.")
    ] = "uniform",
    clip: Annotated[
        float | None, typer.Option(help="Largest norm of the gradient; default: any, of an encoder 1.")
    ] = None,
    augment: Annotated[
        str, typer.Option(help="Augmentation of images: crop-flip, crop (for digits and letters), flip or none.")
    ] = "crop-flip",
    precision: o.Precision = None,
    seed: Annotated[int, typer.Option(help="Seed of the division, of first weights, and of all draws.")] = 0,
    device: o.Device = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the run is written; default: runs/train-ARCHITECTURE-DATA."),
    ] = None,
    json: o.JsonPath = None,
    **fields: Any,
) -> None:
    """Train a classifier with early exits on images or texts, all exits jointly.

    The rows are divided by the seed: 60 % train the network; 10 % each tune temperatures, give thresholds for budgets,
    calibrate guarantees and test. The model remembers the division, and later commands keep to it. Started again with
    the same options, an interrupted run goes on from its last checkpoint.
    """
    import offramp
    from offramp.classifiers.architectures import usual
    from offramp.classifiers.train_classifier import run_folder

    options: dict[str, Any] = {
        "epochs": epochs, "batch_size": batch_size, "optimiser": optimiser, "learning_rate": learning_rate,
        "weight_decay": weight_decay, "schedule": schedule, "warmup": warmup, "clip": clip, "precision": precision,
        "weights": weights if weights.isalpha() else o.numbers(weights, "--weights", float) or weights, "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    config = ClassifierTrainConfig(**{**usual(architecture), **given}, **fields)
    chosen: Any = {"task": task, "layout": layout, "pooling": pooling, "augment": augment}
    with c.noted(), o.progress("training") as progress:
        result = offramp.train_classifier(
            architecture, data=data, **chosen, test_data=test_data, text_column=_column(text_column),
            label_column=_column(label_column), pair_column=_column(pair_column),
            cluster_column=_column(cluster_column), limit=limit, image_size=image_size, longest=longest,
            classes=() if classes is None else [name.strip() for name in classes.split(",")],
            layers=o.numbers(layers, "--layers", int), hidden=hidden, dropout=dropout, config=config, device=device,
            about={"command": o.command_line()}, out=out or run_folder(architecture, data), progress=progress,
        )  # fmt: skip
    o.say(result.table(), json)
    test = "" if test_data is None else f" --test-data {test_data}"
    o.note(f"wrote {result.model}; next: offramp evaluate {result.model} --task {task} --data {data}{test}")
    o.write_result({**result.to_dict(), "architecture": architecture}, json)


def _column(given: str | None) -> Any:
    """A name, or a place."""
    return int(given) if given is not None and given.isdecimal() else given

"""The commands for classifiers: train, evaluate and calibrate with `--task …-classification`, and classify."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.classifiers.config import ClassifierTrainConfig
from offramp.cli import options as o
from offramp.cli.options import options_of

if TYPE_CHECKING:
    from offramp.classifiers.classify import Answer

FIELDS = ("momentum", "nesterov", "label_smoothing", "validate_every", "save_every")  # options as in the config
SCHEMA = "offramp/classify/2"
SHOWN, CUT_SHOWN = 60, 10  # characters of an input that are printed; inputs that are named as cut

Task = Annotated[str, typer.Option(help="image-classification or text-classification.")]
Data = Annotated[
    Path,
    typer.Option(
        metavar="PATH",
        help="Images: the folder of IDX or CIFAR files, or of one folder per class. Texts: a .tsv, .csv or .jsonl "
        "file, also with .gz.",
    ),
]
TestData = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH", help="A published test split in the same layout; default: that of --data, or a tenth of it."
    ),
]
DataAgain = Annotated[
    Path, typer.Option(metavar="PATH", help="What the model was trained on; it is divided again as it was then.")
]
TestDataAgain = Annotated[
    Path | None, typer.Option("--test-data", metavar="PATH", help="The published test split it was given, if any.")
]
Cache = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where outputs of exits are kept for later steps; default: beside the model."),
]
BatchSize = Annotated[int, typer.Option(help="Rows at once.")]
Draws = Annotated[int, typer.Option(help="Draws of the logits, with Laplace.")]
Grid = Annotated[
    str | None,
    typer.Option(help="meronen: the published grid of temperatures and prior variances; default: a wider one."),
]
FitOn = Annotated[
    str,
    typer.Option(
        help="Rows for Laplace's factors. train: those of the network, as published; tune: rows it has not seen, which "
        "then also tune it."
    ),
]
Bins = Annotated[int, typer.Option(help="Bins of the calibration error; 10 in the published tables.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder model/ of a run of offramp train.")]


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
    task: Task,
    data: Data,
    test_data: TestData = None,
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
    with o.progress("training") as progress:
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


def evaluate_classifier(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...",
            help="Folders model/ of runs of offramp train; several that differ in the seed only are averaged over.",
        ),
    ],
    task: Task,
    data: DataAgain,
    test_data: TestDataAgain = None,
    methods: Annotated[
        str,
        typer.Option(help="all, or some of vanilla,temperature,mie,mie+temperature,laplace,mie+laplace, with commas."),
    ] = "all",
    corruption: Annotated[
        str | None, typer.Option(help="Test on corrupted images too: noise, blur, contrast, or several with commas.")
    ] = None,
    severity: Annotated[int, typer.Option(help="Severity of the corruptions, 1 to 5.")] = 3,
    draws: Draws = 50,
    grid: Grid = None,
    fit_on: FitOn = "train",
    bins: Bins = 15,
    limit: Annotated[int | None, typer.Option(help="Use only so many test rows, drawn at random.")] = None,
    resamples: Annotated[int, typer.Option(help="Draws of the bootstrap behind the intervals of one model.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of Laplace's draws, bootstrap and test rows drawn.")] = 0,
    batch_size: BatchSize = 64,
    cache: Cache = None,
    device: o.Device = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the run is written; default: runs/evaluate-NAME.")
    ] = None,
    json: o.JsonPath = None,
) -> None:
    """Every calibration method at 39 budgets, beside static exits and the full model, with intervals.

    All exits are computed and chosen afterwards; what is compared is quality and FLOPs. What exits say about a split,
    and fitted posteriors, are kept beside the model: an interrupted evaluation goes on.
    """
    import offramp
    from offramp.classifiers.loading import run_folder

    folder = out or run_folder("evaluate", models[0])
    chosen: Any = {
        "task": task, "methods": None if methods == "all" else o.names(methods), "grid": grid, "fit_on": fit_on,
        "corruptions": () if corruption is None else o.names(corruption),
    }  # fmt: skip
    with o.progress("evaluating") as progress:
        result = offramp.evaluate_classifier(
            models, data, **chosen, test_data=test_data, severity=severity, draws=draws, bins=bins, limit=limit,
            resamples=resamples, seed=seed, batch_size=batch_size, cache=cache, device=device,
            about={"command": o.command_line()}, out=folder, progress=progress,
        )  # fmt: skip
    for test in result.tests:
        o.say(f"## {test}, mean over the budgets\n\n{result.mean_table(test)}\n", json)
    o.say(f"## Temperatures T and prior variances ω of the exits\n\n{result.fitted_table()}\n", json)
    o.say("\n\n".join(result.notes()), json)
    o.note(f"wrote {folder}: results.json, records, pictures and, with more tables, table.md")
    o.note(f"read it with: offramp report {folder}")
    o.write_result(result.to_dict(), json)


def calibrate_classifier(
    model: Model,
    task: Task,
    data: DataAgain,
    test_data: TestDataAgain = None,
    posterior: Annotated[
        str,
        typer.Option(
            help="What calibrates probabilities: vanilla (nothing), temperature, mie (model-internal ensemble of the "
            "exits), mie+temperature, laplace (last layer, with temperature), mie+laplace; or auto: of the first four "
            "the one that held-out rows of the tune split say helps, which may be none."
        ),
    ] = "auto",
    draws: Draws = 50,
    grid: Grid = None,
    predictive: Annotated[str, typer.Option(help="With Laplace: mc, means over draws, or probit, without any.")] = "mc",
    damping: Annotated[str, typer.Option(help="Damping of Laplace: factored, as published, or exact.")] = "factored",
    fit_on: FitOn = "train",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Certify a threshold: what the mean loss of new rows is to stay below; default: none."),
    ] = None,
    failure: Annotated[float, typer.Option(help="Probability with which that may fail.")] = 0.05,
    loss: Annotated[
        str,
        typer.Option(
            help="Loss of a row that leaves early. consistency: its class is not the reference's; gap: it is wrong "
            "where the reference is right (less where it is the other way round); brier: half the difference of Brier "
            "scores; brier-consistency: the same against the reference's class, without labels."
        ),
    ] = "consistency",
    reference: Annotated[
        str,
        typer.Option(
            help="What the promise is against. last-exit: the network's own last exit as it is, the plain full "
            "network; posterior: the last exit with the posterior, of mie the ensemble of all exits."
        ),
    ] = "last-exit",
    bound: Annotated[
        str | None,
        typer.Option(
            help="wsr (betting), hoeffding-bentkus, binomial (losses of 0 or 1), or crc (a guarantee on the mean, "
            "without failure probability); default: binomial for consistency, else wsr."
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Calibrate nested sets of classes: the right one is in those of all exits with probability 1 - alpha; "
            "default: none."
        ),
    ] = None,
    bins: Bins = 15,
    seed: Annotated[int, typer.Option(help="Seed of Laplace's draws and of the order of rows.")] = 0,
    batch_size: BatchSize = 64,
    cache: Cache = None,
    device: o.Device = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the result is written; default: runs/calibrate-NAME-POSTERIOR."),
    ] = None,
    json: o.JsonPath = None,
) -> None:
    """Calibrate the exits of a classifier, for `offramp classify`; certify a threshold, calibrate sets.

    Each step has rows of its own, see `offramp train --task image-classification --help`. What exits say about a split
    is computed once and kept.
    """
    import offramp
    from offramp.classifiers.loading import run_folder

    folder = out or run_folder("calibrate", model, posterior)
    chosen: Any = {
        "task": task, "posterior": posterior, "grid": grid, "predictive": predictive, "damping": damping,
        "fit_on": fit_on, "loss": loss, "reference": reference, "bound": bound,
    }  # fmt: skip
    with o.progress("calibrating") as progress:
        result = offramp.calibrate_classifier(
            model, data, **chosen, test_data=test_data, draws=draws, tolerance=tolerance, failure=failure, alpha=alpha,
            bins=bins, seed=seed, batch_size=batch_size, cache=cache, device=device,
            about={"command": o.command_line()}, out=folder, progress=progress,
        )  # fmt: skip
    o.say(result.table(), json)
    o.note(f"wrote {folder}; use it with: offramp classify {model} INPUT --posterior {folder} --budget 0.5")
    o.write_result(result.to_dict(), json)


def classify(
    model: Model,
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
    batch_size: BatchSize = 32,
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
    found = offramp.classify(
        classifier, given, posterior=calibrated, thresholds=rule.thresholds, confidence=compared, batch_size=batch_size
    )
    if str(json) != "-":
        width = max(len(answer.label) for answer in found)
        for answer in found:
            typer.echo(_line(answer, width, len(classifier.layers)))
    mean = sum(answer.share for answer in found) / len(found)
    o.note(f"{rule.words}; {len(found)} inputs, on average {mean:.3f} of the plain full network's FLOPs")
    if cut := [str(place) for place, answer in enumerate(found, 1) if answer.tokens_cut]:
        shown = ", ".join(cut[:CUT_SHOWN]) + (", …" if len(cut) > CUT_SHOWN else "")
        o.note(f"{len(cut)} of {len(found)} texts were too long and were classified without their end: input {shown}")
    o.write_result({
        "schema": SCHEMA, "model": title(model), "posterior": None if posterior is None else str(posterior),
        "rule": rule.to_dict(), "mean_share": mean, "texts_cut": len(cut),
        "answers": [asdict(answer) for answer in found],
    }, json)  # fmt: skip


def _line(answer: Answer, width: int, exits: int) -> str:
    inside = "" if answer.set is None else f"  {{{', '.join(answer.set)}}}"
    where = f"exit {answer.exit}/{exits}  {answer.share:.3f} of the full network's FLOPs"
    shown = "\\n".join(answer.given.splitlines())  # tabs stay, as between the texts of a pair
    shown = shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 1]}…"
    return f"{answer.label.ljust(width)}  {answer.probability:.3f}  {where}{inside}  {shown}"

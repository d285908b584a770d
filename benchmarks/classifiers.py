"""Write docs/results/images.md and texts.md: calibration of early-exit classifiers, trained here, over budgets.

    .venv/bin/python benchmarks/classifiers.py images FOLDER  # Fashion-MNIST as in Debian's dataset-fashion-mnist
    .venv/bin/python benchmarks/classifiers.py sst2 FILE...      # train.tsv dev.tsv
    .venv/bin/python benchmarks/classifiers.py snli FILE         # pairs, divided by premise

Runs are kept in runs/results and go on where they were interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from classifier_validity import validate
from torch import Tensor
from tqdm.auto import tqdm

import offramp
from offramp import EarlyExitClassifier
from offramp.classifiers.batches import ImagePreprocessing, ImageRows, TextRows, in_order
from offramp.classifiers.certify import RowPromise, certify, threshold_grid, try_thresholds
from offramp.classifiers.config import ClassifierTrainConfig
from offramp.classifiers.evaluate import charged, evaluate
from offramp.classifiers.loading import load
from offramp.classifiers.outputs import load_outputs
from offramp.classifiers.result import ClassifierEvaluation
from offramp.classifiers.trainer import train_exits
from offramp.metrics.sets import summarise
from offramp.report.classifiers import save_classifiers
from offramp.risk import budgets
from offramp.risk.losses import consistency, performance_gap
from offramp.runs.files import write_text
from offramp.runs.tables import markdown
from offramp.tasks.images import CORRUPTIONS, FASHION, corrupted, read_idx
from offramp.tasks.labelled import Labelled, split
from offramp.tasks.labelled_text import SNLI, SST2, read_labelled_text
from offramp.uncertainty import (
    AVCSClassificationConfig,
    ExitOutputs,
    NestedConformalConfig,
    PerExitConfig,
    Posterior,
    PosteriorConfig,
    avcs_classification,
    load_posterior,
    nested_conformal,
    per_exit,
)
from offramp.uncertainty.one_exit import METHODS
from offramp.uncertainty.per_exit import class_scores, label_scores

ROOT = Path(__file__).parents[1]
RUNS, PAGES = ROOT / "runs" / "results", ROOT / "docs" / "results"
SPLITS = ("fit", "tune", "threshold", "calibrate", "test")
SEVERITY = 3


@dataclass(frozen=True)
class Study:
    """One kind of data and network."""

    title: str
    about: str
    splits: Callable[[list[Path]], dict[str, Labelled]]  # train, the five above, and more tests, such as "noise"
    rows: Callable[[Labelled, EarlyExitClassifier], ImageRows | TextRows]
    model: Callable[[dict[str, Labelled]], EarlyExitClassifier]
    config: Callable[[int], ClassifierTrainConfig]
    seeds: int


# ---------------------------------------------------------------- the studies


def image_splits(paths: list[Path]) -> dict[str, Labelled]:
    """6,000 images to train on, 3,000 for each use, 4,000 of the published test images, clean and corrupted."""
    data = read_idx(paths[0], FASHION)
    shares = {"train": 0.1, "fit": 0.05, "tune": 0.05, "threshold": 0.05, "calibrate": 0.05, "rest": 0.7}
    found = split(data["train"], shares, seed=0)
    found["test"] = split(data["test"], {"test": 0.4, "rest": 0.6}, seed=0)["test"]
    for kind in CORRUPTIONS:
        found[kind] = corrupted(found["test"], kind, SEVERITY)
    return {name: part for name, part in found.items() if name != "rest"}


def image_model(splits: dict[str, Labelled]) -> EarlyExitClassifier:
    """MSDNet small for one colour."""
    train = splits["train"]
    settings = ImagePreprocessing.of(train).settings
    model = EarlyExitClassifier.msdnet("small", labels=train.classes, in_channels=1, preprocessing=settings)
    return model.to(memory_format=torch.channels_last)  # 1.4 times as fast on this kind of processor


def image_rows(data: Labelled, model: EarlyExitClassifier) -> ImageRows:
    """Without augmentation."""
    return ImageRows(data, ImagePreprocessing.from_settings(model.preprocessing))


def sst2_splits(paths: list[Path]) -> dict[str, Labelled]:
    """The file train.tsv for everything but the test, which is dev.tsv."""
    train, dev = (read_labelled_text(path, SST2) for path in paths)
    return split(train, {"train": 0.5, **dict.fromkeys(SPLITS, 0.1)}, seed=0, test=dev)


def snli_splits(paths: list[Path]) -> dict[str, Labelled]:
    """One file, divided by premise."""
    shares = {"train": 0.5, "fit": 0.08, "tune": 0.08, "threshold": 0.08, "calibrate": 0.1, "test": 0.16}
    return split(read_labelled_text(paths[0], SNLI), shares, seed=0)


def text_model(splits: dict[str, Labelled]) -> EarlyExitClassifier:
    """MiniLM with an exit after each of its six layers."""
    return EarlyExitClassifier.from_encoder("minilm", (1, 2, 3, 4, 5), labels=splits["train"].classes)


def text_rows(data: Labelled, model: EarlyExitClassifier) -> TextRows:
    """At most 64 tokens."""
    return TextRows(data, model.tokenizer, longest=64)


def text_config(seed: int) -> ClassifierTrainConfig:
    """Three epochs of fine-tuning."""
    return ClassifierTrainConfig(
        3, 32, "adamw", 5e-5, schedule="linear", warmup=20, weight_decay=0.01, clip=1.0, precision="bf16", seed=seed
    )


STUDIES = {
    "images": Study(
        "Images: MSDNet on Fashion-MNIST",
        "The small MSDNet for 32 x 32 (4 exits), trained on 6,000 images of Fashion-MNIST's training set, 10 epochs, "
        "SGD 0.1 divided by 10 at half and three quarters, no augmentation; so few images that it grows too sure, as "
        "larger networks do on more. Factors, temperatures, thresholds and guarantees each have 3,000 other images of "
        "the training set; judged on 4,000 test images, clean and with noise, blur or less contrast (severity "
        f"{SEVERITY}).",
        image_splits, image_rows, image_model,
        lambda seed: ClassifierTrainConfig(epochs=10, batch_size=64, precision="bf16", seed=seed), seeds=3,
    ),
    "sst2": Study(
        "Texts: MiniLM with exits on SST-2",
        "MiniLM (6 layers, pretrained) with an exit after each layer, fine-tuned for three epochs on 5/9 of the 6,920 "
        "sentences of SST-2's training file; the rest of it calibrates. Judged on the 872 sentences of dev.",
        sst2_splits, text_rows, text_model, text_config, seeds=3),
    "snli": Study(
        "Texts: MiniLM with exits on SNLI",
        "MiniLM (6 layers, pretrained) with an exit after each layer, fine-tuned for three epochs on half of SNLI's "
        "validation file (9,842 pairs), which is divided by premise; the rest calibrates and judges.",
        snli_splits, text_rows, text_model, text_config, seeds=3),
}  # fmt: skip


# ---------------------------------------------------------------- running them


def trained(study: Study, splits: dict[str, Labelled], seed: int, folder: Path) -> EarlyExitClassifier:
    """A network of this seed, trained now or before."""
    if not (folder / "done").exists():
        torch.manual_seed(seed)
        model = study.model(splits)
        train, judged = (study.rows(splits[name], model) for name in ("train", "tune"))
        with tqdm(desc=f"training seed {seed}", file=sys.stderr) as bar:

            def progress(done: int, total: int, what: str = "") -> None:
                bar.total, bar.n = total, done
                bar.set_postfix_str(what)

            result = train_exits(model, train, judged, study.config(seed), folder / "train", progress=progress)
        print(result.table(), flush=True)
        (folder / "done").touch()
    return load(folder / "train" / "model").eval()


def outputs(study: Study, splits: dict[str, Labelled], seed: int, folder: Path) -> dict[str, ExitOutputs]:
    """What all exits say about every split but the training one."""
    model = trained(study, splits, seed, folder)
    found = {}
    for name, data in splits.items():
        path = folder / "outputs" / f"{name}.safetensors"
        if name != "train" and (not path.exists() or load_outputs(path).cut is None):  # as earlier versions wrote
            path.parent.mkdir(parents=True, exist_ok=True)
            model.outputs(in_order(study.rows(data, model), 128), ids=data.ids, path=path)
        if name != "train":
            found[name] = load_outputs(path)
    return found


def posteriors(found: dict[str, ExitOutputs], folder: Path) -> dict[str, Posterior]:
    """Every method, fitted now or before; Laplace also with the published grid, which cannot turn it off."""
    configs = {method: PosteriorConfig(method) for method in METHODS}
    for method in ("laplace", "mie+laplace"):
        configs[f"{method}, published grid"] = PosteriorConfig(method, grid="meronen")
    made = {}
    for name, config in configs.items():
        path = folder / "posteriors" / name
        if not path.exists():
            config.fit(found["fit"], found["tune"]).save(path)
        made[name] = load_posterior(path)
    return made


# ---------------------------------------------------------------- what is shown


def certificates(found: dict[str, ExitOutputs], posterior: Posterior) -> list[list[str]]:
    """Thresholds with promises against the network's own last exit, one row each, and how they keep them."""
    p = {name: posterior.probabilities(found[name]) for name in ("threshold", "calibrate", "test")}
    costs = charged(found["test"].costs, posterior)
    thresholds = threshold_grid(p["threshold"].amax(-1))
    rows = []
    for loss, tolerance, bound in (
        ("consistency", 0.05, "hoeffding-bentkus"), ("consistency", 0.05, "wsr"), ("performance gap", 0.01, "wsr"),
        ("performance gap", 0.02, "wsr"), ("consistency", 0.05, "crc"),
    ):  # fmt: skip

        def losses(name: str, loss: str = loss) -> Tensor:
            own = found[name].logits[-1].double().softmax(-1)
            if loss == "consistency":
                return consistency(p[name], own)
            return performance_gap(p[name], found[name].labels, own)

        promise = RowPromise(loss, tolerance, 0.05, bound)
        full = found["test"].full_cost
        trials = {name: try_thresholds(thresholds, p[name].amax(-1), losses(name), costs, full) for name in p}
        certificate = certify(trials["calibrate"], promise)
        again = validate(trials["test"], promise, repeats=200)
        held_out = trials["test"]
        rows.append([
            loss, f"{tolerance:g}", bound, "yes" if certificate.certified else "no",
            f"{float(held_out.losses[certificate.index].double().mean()):.4f}",
            f"{held_out.cost(certificate.index):.3f}", f"{again.above_pool} of {again.repeats}",
            f"{again.above_held_out} of {again.repeats}",
            f"{again.never} of {again.repeats}",
        ])  # fmt: skip
    return rows


CERTIFICATE_HEAD = [
    "loss", "tolerance", "bound", "certified", "loss on test", "cost", "broken", "held out", "never leaves",
]  # fmt: skip


def sets(found: dict[str, ExitOutputs], posterior: Posterior, alpha: float = 0.05) -> list[list[str]]:
    """Prediction sets at every exit, one row per kind: nested conformal, its baselines, AVCS."""
    honest = {
        name: replace(found[name], logits=posterior.probabilities(found[name]).clamp(min=1e-30).log().float())
        for name in ("tune", "calibrate", "test")
    }
    tune, calibrate, test = honest["tune"], honest["calibrate"], honest["test"]
    kinds = {}
    for name, equalise in (("nested conformal, equalised", True), ("nested conformal", False)):
        config = NestedConformalConfig(alpha, equalise=equalise)
        state = nested_conformal.fit_classes(calibrate, config, tune=tune if equalise else None)
        kinds[name] = nested_conformal.apply_classes(state, test)
    scores = label_scores(class_scores(calibrate, "raps"), calibrate.labels)
    plain = per_exit.apply_classes(per_exit.fit(scores, PerExitConfig(alpha, "raps")), test)
    kinds["RAPS at each exit"], kinds["its running intersection"] = plain, plain.running()
    avcs = avcs_classification.fit(found["tune"], config=AVCSClassificationConfig(alpha))
    kinds["AVCS, running intersection"] = avcs_classification.apply(avcs, found["test"]).running()
    rows = []
    for name, made in kinds.items():
        summary = summarise(made, test.labels)
        rows.append([
            name, " → ".join(f"{exit_.size:.2f}" for exit_ in summary.exits),
            " → ".join(f"{exit_.coverage.value:.3f}" for exit_ in summary.exits),
            f"{summary.exits[-1].simultaneous.value:.3f}", f"{summary.exits[-1].nestedness:.2f}",
            f"{summary.exits[-1].empty.value:.3f}", f"{summary.time_to_small:.2f} ({summary.reached.value:.0%})",
        ])  # fmt: skip
    return rows


SETS_HEAD = [
    "sets",
    "size by exit",
    "coverage by exit",
    "covers at all exits",
    "nestedness",
    "empty",
    "one class after",
]


def seconds(study: Study, model: EarlyExitClassifier, posterior: Posterior, found: dict[str, ExitOutputs],
            data: Labelled, rounds: int = 5, most: int = 512) -> str:  # fmt: skip
    """What a real early stop takes, over the full network's seconds on the same rows, in turns."""
    rows = study.rows(data.take(range(min(most, len(data)))), model)
    batches = [inputs for inputs, _ in in_order(rows, 64)]
    confidences = posterior.probabilities(found["threshold"]).amax(-1)
    costs, full = charged(found["threshold"].costs, posterior), found["threshold"].full_cost
    lines = []
    for share in (0.35, 0.5, 0.75):
        try:
            budget = budgets.fit(confidences, costs, budgets.q_of(costs, share=share, full=full))
        except ValueError:  # below the first exit
            continue
        ratios = []
        for _ in range(rounds):
            taken = []
            for how in ({}, {"posterior": posterior, "thresholds": budget.thresholds}):
                began = time.perf_counter()
                for inputs in batches:
                    model.classify(inputs, **how)
                taken.append(time.perf_counter() - began)
            ratios.append(taken[1] / taken[0])
        low, _, high = statistics.quantiles(ratios, n=4)
        spent = budget.realised / full
        lines.append(
            f"{spent:.2f} of the FLOPs: {statistics.median(ratios):.2f} of the seconds ({low:.2f} to {high:.2f})"
        )
    return "; ".join(lines)


def page(name: str, study: Study) -> None:
    """Write docs/results/NAME.md from what `main` found."""
    folder = RUNS / name / "evaluation"
    evaluation = ClassifierEvaluation.from_dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    more = (folder / "more.md").read_text(encoding="utf-8")
    command = f"python benchmarks/classifiers.py {name} ..."
    pictures = PAGES / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines = [f"# {study.title}", "", study.about, "", f"{conditions()}", "", "```", command, "```", ""]
    for test in evaluation.tests:
        lines += [f"## {test.capitalize()}: mean over the 39 budgets", "", str(evaluation.mean_table(test)), ""]
        lines += ["Minus temperature alone:", "", str(evaluation.difference_table(test)), ""]
    first = evaluation.tests[0]
    lines += ["## Along the curve", "", str(evaluation.curve_table(first)), ""]
    lines += ["## Each exit alone", "", str(evaluation.anytime_table(first)), ""]
    lines += ["## Asked and realised cost", "", str(evaluation.cost_table(first)), ""]
    for picture in sorted(folder.glob("classify-*.svg")):
        target = pictures / f"{name}-{picture.name}"
        shutil.copyfile(picture, target)
        lines += [f"![{picture.stem}](pictures/{target.name})", ""]
    lines += [more, "", *evaluation.notes()]
    notes = PAGES / f"{name}-notes.md"
    if notes.exists():
        lines += ["", notes.read_text(encoding="utf-8").strip()]
    text = "\n".join(lines) + "\n"
    write_text(PAGES / f"{name}.md", text)
    print(f"wrote {PAGES / name}.md")


def conditions() -> str:
    """What the figures were measured on."""
    return (
        f"Calibrated and judged on splits that share no row. {platform.machine()} processor, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, offramp {offramp.__version__}."
    )


def main() -> None:
    """Run a study and write its page."""
    parser = argparse.ArgumentParser(description="Calibration of early-exit classifiers over budgets.")
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("paths", type=Path, nargs="*", help="the data; none: write the page anew")
    parser.add_argument("--seeds", type=int, help="how many; default: the study's")
    options = parser.parse_args()
    warnings.simplefilter("once")
    study = STUDIES[options.study]
    if not options.paths:
        page(options.study, study)
        return
    splits = study.splits(options.paths)
    print(", ".join(f"{name} {len(rows)}" for name, rows in splits.items()), flush=True)
    tests = ["test", *(kind for kind in CORRUPTIONS if kind in splits)]
    seeds, accuracies, more = [], [], []
    for seed in range(options.seeds or study.seeds):
        folder = RUNS / options.study / f"seed-{seed}"
        found = outputs(study, splits, seed, folder)
        fitted = posteriors(found, folder)
        model = load(folder / "train" / "model").eval()
        named = {"clean" if test == "test" else test: found[test] for test in tests}
        seeds.append(tuple(evaluate(fitted, found["threshold"], named)))
        accuracies.append(
            [f"{(z.argmax(-1) == found['test'].labels).double().mean():.4f}" for z in found["test"].logits]
        )
        if seed == 0:
            best = fitted["mie+laplace"]
            more = [
                "## Temperatures and prior variances, seed 0 (* at an edge)", "", fitted["laplace"].table(), "",
                "## Promises, seed 0, on temperature-scaled probabilities", "",
                "The calibration split certifies, the test split judges. Broken: of 200 calibrations on rows drawn "
                "from the test split with replacement, half as many as it has, those whose threshold loses more than "
                "promised over all of it; at most 5 % may (crc promises the mean only). Held out: the same on the rows "
                "that were not drawn, with their noise, so it may be more.", "",
                markdown(CERTIFICATE_HEAD, certificates(found, fitted["temperature"])), "",
                "## Prediction sets at 0.95, seed 0, on temperature-scaled probabilities", "",
                markdown(SETS_HEAD, sets(found, fitted["temperature"])), "",
                "## A real early stop, seed 0, MIE + Laplace, batches of 64", "",
                seconds(study, model, best, found, splits["test"]), "",
            ]  # fmt: skip
        print(f"seed {seed}: evaluated", flush=True)
    exits = [f"exit {e + 1}" for e in range(len(accuracies[0]))]
    rows = [[str(seed), *row] for seed, row in enumerate(accuracies)]
    more = ["## Accuracy of each exit on clean test rows, by seed", "", markdown(["seed", *exits], rows), "", *more]
    evaluation = ClassifierEvaluation({"study": options.study}, tuple(seeds))
    folder = RUNS / options.study / "evaluation"
    evaluation.save(folder)
    save_classifiers(evaluation, folder)
    text = "\n".join(more)
    write_text(folder / "more.md", text)
    page(options.study, study)


if __name__ == "__main__":
    main()

"""Write docs/results/images.md and texts.md: calibration of early-exit classifiers, trained here, over budgets.

    .venv/bin/python benchmarks/classifiers.py images FOLDER  # Fashion-MNIST as in Debian's dataset-fashion-mnist
    .venv/bin/python benchmarks/classifiers.py sst2 FILE...      # train.tsv dev.tsv
    .venv/bin/python benchmarks/classifiers.py snli FILE         # pairs, divided by premise

Runs are kept in runs/results and go on where they were interrupted.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from offramp.classifiers import (
    ClassifierTrainConfig,
    EarlyExitClassifier,
    ImagePreprocessing,
    ImageRows,
    TextRows,
    in_order,
    load,
    load_outputs,
    train_classifier,
)
from offramp.tasks.corruptions import CORRUPTIONS, corrupted
from offramp.tasks.images import FASHION, read_idx
from offramp.tasks.labelled import Labelled, split
from offramp.tasks.labelled_text import SNLI, SST2, read_labelled_text
from offramp.uncertainty.outputs import ExitOutputs

ROOT = Path(__file__).parents[1]
RUNS, PAGES = ROOT / "runs" / "results", ROOT / "docs" / "results"
SPLITS = ("fit", "tune", "threshold", "calibrate", "test")
SEVERITY = 3


@dataclass(frozen=True)
class Study:
    """One kind of data and network."""

    title: str
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


def text_shares(train: float) -> dict[str, float]:
    """The rest in equal parts."""
    return {"train": train, **dict.fromkeys(SPLITS[:-1], (1 - train) / 4)}


def sst2_splits(paths: list[Path]) -> dict[str, Labelled]:
    """The file train.tsv for everything but the test, which is dev.tsv."""
    train, dev = (read_labelled_text(path, SST2) for path in paths)
    return split(train, text_shares(0.6) | {"test": 0.1}, seed=0, test=dev)


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
        "Images: MSDNet on Fashion-MNIST", image_splits, image_rows, image_model,
        lambda seed: ClassifierTrainConfig(epochs=10, batch_size=64, precision="bf16", seed=seed), seeds=3,
    ),
    "sst2": Study("Texts: MiniLM with exits on SST-2", sst2_splits, text_rows, text_model, text_config, seeds=3),
    "snli": Study("Texts: MiniLM with exits on SNLI", snli_splits, text_rows, text_model, text_config, seeds=3),
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

            result = train_classifier(model, train, judged, study.config(seed), folder / "train", progress=progress)
        print(result.table(), flush=True)
        (folder / "done").touch()
    return load(folder / "train" / "model").eval()


def outputs(study: Study, splits: dict[str, Labelled], seed: int, folder: Path) -> dict[str, ExitOutputs]:
    """What all exits say about every split but the training one."""
    model = trained(study, splits, seed, folder)
    found = {}
    for name, data in splits.items():
        path = folder / "outputs" / f"{name}.safetensors"
        if name != "train" and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            model.outputs(in_order(study.rows(data, model), 128), ids=data.ids, path=path)
        if name != "train":
            found[name] = load_outputs(path)
    return found


def main() -> None:
    """Run a study."""
    parser = argparse.ArgumentParser(description="Calibration of early-exit classifiers over budgets.")
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("paths", type=Path, nargs="+")
    options = parser.parse_args()
    warnings.simplefilter("once")
    study = STUDIES[options.study]
    splits = study.splits(options.paths)
    print(", ".join(f"{name} {len(rows)}" for name, rows in splits.items()), flush=True)
    for seed in range(study.seeds):
        outputs(study, splits, seed, RUNS / options.study / f"seed-{seed}")


if __name__ == "__main__":
    main()

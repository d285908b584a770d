"""`offramp.evaluate_classifier`: calibration methods on trained classifiers, over budgets and test sets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from offramp.classifiers.cached_outputs import CachedOutputs
from offramp.classifiers.compare import ComparisonConfig, compare
from offramp.classifiers.evaluate import Settings
from offramp.classifiers.loading import run_folder, title
from offramp.classifiers.result import ClassifierEvaluation
from offramp.classifiers.splits import TaskName
from offramp.runs.machine import describe
from offramp.runs.progress import shown
from offramp.uncertainty.posterior import METHODS, PosteriorConfig
from offramp.values import idle

File = str | os.PathLike[str]


def evaluate_classifier(
    models: File | Sequence[File],
    data: File,
    *,
    task: TaskName | None = None,
    test_data: File | None = None,
    methods: Sequence[Literal["vanilla", "temperature", "mie", "mie+temperature", "laplace", "mie+laplace"]]
    | None = None,
    corruptions: Sequence[Literal["noise", "blur", "contrast"]] = (),
    severity: int = 3,
    draws: int = 50,
    grid: Literal["meronen"] | None = None,
    fit_on: Literal["train", "tune"] = "train",
    bins: int = 15,
    limit: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
    cache: File | None = None,
    device: str | None = None,
    about: Mapping[str, Any] | None = None,
    out: File | None = None,
    progress: Callable[..., None] | None = None,
) -> ClassifierEvaluation:
    """Every calibration method at 39 budgets, beside static exits and the full model, with intervals.

    All exits are computed and chosen afterwards; what is compared is quality and FLOPs. What exits say about a split,
    and fitted posteriors, are kept beside the model: an interrupted evaluation goes on:

        result = offramp.evaluate_classifier("runs/train-resnet-mnist/model", "mnist", corruptions=["noise"])
        print(result.table())

    Args:
        models: Folder of a classifier that `offramp.train_classifier` wrote; of several that differ in the seed only
            what is found is averaged.
        data: What they were trained on; it is divided again as it was then.
        task: What they are thought to be for; another one is refused. None: what they are for.
        test_data: The published test split they were given, if any.
        methods: What is compared; None: all.
        corruptions: Corruptions of the test images, besides the clean ones.
        severity: Severity of the corruptions, 1 to 5.
        draws: Draws of the logits, with Laplace.
        grid: "meronen": the published grid of temperatures and prior variances; None: a wider one.
        fit_on: Rows for Laplace's factors. "train": those of the network, as published; "tune": rows it has not seen,
            which then also tune it.
        bins: Bins of the calibration error; 10 in the published tables.
        limit: Use only so many test rows, drawn at random.
        resamples: Draws of the bootstrap behind the intervals of one model; 0: no intervals.
        seed: Seed of Laplace's draws, of the bootstrap and of the test rows drawn.
        batch_size: Rows at once.
        cache: Where outputs of exits are kept for later steps; None: beside each model.
        device: Where to run; None: the first CUDA GPU if there is one, else the CPU.
        about: What else the results should say of their conditions, as JSON values.
        out: Run folder; None: runs/evaluate-NAME.
        progress: Called with steps done, steps to do and what comes next.
            None: a bar in a terminal or a notebook, unless TQDM_DISABLE is set.

    Returns:
        Quality and cost of each method, also written to the folder with pictures and a record per row.

    Raises:
        ArgumentError: Arguments that do not go together, a ValueError.
        ValueError: The data are not what the models were trained with, a value is not allowed, the models differ in
            more than the seed, or the folder holds results of another kind.
        FileNotFoundError: A file is missing.
        ModelError: There is no such classifier, or it is damaged.
    """
    progress = shown(progress, "evaluating")
    if not corruptions:
        idle({"severity": (severity, 3)}, "of corrupted images; give `corruptions`")
    if methods is not None and not any("laplace" in method for method in methods):
        idle({"draws": (draws, 50), "fit_on": (fit_on, "train")}, "of Laplace; name it among the `methods`")
    given = [models] if isinstance(models, str | os.PathLike) else list(models)
    if not given:
        raise ValueError("there is no network to evaluate; name at least one")
    config = ComparisonConfig(
        METHODS if methods is None else tuple(dict.fromkeys(methods)),
        PosteriorConfig(n_mc=draws, grid=grid, seed=seed), fit_on, tuple(dict.fromkeys(corruptions)), severity, limit,
        Settings(bins, resamples, seed),
    )  # fmt: skip
    networks = [
        CachedOutputs.of(
            model, data, test_data, task, folder=_cache(cache, model, len(given)), device=device,
            batch_size=batch_size, progress=progress,
        )
        for model in given
    ]  # fmt: skip
    conditions = {
        "model": title(given[0]), "data": os.fspath(data),
        "rows": ", ".join(f"{name} {len(rows)}" for name, rows in networks[0].splits.items()), "draws": draws,
        "grid": grid or "wide", "factors_from": fit_on, "bins": bins, "seed": seed, **(about or {}),
        **describe(networks[0].classifier.device),
    }  # fmt: skip
    folder = run_folder("evaluate", given[0]) if out is None else Path(out)
    return compare(networks, config, folder, conditions=conditions, progress=progress)


def _cache(cache: File | None, model: File, models: int) -> Path | None:
    """A folder per model: outputs of two would replace each other."""
    if cache is None or models == 1:
        return None if cache is None else Path(cache)
    return Path(cache) / hashlib.sha256(str(Path(model).expanduser().resolve()).encode()).hexdigest()[:8]

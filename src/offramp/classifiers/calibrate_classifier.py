"""`offramp.calibrate_classifier`: calibrated probabilities for a classifier; a certified threshold, nested sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from offramp.classifiers.cached_outputs import CachedOutputs
from offramp.classifiers.calibrate import LOSSES, RESULT, CalibrationConfig, ClassifierCalibration, calibrate
from offramp.classifiers.calibrated import CANDIDATES, NONE
from offramp.classifiers.certify import RowPromise
from offramp.classifiers.loading import run_folder, title
from offramp.classifiers.splits import TaskName
from offramp.risk import CRC
from offramp.runs.files import require_writable
from offramp.runs.machine import describe
from offramp.runs.progress import shown
from offramp.uncertainty.one_exit import UNTUNED
from offramp.uncertainty.posterior import PosteriorConfig
from offramp.values import ArgumentError, idle

File = str | os.PathLike[str]


def calibrate_classifier(
    model: File,
    data: File,
    *,
    task: TaskName | None = None,
    test_data: File | None = None,
    posterior: Literal["auto", "vanilla", "temperature", "mie", "mie+temperature", "laplace", "mie+laplace"] = "auto",
    draws: int = 50,
    grid: Literal["meronen"] | None = None,
    predictive: Literal["mc", "probit"] = "mc",
    damping: Literal["factored", "exact"] = "factored",
    fit_on: Literal["train", "tune"] = "train",
    tolerance: float | None = None,
    failure: float = 0.05,
    loss: Literal["consistency", "gap", "brier", "brier-consistency"] = "consistency",
    reference: Literal["last-exit", "posterior"] = "last-exit",
    bound: Literal["wsr", "hoeffding-bentkus", "binomial", "crc"] | None = None,
    alpha: float | None = None,
    bins: int = 15,
    seed: int = 0,
    batch_size: int = 64,
    cache: File | None = None,
    device: str | None = None,
    about: Mapping[str, Any] | None = None,
    out: File | None = None,
    progress: Callable[..., None] | None = None,
) -> ClassifierCalibration:
    """Calibrate the exits of a classifier, for `offramp.classify`; certify a threshold, calibrate sets.

    Each step has rows of its own, see `offramp.train_classifier`. What exits say about a split is computed once and
    kept:

        result = offramp.calibrate_classifier("runs/train-resnet-mnist/model", "mnist", out="runs/honest")
        offramp.classify("runs/train-resnet-mnist/model", "five.png", posterior="runs/honest", budget=0.5)

    Args:
        model: Folder of a classifier that `offramp.train_classifier` wrote.
        data: What it was trained on; it is divided again as it was then.
        task: What it is thought to be for; another one is refused. None: what it is for.
        test_data: The published test split it was given, if any.
        posterior: What makes probabilities: "vanilla" (softmax), "temperature", "mie" (model-internal ensemble of the
            exits), "mie+temperature", "laplace" (last layer, with temperature), or "mie+laplace"; "auto": of the first
            four the one that held-out rows of the tune split say helps, which may be none.
        draws: Draws of the logits, with Laplace.
        grid: "meronen": the published grid of temperatures and prior variances; None: a wider one.
        predictive: With Laplace: "mc", means over draws, or "probit", without any.
        damping: Damping of Laplace: "factored", as published, or "exact".
        fit_on: Rows for Laplace's factors. "train": those of the network, as published; "tune": rows it has not seen,
            which then also tune it.
        tolerance: What the mean loss of new rows is to stay below, in (0, 1); None: nothing is certified.
        failure: Probability with which that may fail, in (0, 1).
        loss: Loss of a row that leaves early. "consistency": its class is not the reference's; "gap": it is wrong where
            the reference is right (less where it is the other way round); "brier": half the difference of Brier scores;
            "brier-consistency": the same against the reference's class, without labels.
        reference: What the promise is against. "last-exit": the network's own last exit as it is, the plain full
            network; "posterior": the last exit with the posterior.
        bound: By which it is certified; None: "binomial" for "consistency", else "wsr".
        alpha: Calibrate nested sets of classes: the right one is in those of all exits with probability 1 - alpha;
            None: no sets.
        bins: Bins of the calibration error.
        seed: Seed of Laplace's draws and of the order of rows.
        batch_size: Rows at once.
        cache: Where outputs of exits are kept for later steps; None: beside the model.
        device: Where to run; None: the first CUDA GPU if there is one, else the CPU.
        about: What else the result should say of its conditions, as JSON values.
        out: Folder of the result; None: runs/calibrate-NAME-POSTERIOR.
        progress: Called with the rows done and to do, and the split's name.
            None: a bar in a terminal or a notebook, unless TQDM_DISABLE is set.

    Returns:
        What was fitted, also written to the folder.

    Raises:
        ArgumentError: There is no such loss, or arguments do not go together; a ValueError.
        ValueError: The data are not what the model was trained with, a value is not allowed, or numbers are not finite.
        FileNotFoundError: A file is missing.
        FileExistsError: The folder holds something else.
        ModelError: There is no such classifier, or it is damaged.
    """
    progress = shown(progress, "calibrating")
    if loss not in LOSSES:
        raise ArgumentError(f"`loss` {loss}: choose one of {', '.join(LOSSES)}")
    if bound == "binomial" and loss.startswith("brier"):
        raise ArgumentError(
            f"`bound` binomial is for losses of 0 or 1, and those of `loss` {loss} lie between; give wsr, "
            "hoeffding-bentkus or crc"
        )
    if tolerance is None:
        promised = {"failure": (failure, 0.05), "loss": (loss, "consistency"), "reference": (reference, "last-exit")}
        idle({**promised, "bound": (bound, None)}, "of a threshold that is certified; give `tolerance` too")
    if bound == CRC:
        idle({"failure": (failure, 0.05)}, "of bounds that may fail, and crc is on the mean; give another `bound`")
    if "laplace" not in posterior:
        drawn = {"draws": (draws, 50), "predictive": (predictive, "mc"), "damping": (damping, "factored")}
        idle({**drawn, "fit_on": (fit_on, "train")}, "of Laplace; give `posterior` laplace or mie+laplace")
    if predictive == "probit":
        idle({"draws": (draws, 50)}, "of `predictive` mc; give that")
    if posterior in UNTUNED:
        idle({"grid": (grid, None)}, f"of temperatures, which {posterior} has not; give another `posterior`")
    promise = None if tolerance is None else RowPromise(loss, tolerance, failure, bound or LOSSES[loss][1])
    method, candidates = (NONE, CANDIDATES) if posterior == "auto" else (posterior, ())
    config = CalibrationConfig(
        PosteriorConfig(method, draws, damping, predictive, grid, seed=seed), fit_on, promise, alpha, bins, seed,
        reference, candidates,
    )  # fmt: skip
    passes = CachedOutputs.of(
        model, data, test_data, task, folder=cache, device=device, batch_size=batch_size, progress=progress
    )
    conditions = {
        "model": title(model), "data": os.fspath(data), **(about or {}), **describe(passes.classifier.device)
    }  # fmt: skip
    folder = run_folder("calibrate", model, posterior) if out is None else Path(out)
    require_writable(folder / RESULT)
    return calibrate(passes.outputs, config, folder, network=passes.network, conditions=conditions)

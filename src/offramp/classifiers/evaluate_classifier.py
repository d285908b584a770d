"""`offramp.evaluate_classifier`: all calibration methods on trained classifiers, over budgets and test sets.

Test sets are clean and corrupted. Posteriors are kept beside the passes they were fitted on, so that an interrupted
comparison goes on, and more test sets cost their own pass only.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from offramp.classifiers.cached_outputs import CachedOutputs
from offramp.classifiers.calibrate import FIT_ON, fit_posterior
from offramp.classifiers.evaluate import Fitted, Method, Settings, evaluate
from offramp.classifiers.loading import run_folder, title
from offramp.classifiers.result import EARLIER, SCHEMA, ClassifierEvaluation
from offramp.classifiers.splits import TaskName
from offramp.report.classifiers import save_classifiers
from offramp.runs.bounded import read_object
from offramp.runs.files import replace_file, require_writable
from offramp.runs.machine import describe
from offramp.runs.progress import shown
from offramp.runs.results import RESULTS
from offramp.tasks.images import CORRUPTIONS, SEVERITIES, corrupted
from offramp.tasks.labelled import Labelled
from offramp.uncertainty.one_exit import METHODS, UNTUNED
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.posterior import Posterior, PosteriorConfig, load_posterior
from offramp.values import choice, idle

CLEAN = "clean"
"""Name of the test split as it is."""
File = str | os.PathLike[str]


@dataclass(frozen=True)
class ComparisonConfig:
    """What is compared.

    Attributes:
        methods: Some of `offramp.uncertainty.posterior.METHODS`.
        posterior: How they are fitted; its method has no say.
        fit_on: Which split gives Laplace approximations their factors, see `CalibrationConfig`.
        corruptions: Corruptions of the test images, besides the clean ones.
        severity: Severity of the corruptions, 1 to 5.
        limit: Test rows, drawn at random; None: all.
        settings: Settings of the evaluation.
    """

    methods: tuple[str, ...] = METHODS
    posterior: PosteriorConfig = PosteriorConfig()
    fit_on: str = "train"
    corruptions: tuple[str, ...] = ()
    severity: int = 3
    limit: int | None = None
    settings: Settings = Settings()

    def __post_init__(self) -> None:
        for what, given, allowed in (("method", self.methods, METHODS), ("corruption", self.corruptions, CORRUPTIONS)):
            for name in given:
                choice(what, name, allowed)
        if not self.methods:
            raise ValueError(f"no method is named; name some of {', '.join(METHODS)}")
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity is {self.severity}; give 1 to 5")
        choice("fit_on", self.fit_on, FIT_ON)
        if self.limit is not None and self.limit < 2:
            raise ValueError(f"limit is {self.limit}; at least 2 test rows are needed")


def compare(
    networks: Sequence[CachedOutputs],
    config: ComparisonConfig,
    folder: Path,
    *,
    conditions: dict[str, Any],
    progress: Callable[..., None] | None = None,
) -> ClassifierEvaluation:
    """Fit every method to each network (alike but for the seed), judge them over budgets, and write what is found."""
    _require_free(folder)
    steps = len(networks) * (len(config.methods) + 1)
    seeds: list[tuple[Method, ...]] = []
    fits: list[dict[str, Fitted]] = []
    _require_alike(networks)
    for place, network in enumerate(networks):
        done = place * (len(config.methods) + 1)
        tests = {name: network.on(*named) for name, named in _tests(network, config)}
        posteriors = {}
        for count, method in enumerate(config.methods):
            if progress is not None:
                progress(done + count, steps, f"fitting {method}")
            posteriors[method] = fitted(network, replace(config.posterior, method=method), config.fit_on)
        if progress is not None:
            progress(done + len(config.methods), steps, "comparing")
        threshold = network.outputs("threshold")
        seeds.append(tuple(evaluate(posteriors, threshold, tests, config.settings)))
        fits.append({name: _fitted(posterior) for name, posterior in posteriors.items()})
        for name, rows in tests.items():
            _write_records(folder / f"records-{place}-{name.replace(' ', '-')}.jsonl.gz", posteriors, rows)
    if progress is not None:
        progress(steps, steps, "writing")
    result = ClassifierEvaluation(conditions, tuple(seeds), tuple(fits))
    result.save(folder)
    save_classifiers(result, folder)
    return result


def _require_free(folder: Path) -> None:
    """Refuse a folder with results of another kind, which would be replaced."""
    if (folder / RESULTS).is_file():
        values = read_object(folder / RESULTS, "name a new folder")
        if values.get("schema") not in (SCHEMA, EARLIER):
            raise ValueError(f"{folder} holds results of another kind, {values.get('schema')}; name a new folder")


def _require_alike(networks: Sequence[CachedOutputs]) -> None:
    """Refuse networks that cannot be averaged over."""
    first = networks[0]
    for other in networks[1:]:
        for what in ("layers", "labels"):
            if (a := getattr(first.classifier, what)) != (b := getattr(other.classifier, what)):
                raise ValueError(f"{what} of one network are {a}, of another {b}; evaluate them one by one")
    seen = [network.network for network in networks]
    if len(set(seen)) < len(seen):
        raise ValueError("two of the networks are the same; name each once, or train them with other seeds")


def _tests(network: CachedOutputs, config: ComparisonConfig) -> Iterator[tuple[str, tuple[str, Labelled]]]:
    """The name of each test set, the name its outputs are kept by, and its rows."""
    test, end = network.splits["test"], ""
    if config.limit is not None and config.limit < len(test):
        drawn = torch.randperm(len(test), generator=torch.Generator().manual_seed(config.settings.seed))
        test, end = test.take(drawn[: config.limit].sort().values), f"-{config.limit}"
    yield CLEAN, (f"test{end}", test)
    for kind in config.corruptions:
        name = f"{kind} {config.severity}"
        yield name, (f"test-{kind}-{config.severity}{end}", corrupted(test, kind, config.severity))


def fitted(network: CachedOutputs, config: PosteriorConfig, fit_on: str) -> Posterior:
    """A posterior of a network, fitted now or before: it is kept beside the passes."""
    place = network.folder / f"posterior-{config.method}-{fit_on}"
    inputs = {"network": network.network, "tune": network.outputs("tune").fingerprint}
    try:
        if (found := load_posterior(place, inputs)).config == config:
            return found
    except ValueError:  # none, or one of other rows
        pass
    posterior = fit_posterior(config, fit_on, network.outputs, network.network)
    posterior.save(place)
    return posterior


def _fitted(posterior: Posterior) -> Fitted:
    """Settings of a posterior, and what there is to know of its fit."""
    priors = tuple(exit.omega for exit in posterior.exits if exit.omega is not None)
    return Fitted(tuple(exit.temperature for exit in posterior.exits), priors or None, posterior.messages)


def _write_records(path: Path, posteriors: Mapping[str, Posterior], rows: ExitOutputs) -> None:
    """A line per row: its id, label, and by method the class and confidence of each exit."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, posterior in posteriors.items():
        top = posterior.probabilities(rows).max(-1)
        found[name] = (top.indices.T, top.values.T)  # [N, E]
    ids = rows.ids or tuple(map(str, range(rows.rows)))

    def put(temporary: Path) -> None:
        with gzip.open(temporary, "wt", encoding="utf-8") as file:
            for row, (id, label) in enumerate(zip(ids, rows.labels.tolist(), strict=True)):
                methods = {
                    name: {"class": c[row].tolist(), "confidence": [round(v, 6) for v in p[row].tolist()]}
                    for name, (c, p) in found.items()
                }
                file.write(json.dumps({"id": id, "label": label, "methods": methods}) + "\n")

    replace_file(path, put)


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
    chosen = METHODS if methods is None else tuple(dict.fromkeys(methods))
    if not any("laplace" in method for method in chosen):
        idle({"draws": (draws, 50), "fit_on": (fit_on, "train")}, "of Laplace; name it among the `methods`")
    if set(chosen) <= set(UNTUNED):
        idle({"grid": (grid, None)}, f"of temperatures, which are not in {', '.join(chosen)}; name other `methods`")
    given = [models] if isinstance(models, str | os.PathLike) else list(models)
    if not given:
        raise ValueError("there is no network to evaluate; name at least one")
    config = ComparisonConfig(
        chosen, PosteriorConfig(n_mc=draws, grid=grid, seed=seed), fit_on, tuple(dict.fromkeys(corruptions)), severity,
        limit, Settings(bins, resamples, seed),
    )  # fmt: skip
    networks = [
        CachedOutputs.of(
            model, data, test_data, task, folder=_cache(cache, model, len(given)), device=device,
            batch_size=batch_size, progress=progress,
        )
        for model in given
    ]  # fmt: skip
    if networks[0].classifier.tokenizer is not None:
        idle({"corruptions": (tuple(corruptions), ())}, "of images, and these are texts; give images")
    conditions = {
        "model": title(given[0]), "data": os.fspath(data),
        "rows": ", ".join(f"{name} {len(rows)}" for name, rows in networks[0].splits.items()), "draws": draws,
        "grid": grid or "wide", "factors_from": fit_on, "bins": bins, "seed": seed, **(about or {}),
        **describe(networks[0].classifier.device),
    }  # fmt: skip
    folder = run_folder("evaluate", given[0]) if out is None else Path(out)
    require_writable(folder / RESULTS)
    return compare(networks, config, folder, conditions=conditions, progress=progress)


def _cache(cache: File | None, model: File, models: int) -> Path | None:
    """A folder per model: outputs of two would replace each other."""
    if cache is None or models == 1:
        return None if cache is None else Path(cache)
    return Path(cache) / hashlib.sha256(str(Path(model).expanduser().resolve()).encode()).hexdigest()[:8]

"""All calibration methods on trained classifiers and test sets, clean and corrupted, from fitting to files.

Posteriors are kept beside the passes they were fitted on, so that an interrupted comparison goes on, and more test sets
cost their own pass only.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.classifiers.cached_outputs import CachedOutputs
from offramp.classifiers.calibrate import FIT_ON, fit_posterior
from offramp.classifiers.evaluate import Settings, evaluate
from offramp.classifiers.method import Fitted, Method
from offramp.classifiers.result import EARLIER, SCHEMA, ClassifierEvaluation
from offramp.report.classifiers import save_classifiers
from offramp.runs.bounded import read_object
from offramp.runs.files import replace_file
from offramp.runs.results import RESULTS
from offramp.tasks.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from offramp.tasks.labelled import Labelled
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.posterior import METHODS, Posterior, PosteriorConfig, load_posterior
from offramp.values import choice

CLEAN = "clean"
"""Name of the test split as it is."""


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

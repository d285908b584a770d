"""What a report shows of each kind of run: which one a folder holds, and its pages as blocks, without any HTML."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from offramp.calibration.result import RESULT
from offramp.calibration.result import SCHEMA as CALIBRATION
from offramp.classifiers.calibrate import EARLIER as EARLIER_CALIBRATION
from offramp.classifiers.calibrate import SCHEMA as CLASSIFIER_CALIBRATION
from offramp.classifiers.result import EARLIER as EARLIER_EVALUATION
from offramp.classifiers.result import SCHEMA as CLASSIFIER_EVALUATION
from offramp.classifiers.trainer import SCHEMA as CLASSIFIER_TRAINING
from offramp.distillation.config import SCHEMA as DISTILLATION
from offramp.distillation.token_report import SCHEMA as TOKEN_DISTILLATION
from offramp.evaluation.result import SCHEMA as EVALUATION
from offramp.lm.probe_result import SCHEMA as PROBE
from offramp.report.pages import calibration, classifiers, distillation, evaluation, probe, token_distillation, training
from offramp.report.pages.blocks import Page
from offramp.runs.bounded import read_json
from offramp.runs.results import RESULTS
from offramp.training.trainer import SCHEMA as TRAINING

UNFINISHED = {
    "offramp/evaluate-config/1": "evaluation", "offramp/calibrate-config/1": "calibration", DISTILLATION: "distillation"
}  # fmt: skip
"""Schemas of config.json beside which a result is missing as long as the run is not finished."""
COMMANDS = "offramp train, evaluate, calibrate, probe or distill"


def pages_of(path: Path, *, examples: int, seed: int) -> list[Page]:
    """The pages, usually one, of a run's folder or a probe's JSON; a ValueError if it is none, or unfinished."""
    kinds: list[tuple[str, str, Callable[[Path, dict[str, Any]], Page]]] = [
        (RESULTS, EVALUATION, partial(evaluation.page, examples=examples, seed=seed)),
        ("config.json", TRAINING, training.page),
        (RESULT, CALIBRATION, calibration.page),
        ("probe.json", PROBE, probe.page),
        (RESULTS, CLASSIFIER_EVALUATION, classifiers.evaluation_page),
        (RESULTS, EARLIER_EVALUATION, classifiers.evaluation_page),
        ("config.json", CLASSIFIER_TRAINING, classifiers.training_page),
        (RESULT, CLASSIFIER_CALIBRATION, classifiers.calibration_page),
        (RESULT, EARLIER_CALIBRATION, classifiers.calibration_page),
        (RESULT, DISTILLATION, distillation.run_page),
        ("config.json", TOKEN_DISTILLATION, token_distillation.page),
    ]
    if not path.exists():
        raise ValueError(f"there is no {path}; give a folder of {COMMANDS}")
    if path.is_file():
        probed = _read(path)
        if probed.get("schema") != PROBE:
            raise ValueError(f"{path} is a file that is no probe; give the folder of the run")
        return [_page(probe.page, path, probed)]
    found = [(make, values) for name, schema, make in kinds if (values := _of(path / name, schema))]
    if not found and distillation.is_grid(path):
        return [_page(lambda folder, _: distillation.grid_page(folder), path, {})]
    if not found:
        config = _read(path / "config.json") if (path / "config.json").is_file() else {}
        if (what := UNFINISHED.get(str(config.get("schema")))) is not None:
            raise ValueError(f"the {what} in {path} is not finished; start it again with the same options to go on")
        raise ValueError(f"{path} holds no run of {COMMANDS} that this version reads")
    return [_page(make, path, values) for make, values in found]


def _of(path: Path, schema: str) -> dict[str, Any] | None:
    """The content of a file, if it is there and of that schema."""
    values = _read(path) if path.is_file() else {}
    return values if values.get("schema") == schema else None


def _read(path: Path) -> dict[str, Any]:
    values = read_json(path, "remove it, or give another run")
    return values if isinstance(values, dict) else {}


def _page(make: Callable[[Path, dict[str, Any]], Page], path: Path, values: dict[str, Any]) -> Page:
    try:
        return make(path, values)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is not as this version of offramp writes it ({type(error).__name__}: {error}); make the run again"
        ) from error

"""One HTML file about several runs, which needs nothing beside it: pictures and styles are inside.

Which kind of run a folder holds is told by the schema of its files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from offramp import __version__
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
from offramp.report import calibration, classifiers, distillation, evaluation, probe, training
from offramp.report.blocks import Page
from offramp.report.drawing import colours, require_matplotlib
from offramp.runs.bounded import read_json
from offramp.runs.files import write_text
from offramp.runs.results import RESULTS
from offramp.training.trainer import SCHEMA as TRAINING

TEMPLATE = "report.html.j2"


def report(runs: Sequence[Path], out: Path, *, examples: int = 3, seed: int = 0) -> Path:
    """Write one file about runs, over an older one, with so many examples of each evaluation, drawn by the seed."""
    if not runs:
        raise ValueError("there are no runs to report; give at least one run folder")
    if examples < 0:
        raise ValueError(f"examples is {examples}; it must be at least 0")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a file, such as {out / 'report.html'}")
    require_matplotlib()  # before anything is read
    text = render([page for run in runs for page in pages_of(run, examples=examples, seed=seed)])
    write_text(out, text)
    return out


def render(pages: Sequence[Page]) -> str:
    """Pages as one HTML document; whatever stands in them is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE).render(pages=pages, colours=colours(), version=__version__)


# ---------------------------------------------------------------- what a folder holds

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
        ("config.json", TOKEN_DISTILLATION, training.token_page),
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

"""The same arms of models that differ in their seed: each arm minus its own full model, seed by seed and over all.

    python benchmarks/seeds.py RUN RUN [RUN ...]

Each RUN is a folder of `offramp evaluate` of the same arms. Seeds are what repeats here, so the interval over them is
Student's, of as many differences as there are runs: it says what other trainings would give on these examples.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from claims import shown
from scipy import stats

from offramp.evaluation import FULL, Evaluation
from offramp.evaluation.summary import ArmSummary
from offramp.metrics.intervals import Interval
from offramp.runs.results import RESULTS
from offramp.runs.tables import markdown


def over(values: Sequence[float]) -> Interval:
    """Mean of at least two runs' values, and Student's 95 % interval of it."""
    mean, half = float(np.mean(values)), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return Interval(mean, mean - half, mean + half)


def seeds(runs: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """The head of a table, and a row for every arm that all runs have; corpus scores as they are, others times 100."""
    metric = runs[0].metric
    scale, plain = (1 if metric.endswith("(corpus)") else 100), metric.removesuffix(" (corpus)")
    rows = []
    for name in [arm.name for arm in runs[0].arms if all(arm.name in {a.name for a in run.arms} for run in runs)]:
        arms = [run.arm(name) for run in runs]
        if name == FULL:
            each = [f"{scale * arm.quality[metric].value:.1f}" for arm in arms]
            quality = over([arm.quality[metric].value for arm in arms])
            rows.append([name, *each, f"itself: {shown(quality, 1, scale)}", "1", "1"])
            continue
        each = [shown(arm.difference[metric], 1, scale, "+") for arm in arms]
        costs: list[Callable[[ArmSummary], Interval | None]] = [
            lambda arm: arm.flops_per_token_ratio, lambda arm: arm.seconds_per_token_ratio,
        ]  # fmt: skip
        found = [[ratio.value for arm in arms if (ratio := cost(arm)) is not None] for cost in costs]
        rows.append([
            name, *each, shown(over([arm.difference[metric].value for arm in arms]), 1, scale, "+"),
            *(shown(over(values), 2) if len(values) == len(arms) else "–" for values in found),
        ])  # fmt: skip
    numbers = [f"run {number}" for number in range(1, len(runs) + 1)]
    return ["arm", *numbers, f"{plain}, mean of runs", "FLOPs/token (ratio)", "seconds/token (ratio)"], rows


def _read(folder: Path) -> Evaluation:
    return Evaluation.from_dict(json.loads((folder / RESULTS).read_text(encoding="utf-8")))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare the same arms over models of several seeds.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    folders = parser.parse_args().folders
    if len(folders) < 2:
        parser.error("give at least two runs: one has no spread")
    print(markdown(*seeds([_read(folder) for folder in folders])))
    print(
        "\nEach minus its own full model, + is better; in brackets of a run 95% intervals over its examples, of means "
        "Student's 95% interval over runs. Per generated token, without encoder and prompt."
    )


if __name__ == "__main__":
    main()

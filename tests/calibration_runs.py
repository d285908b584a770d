"""Small calibrations, in a module of its own so that other processes can start them: calibration_runs.py FOLDER."""

import sys
from pathlib import Path

import torch

from evaluation_runs import TASK, examples, model
from offramp import ExitPolicy
from offramp.calibration import Grid, Promise, calibrate

JOBS = {
    "path": {"grid": Grid(thresholds=(1.0, 0.4, 0.05)), "batch_size": 2, "repeats": 3},
    "per-layer": {"grid": Grid(thresholds=(1.0, 0.6), min_layers=(2,), per_layer=True)},
}


def run(folder, **options):
    torch.set_num_threads(1)
    promise = Promise("f1", 0.3, 0.3, kind="textual")
    options = {"max_new_tokens": 4, "resamples": 50, "must_pay": False, **options}
    return calibrate(model(), TASK, examples(25), ExitPolicy(min_layer=1), promise, Path(folder), **options)


if __name__ == "__main__":
    for job, options in JOBS.items():
        run(Path(sys.argv[1]) / job, **options)

"""Seconds and memory of last-layer Laplace, ours and laplace-torch's, in turns on the same rows.

    PYTHONPATH=WHERE_LAPLACE_TORCH_IS .venv/bin/python benchmarks/laplace_torch.py [--width 512] [--classes 100]

    PYTHONPATH=WHERE_LAPLACE_TORCH_IS .venv/bin/python benchmarks/laplace_torch.py [--width 512] [--classes 100]
and a linear head, fit Kronecker factors, and average softmax over 50 draws for new rows. Every try is a process of its
own, whose peak memory is told; --limit stops one that wants more.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from offramp.runs.tables import markdown

DRAWS, PART = 50, 1024


def rows_of(width: int, classes: int, count: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """A head, features and labels."""
    torch.manual_seed(0)
    return nn.Linear(width, classes), torch.randn(count, width), torch.randint(classes, (count,))


def ours(head: nn.Linear, features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Fitted with offramp, factored damping, prior variance 1."""
    from offramp.uncertainty.laplace import Factors, damping
    from offramp.uncertainty.predictive import Noisy, draws

    factors = Factors.empty(head.in_features, head.out_features)
    for part in features.split(PART):
        factors = factors.update(part, head(part))
    damped = damping(factors, "factored")(1.0)
    directions = damped.directions(draws(DRAWS, head.out_features, 0))
    return lambda x: Noisy(head(x), damped.spread(x), directions, damped, 2**28).probabilities(1.0)


def theirs(head: nn.Linear, features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Fitted with laplace-torch, prior precision 1."""
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    model = nn.Sequential(nn.Flatten(), head)
    laplace = Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron", prior_precision=1.0)
    laplace.fit(DataLoader(TensorDataset(features, labels), batch_size=PART))
    return lambda x: torch.cat([
        laplace(part, pred_type="glm", link_approx="mc", n_samples=DRAWS) for part in x.split(8)  # larger ones need GBs
    ])  # fmt: skip


ARMS = {"offramp": ours, "laplace-torch": theirs}


def once(arm: str, width: int, classes: int, count: int, new: int) -> dict[str, float]:
    """One fit and prediction, in this process."""
    head, features, labels = rows_of(width, classes, count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    predict = ARMS[arm](head.requires_grad_(arm != "offramp"), features, labels)
    fitted = time.perf_counter()
    predict(features[:new])
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"fit": fitted - began, "predict": time.perf_counter() - fitted, "memory": (after - before) / 2**20}


def main() -> None:
    """Both, in turns."""
    parser = argparse.ArgumentParser(description="Last-layer Laplace, ours and laplace-torch's.")
    for name, value in (("width", 512), ("classes", 100), ("rows", 50_000), ("new", 64), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--limit", type=float, default=12.0, help="GiB that a try may take")
    parser.add_argument("--once", choices=ARMS)
    options = parser.parse_args()
    if options.once:
        size = int(options.limit * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        print(json.dumps(once(options.once, options.width, options.classes, options.rows, options.new)))
        return
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    failed: dict[str, str] = {}
    for _ in range(options.rounds):
        for arm in ARMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--once", arm]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                failed[arm] = done.stderr.strip().splitlines()[-1][:90]
            else:
                found[arm].append(json.loads(done.stdout.splitlines()[-1]))
    rows = [
        [arm, *(" ".join(f"{v:.2f}" for v in (median(x), min(x), max(x))) for x in columns(tries))]
        if (tries := found[arm]) else [arm, failed[arm], "", ""]
        for arm in ARMS
    ]  # fmt: skip
    head = ["library", "fit, s", f"predict {options.new} rows, s", "memory over the features, GiB"]
    print(
        f"D = {options.width}, C = {options.classes}, N = {options.rows}; median, smallest, largest of {options.rounds}"
    )
    print(markdown(head, rows))


def columns(tries: list[dict[str, float]]) -> list[list[float]]:
    """Fit, predict and memory of all tries."""
    return [[one[name] for one in tries] for name in ("fit", "predict", "memory")]


if __name__ == "__main__":
    main()

"""Nested sets and intervals on synthetic data: data, networks, and one seed of every method."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp.metrics.sets import SetSummary, summarise
from offramp.uncertainty import (
    AVCSRegressionConfig,
    ExitOutputs,
    Intervals,
    NestedConformalConfig,
    PerExitConfig,
    ProductConfig,
    SetExitConfig,
    avcs_classification,
    avcs_regression,
    bayesian_regression,
    caching_anytime,
    exits_by_size,
    nested_conformal,
    per_exit,
    product_anytime,
    violations,
)
from offramp.uncertainty.avcs_regression import Validity
from offramp.uncertainty.per_exit import class_scores, label_scores, residuals
from offramp.uncertainty.sets import Sets

ALPHA, DEPTH, WIDTH = 0.05, 15, 20
Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


# ---------------------------------------------------------------- data


def wiggle(rows: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """sin(πx) + 0.2·cos(4πx) - 0.3x with noise of 0.25, x about 5; Antorán et al. (2020)."""
    x = 5 + 2.5 * torch.randn(rows, generator=random, dtype=torch.float64)
    y = torch.sin(math.pi * x) + 0.2 * torch.cos(4 * math.pi * x) - 0.3 * x
    return x, y + 0.25 * torch.randn(rows, generator=random, dtype=torch.float64)


def three_clusters(rows: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cos(πx/2) + x - 0.1x² with noise of 0.25, x in three intervals; Antorán et al. (2020)."""
    low, high = torch.tensor([[-1.0, 0.0], [1.7, 2.5], [4.0, 5.0]]).double()[torch.arange(rows) % 3].unbind(1)
    x = low + (high - low) * torch.rand(rows, generator=random, dtype=torch.float64)
    x = x[torch.randperm(rows, generator=random)]
    y = x - 0.1 * x**2 + torch.cos(math.pi * x / 2)
    return x, y + 0.25 * torch.randn(rows, generator=random, dtype=torch.float64)


CLASSES, INPUTS = 10, 8


def classes(rows: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ten classes of two overlapping clusters each; the centres are the same for every seed."""
    centres = 1.5 * torch.randn(CLASSES, 2, INPUTS, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (rows,), generator=random)
    which = torch.randint(2, (rows,), generator=random)
    return centres[labels, which] + 0.8 * torch.randn(rows, INPUTS, generator=random), labels


# ---------------------------------------------------------------- networks


class Network(nn.Module):
    """Residual blocks with an exit after the input layer and after each block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.BatchNorm1d(WIDTH)) for _ in range(DEPTH)
        )
        self.heads = nn.ModuleList(nn.Linear(WIDTH, outputs) for _ in range(DEPTH + 1))

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features of all exits, E of [N, D], and their outputs, [E, N, C]."""
        features = [self.first(x)]
        for block in self.blocks:
            features.append(features[-1] + block(features[-1]))
        return features, torch.stack([head(h) for head, h in zip(self.heads, features, strict=True)])


def train(
    network: Network, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], rate: float, seed: int
) -> None:
    """SGD as published but for the rate: momentum 0.9, weight decay 1e-4, 500 epochs of batches of 501."""
    random = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    network.train()
    for _ in range(500):
        for rows in torch.randperm(len(x), generator=random).split(501):
            optimiser.zero_grad()
            outputs = network(x[rows])[1]
            (sum(loss(output, y[rows]) for output in outputs) / DEPTH).backward()
            optimiser.step()
    network.eval()


# ---------------------------------------------------------------- regression


@dataclass
class Result:
    """Sets of a method on the many new rows, and on the rows of the published test split."""

    many: SetSummary
    few: SetSummary


@dataclass
class Regression:
    """A seed's results, and what to draw of it."""

    methods: dict[str, Result]
    validity: Validity
    seconds: float
    sets: dict[str, Intervals]
    x: Tensor
    y: Tensor


def regression(draw: Draw, sizes: tuple[int, int, int], rows: int, seed: int) -> Regression:
    """Train a network, fit every method, judge its sets: one seed."""
    started = time.perf_counter()
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of the weights
    x, y = draw(sum(sizes) + rows, random)
    fitted = slice(sizes[0])
    x, y = (x - x[fitted].mean()) / x[fitted].std(), (y - y[fitted].mean()) / y[fitted].std()
    network = Network(1, 1)
    column = x.float().unsqueeze(1)
    train(network, column[fitted], y[fitted].float().unsqueeze(1), nn.functional.mse_loss, 1e-3, seed)
    with torch.no_grad():
        features = network(column)[0]
    posterior = bayesian_regression.fit([f[fitted] for f in features], y[fitted])
    seconds = time.perf_counter() - started

    def part(first: int, last: int) -> tuple[list[Tensor], Tensor]:
        return [f[first:last] for f in features], y[first:last]

    def predict(part: tuple[list[Tensor], Tensor]) -> bayesian_regression.RegressionPrediction:
        return bayesian_regression.apply(posterior, part[0])

    tune, calibrate = part(0, sizes[0]), part(sizes[0], sizes[0] + sizes[1])
    scores, tune_scores = (residuals(predict(rest), rest[1]) for rest in (calibrate, tune))
    avcs = {
        f"AVCS, {name}": avcs_regression.fit(posterior, config)
        for name, config in {
            "S = 1": AVCSRegressionConfig(seed=seed),
            "S = 10 as published": AVCSRegressionConfig(seed=seed, n_sequences=10, union_bound=False),
            "S = 10, union bound": AVCSRegressionConfig(seed=seed, n_sequences=10),
        }.items()
    }
    alone = per_exit.fit(scores, PerExitConfig(ALPHA))
    raw = nested_conformal.fit(scores, NestedConformalConfig(ALPHA, equalise=False))
    equal = nested_conformal.fit(scores, NestedConformalConfig(ALPHA), tune=tune_scores)

    def sets(part: tuple[list[Tensor], Tensor]) -> dict[str, Intervals]:
        prediction = predict(part)
        bayes, conformal = per_exit.bayes_intervals(prediction), per_exit.apply_intervals(alone, prediction)
        return {
            "AVCS, S = 1, each exit": avcs_regression.apply(avcs["AVCS, S = 1"], part[0]),
            **{name: avcs_regression.apply(state, part[0]).running() for name, state in avcs.items()},
            "Bayes, each exit": bayes,
            "Bayes, intersection": bayes.running(),
            "conformal, each exit": conformal,
            "conformal, intersection": conformal.running(),
            "nested conformal": nested_conformal.apply_intervals(raw, prediction),
            "nested conformal, equalised": nested_conformal.apply_intervals(equal, prediction),
        }

    begin = sizes[0] + sizes[1]
    few, many = part(begin, begin + sizes[2]), part(begin + sizes[2], len(y))
    on_few, on_many = sets(few), sets(many)
    methods = {name: Result(summarise(on_many[name], many[1]), summarise(on_few[name], few[1])) for name in on_many}
    return Regression(methods, avcs_regression.validity(predict(many)), seconds, on_many, x[-rows:], many[1])


# ---------------------------------------------------------------- classification


@dataclass
class Classification:
    """A seed's results."""

    methods: dict[str, SetSummary]
    exits: dict[str, tuple[float, ...]]
    falls: dict[str, dict[float, float]]
    accuracy: list[float]
    thresholds: list[float]
    seconds: float


def classification(rows: int, seed: int) -> Classification:
    """Train a classifier, fit every method on splits of their own, judge their sets: one seed."""
    started = time.perf_counter()
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x, labels = classes(SPLITS[0] + SPLITS[1] + SPLITS[2] + rows, random)
    network = Network(INPUTS, CLASSES)
    train(network, x[: SPLITS[0]], labels[: SPLITS[0]], nn.functional.cross_entropy, 0.05, seed)
    with torch.no_grad():
        features, logits = network(x)
    seconds = time.perf_counter() - started
    costs = torch.arange(1.0, DEPTH + 2).double()
    whole = ExitOutputs(features, logits, labels, costs, tuple(str(row) for row in range(len(x))))
    _, tune, calibrate, test = (whole.take(part) for part in torch.arange(len(x)).split([*SPLITS, rows]))
    sets: dict[str, Sets] = {}
    tuned = avcs_classification.fit(tune)
    sets["AVCS"] = avcs_classification.apply(tuned, test).running()
    for score in ("complement", "raps"):
        alone = per_exit.fit(
            label_scores(class_scores(calibrate, score), calibrate.labels), PerExitConfig(ALPHA, score)
        )
        each = per_exit.apply_classes(alone, test)
        name = {"complement": "1 - p", "raps": "RAPS"}[score]
        sets[f"{name}, each exit"], sets[f"{name}, intersection"] = each, each.running()
        for equalise in (False, True):
            config = NestedConformalConfig(ALPHA, score, equalise)
            state = nested_conformal.fit_classes(calibrate, config, tune=tune if equalise else None)
            key = f"nested conformal, {name}" + (", equalised" if equalise else "")
            sets[key] = nested_conformal.apply_classes(state, test)
    right = test.logits.argmax(-1) == test.labels
    exits = {}
    for key in ("AVCS", "RAPS, intersection", "nested conformal, 1 - p, equalised"):
        for empty in ("continue", "stop", "abstain"):
            taken = exits_by_size(sets[key], SetExitConfig(empty=empty))
            at = taken.exits.unsqueeze(0)
            correct = right.gather(0, at)[0]
            covered = sets[key].contains(test.labels).gather(0, at)[0]
            exits[f"{key}: {empty}"] = (
                float(taken.exits.double().mean()) + 1, float(taken.small.double().mean()),
                float((~taken.reported).double().mean()), float(taken.answered.double().mean()),
                float(correct[taken.answered].double().mean()), float(covered.double().mean()),
            )  # fmt: skip
    plain = test.logits.double().softmax(-1)
    products = product_anytime(test.logits)
    falls = {
        "softmax of each exit": violations(plain, test.labels),
        f"product ({float(products.fallen_back[-1].double().mean()):.1%} fell back)": violations(
            products.probabilities, test.labels
        ),
        "product, softplus": violations(
            product_anytime(test.logits, ProductConfig(softplus=True)).probabilities, test.labels
        ),
        "caching": violations(caching_anytime(plain), test.labels),
    }
    methods = {name: summarise(some, test.labels) for name, some in sets.items()}
    accuracy = right.double().mean(dim=1).tolist()
    return Classification(methods, exits, falls, accuracy, tuned.thresholds.tolist(), seconds)


SPLITS = (2000, 500, 500)  # train, tune, calibrate

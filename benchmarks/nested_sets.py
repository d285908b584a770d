"""Write docs/results/nested-sets.md: nested sets and intervals on synthetic data, beside their baselines.

    .venv/bin/python benchmarks/nested_sets.py [--seeds 3] [--rows 5000]

Wiggle and three clusters are the regressions of Jazbec et al. (2024), "Early-Exit Neural Networks with Nested
Prediction Sets", in the published setting; the classes are ours. About two minutes of one core.
"""

import argparse
import math
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import offramp
from offramp.metrics.sets import SetSummary, binomial, summarise
from offramp.report.plots import BLUE, GREEN, GREY, ORANGE, require_matplotlib, save_figures
from offramp.tables import markdown
from offramp.uncertainty import (
    avcs_classification,
    avcs_regression,
    bayesian_regression,
    nested_conformal,
    per_exit,
    set_exits,
)
from offramp.uncertainty.avcs_regression import AVCSRegressionConfig, Validity
from offramp.uncertainty.conformal_scores import class_scores, label_scores, residuals
from offramp.uncertainty.monotone import DELTAS, ProductConfig, caching_anytime, product_anytime, violations
from offramp.uncertainty.nested_conformal import NestedConformalConfig
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.per_exit import PerExitConfig
from offramp.uncertainty.set_exits import SetExitConfig
from offramp.uncertainty.sets import Intervals, Sets

PAGE = Path(__file__).parents[1] / "docs" / "results" / "nested-sets.md"
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
            taken = set_exits.apply(sets[key], SetExitConfig(empty=empty))
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


# ---------------------------------------------------------------- tables


def over_seeds(values: list[float], digits: int = 3) -> str:
    """Their mean and range."""
    return f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def set_table(summaries: dict[str, list[SetSummary]]) -> str:
    """Sizes, coverage and nestedness at the first and the last exit."""
    rows = []
    for name, seeds in summaries.items():
        first, last = [s.exits[0] for s in seeds], [s.exits[-1] for s in seeds]
        rows.append([
            name,
            f"{sum(e.size for e in first) / len(first):.2f} → {over_seeds([e.size for e in last], 2)}",
            over_seeds([e.coverage.value for e in last]),
            over_seeds([e.simultaneous.value for e in last]),
            over_seeds([e.nestedness for e in last], 2),
            f"{sum(e.empty.value for e in last) / len(last):.1%}",
        ])  # fmt: skip
    head = [
        "method",
        "size, first → last exit",
        "coverage, last exit",
        "at all exits",
        "nestedness, last exit",
        "empty",
    ]
    return markdown(head, rows)


def exits_table(summaries: dict[str, list[SetSummary]]) -> str:
    """Mean sizes at some exits."""
    rows = [
        [name, *(f"{sum(s.exits[e - 1].size for s in seeds) / len(seeds):.2f}" for e in SOME)]
        for name, seeds in summaries.items()
    ]
    return markdown(["mean size at exit", *map(str, SOME)], rows)


SOME = (1, 2, 4, 6, 8, 12, DEPTH + 1)


def regression_section(title: str, about: str, published: str, runs: list[Regression], name: str) -> list[str]:
    """A section of the page."""
    names = list(runs[0].methods)
    few = []
    for method in names:
        summaries = [run.methods[method].few for run in runs]
        total = sum(s.rows for s in summaries)
        count = round(sum(s.exits[-1].simultaneous.value * s.rows for s in summaries))
        share = binomial(count, total)
        each = " / ".join(f"{s.exits[-1].simultaneous.value:.3f}" for s in summaries)
        few.append([method, each, f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})"])
    k = [run.validity for run in runs]
    warned = next((run.validity.warning for run in runs if run.validity.warning), None)
    return [
        "", f"## {title}", "", about, "", set_table({n: [run.methods[n].many for run in runs] for n in names}), "",
        exits_table({n: [run.methods[n].many for run in runs] for n in names}), "",
        f"On the {runs[0].methods[names[0]].few.rows} test rows of the published split only, coverage at all exits, by "
        "seed and over all seeds with an exact 95 % interval of the pooled rows:", "",
        markdown(["method", "by seed", "all seeds"], few), "", published, "",
        f"K at the last exit, over the new rows: mean {over_seeds([v.mean[-1] for v in k], 2)}, 90th percentile "
        f"{over_seeds([v.p90[-1] for v in k], 2)}, share of rows above 0.7 {over_seeds([v.share[-1] for v in k], 2)}. "
        + (f"What the library says for the first such seed: “{warned}.”" if warned else "No seed is warned of."),
        "", f"Training and fitting took {over_seeds([run.seconds for run in runs], 0)} s per seed on a shared core.",
        "",
        f"![{title}: set size and coverage by exit](pictures/nested-sets-{name}-exits.svg)", "",
        f"![{title}: intervals shrinking with depth](pictures/nested-sets-{name}-intervals.svg)",
    ]  # fmt: skip


def classification_section(runs: list[Classification]) -> list[str]:
    """The section on classes."""
    exits = [
        [name, *(f"{sum(run.exits[name][i] for run in runs) / len(runs):{form}}" for i, form in enumerate(FORMS))]
        for name in runs[0].exits
    ]
    falls = [
        [names[0] if len(set(names)) == 1 else names[0].partition(" (")[0],
         *(f"{sum(list(run.falls.values())[i][d] for run in runs) / len(runs):.1%}" for d in DELTAS)]
        for i, names in enumerate(zip(*(run.falls for run in runs), strict=True))
    ]  # fmt: skip
    return [
        "", "## Classes", "",
        f"Ten classes of two overlapping Gaussian clusters each in {INPUTS} dimensions, the same network with "
        f"{CLASSES} outputs trained by cross-entropy (rate 0.05: evidence needs large logits) on {SPLITS[0]:,} rows; "
        f"{SPLITS[1]} to tune (τ, score distributions), {SPLITS[2]} to "
        "calibrate. The source has no such experiment: its classification is CIFAR and ImageNet. Accuracy "
        f"{sum(run.accuracy[0] for run in runs) / len(runs):.3f} at the first exit, "
        f"{sum(run.accuracy[-1] for run in runs) / len(runs):.3f} at the last. τ of the first and last exit: "
        + "; ".join(f"{run.thresholds[0]:g}, {run.thresholds[-1]:g}" for run in runs) + ".", "",
        set_table({n: [run.methods[n] for run in runs] for n in runs[0].methods}), "",
        "Leaving when the set has one class, and what an empty set means (means over the seeds; exits count from 1, "
        f"the last is {DEPTH + 1}; covered: the set at the exit taken holds the truth):", "",
        markdown(["sets: empty", "exit", "one class", "empty", "answered", "accuracy", "covered"], exits), "",
        "Share of rows whose probability of the true class falls by more than δ between any two exits:", "",
        markdown(["predictor", *(f"{delta:g}" for delta in DELTAS)], falls), "",
        "![Classes: set size and coverage by exit](pictures/nested-sets-classes-exits.svg)",
    ]  # fmt: skip


FORMS = (".2f", ".1%", ".1%", ".1%", ".3f", ".3f")


# ---------------------------------------------------------------- pictures


def exits_figure(title: str, unit: str, summaries: dict[str, list[SetSummary]], footnote: str) -> object:
    """Size and coverage by exit, means over the seeds."""
    figure = require_matplotlib().figure.Figure(figsize=(11, 5.0), layout="constrained")
    figure.suptitle(f"{title}\n\n", x=0.01, ha="left", fontsize=13, fontweight="bold")
    left, right = figure.subplots(1, 2)
    for (name, seeds), (color, line) in zip(summaries.items(), STYLES, strict=False):
        numbers = range(1, len(seeds[0].exits) + 1)
        sizes = [[s.exits[e - 1].size for s in seeds] for e in numbers]
        covers = [[s.exits[e - 1].simultaneous.value for s in seeds] for e in numbers]
        for axes, values in ((left, sizes), (right, covers)):
            axes.plot(numbers, [sum(v) / len(v) for v in values], line, color=color, linewidth=1.6, label=name)
            axes.fill_between(numbers, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.1)
    right.axhline(1 - ALPHA, color=GREY, linestyle=":", linewidth=1.2)
    left.set_ylabel(f"mean size ({unit})")
    if unit == "classes":
        left.set_ylim(0)
    else:  # the first sets of AVCS are a hundred times the last
        left.set_yscale("log")
        left.yaxis.set_major_locator(require_matplotlib().ticker.LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter(require_matplotlib().ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        left.minorticks_off()
    right.set_ylabel("share of rows covered at this and all earlier exits")
    right.yaxis.set_major_formatter(require_matplotlib().ticker.PercentFormatter(1.0))
    for axes in (left, right):
        axes.set_xlabel("exit")
    handles, labels = left.get_legend_handles_labels()
    legend = left.legend(handles, labels, loc="lower left", bbox_to_anchor=(-0.01, 1.0), fontsize=9, ncols=3)
    legend.set_in_layout(False)
    figure.supxlabel(footnote, x=0.01, ha="left", fontsize=8, color=GREY)
    return figure


STYLES = [(ORANGE, "-"), ("#E69F00", "--"), (GREY, "-"), (GREY, "--"), (BLUE, "-"), (GREEN, "-")]


def intervals_figure(title: str, run: Regression) -> object:
    """Bands of two methods at four exits."""
    figure = require_matplotlib().figure.Figure(figsize=(11, 5.6), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    order = run.x.argsort()
    order = order[:: max(len(order) // 500, 1)]  # every tenth row: enough to see, and a small file
    x = run.x[order]
    some = torch.arange(0, len(x), 2)
    names = {"AVCS, S = 10, union bound": ORANGE, "nested conformal, equalised": BLUE}
    for row, (name, color) in zip(panels, names.items(), strict=True):
        sets = run.sets[name]
        for axes, e in zip(row, (0, 4, 9, DEPTH), strict=True):
            low, high = sets.low[e][order], sets.high[e][order]
            axes.plot(x[some], run.y[order][some], ".", color="black", markersize=2, alpha=0.4)
            axes.fill_between(x, low.clamp(min=-9), high.clamp(max=9), color=color, alpha=0.35, linewidth=0)
            empty = sets.empty[e][order]
            axes.plot(x[empty], torch.full((int(empty.sum()),), -3.9), "|", color="black", markersize=5)
            axes.set_title(f"exit {e + 1}, mean length {float(sets.size[e].mean()):.2f}", fontsize=9)
            axes.set_ylim(-4.2, 4.2)
        row[0].set_ylabel(name)
    figure.supxlabel(
        f"dots: {len(some)} of the new rows · ticks at the bottom: rows whose set is empty · first seed, standardised",
        x=0.01, ha="left", fontsize=8, color=GREY,
    )  # fmt: skip
    return figure


# ---------------------------------------------------------------- page


def main() -> None:
    """Run all seeds, draw, write the page."""
    parser = argparse.ArgumentParser(description="Nested sets on synthetic data.")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--rows", type=int, default=5000, help="new rows to judge sets on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    seeds = range(options.seeds)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        wiggles = [regression(wiggle, (648, 72, 180), options.rows, seed) for seed in seeds]
        print("wiggle done", flush=True)
        clusters = [regression(three_clusters, (501, 72, 501), options.rows, seed) for seed in seeds]
        print("three clusters done", flush=True)
        labelled = [classification(options.rows, seed) for seed in seeds]
    footnote = f"means and ranges over {options.seeds} seeds, {options.rows:,} new rows each · dotted: {1 - ALPHA:g}"
    shown = ("AVCS, S = 10 as published", "AVCS, S = 10, union bound", "Bayes, each exit", "Bayes, intersection",
             "nested conformal", "nested conformal, equalised")  # fmt: skip
    shown_classes = ("AVCS", "RAPS, each exit", "RAPS, intersection", "1 - p, intersection", "nested conformal, 1 - p",
                     "nested conformal, 1 - p, equalised")  # fmt: skip
    drawings = {}
    for name, title, runs in (("wiggle", "Wiggle", wiggles), ("clusters", "Three clusters", clusters)):
        some = {key: [run.methods[key].many for run in runs] for key in shown}
        drawings[f"nested-sets-{name}-exits"] = lambda t=title, s=some: exits_figure(t, "standardised", s, footnote)
        drawings[f"nested-sets-{name}-intervals"] = lambda t=title, r=runs[0]: intervals_figure(
            f"{t}: intervals shrink with depth", r
        )
    some = {key: [run.methods[key] for run in labelled] for key in shown_classes}
    drawings["nested-sets-classes-exits"] = lambda s=some: exits_figure("Ten classes", "classes", s, footnote)
    for path in save_figures(drawings, PAGE.parent / "pictures"):
        if path.suffix == ".png":
            path.unlink()
    lines = [
        "# Nested sets and intervals on synthetic data", "",
        "Sets that shrink with depth, for exits that may be taken at any time: confidence sequences (AVCS; Jazbec et "
        "al., 2024, “Early-Exit Neural Networks with Nested Prediction Sets”), nested split conformal prediction, and "
        f"sets of single exits with their running intersections as baselines. All aim at {1 - ALPHA:g}.", "",
        "```", f"python benchmarks/nested_sets.py --seeds {options.seeds} --rows {options.rows}", "```", "",
        f"Seeds 0 to {options.seeds - 1}, for data, weights and draws. {platform.machine()} processor, "
        f"{os.cpu_count()} cores, one thread, torch {torch.__version__}, offramp {offramp.__version__}; "
        f"{time.process_time() - started:.0f} s of processor time for the page. Each figure is a mean over the seeds, "
        f"with the range in brackets, on {options.rows:,} new rows per seed. Sizes and nestedness are means over all "
        "rows, an empty set having size 0; coverage counts it as a miss. “Coverage, last exit” looks at the set of the "
        "last exit, “at all exits” asks that the sets of all exits hold the truth.",
        *regression_section(
            "Wiggle", "The published setting: 900 points split 648/72/180, width 20, 15 residual blocks with an exit "
            "before the first and after each, SGD 1e-3 with momentum 0.9 and weight decay 1e-4, 500 epochs, batches "
            "of 501, both axes standardised, the Bayesian last layers fitted on the training rows. The 72 validation "
            "rows, which the paper leaves idle, calibrate the conformal methods; scores are equalised on the training "
            "rows.",
            "Published, read off the authors' figure, one seed: AVCS with S = 10 sizes 8 → 1.2, coverage 1.0 → 0.944; "
            "Bayes nestedness 0.78, its intersection covers 0.822.", wiggles, "wiggle"),
        *regression_section(
            "Three clusters", "A regression, too: inputs in three intervals, 501 points to train and 501 to test as "
            "published, and 72 more to calibrate; everything else as above.",
            "Published, read off the authors' figure, one seed: AVCS with S = 10 sizes 4.3 → 0.9, coverage → 0.986.",
            clusters, "clusters"),
        *classification_section(labelled),
    ]  # fmt: skip
    said = sorted({str(warning.message) for warning in told})
    lines += ["", "Warnings of the library during the runs: " + ("; ".join(said) if said else "none") + "."]
    notes = PAGE.with_name("nested-sets-notes.md")
    if notes.exists():
        lines += ["", notes.read_text(encoding="utf-8").strip()]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {PAGE}, {time.process_time() - started:.0f} s of processor time")


if __name__ == "__main__":
    main()

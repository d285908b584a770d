"""Write docs/results/nested-sets.md: nested sets and intervals on synthetic data, beside their baselines.

    .venv/bin/python benchmarks/nested_sets.py [--seeds 3] [--rows 5000]

Wiggle and three clusters are the regressions of Jazbec et al. (2024), "Early-Exit Neural Networks with Nested
Prediction Sets", in the published setting; the classes are ours. About two minutes of one core.
"""

import argparse
import os
import platform
import time
import warnings
from pathlib import Path

import torch
from nested_synthetic import (
    ALPHA,
    CLASSES,
    DEPTH,
    INPUTS,
    SPLITS,
    Classification,
    Regression,
    classification,
    regression,
    three_clusters,
    wiggle,
)

import offramp
from offramp.metrics.intervals import binomial
from offramp.metrics.sets import SetSummary
from offramp.report.drawing import BLUE, GREEN, GREY, ORANGE, footnote, headed, require_matplotlib, save_figures
from offramp.runs.tables import markdown
from offramp.uncertainty.monotone import DELTAS

PAGE = Path(__file__).parents[1] / "docs" / "results" / "nested-sets.md"


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


def exits_figure(title: str, unit: str, summaries: dict[str, list[SetSummary]], below: str) -> object:
    """Size and coverage by exit, means over the seeds."""
    figure = headed(f"{title}\n\n", 11, 5.0)
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
    footnote(figure, below)
    return figure


STYLES = [(ORANGE, "-"), ("#E69F00", "--"), (GREY, "-"), (GREY, "--"), (BLUE, "-"), (GREEN, "-")]


def intervals_figure(title: str, run: Regression) -> object:
    """Bands of two methods at four exits."""
    figure = headed(title, 11, 5.6)
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
    footnote(
        figure,
        f"dots: {len(some)} of the new rows · ticks at the bottom: rows whose set is empty · first seed, standardised",
    )
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
    below = f"means and ranges over {options.seeds} seeds, {options.rows:,} new rows each · dotted: {1 - ALPHA:g}"
    shown = ("AVCS, S = 10 as published", "AVCS, S = 10, union bound", "Bayes, each exit", "Bayes, intersection",
             "nested conformal", "nested conformal, equalised")  # fmt: skip
    shown_classes = ("AVCS", "RAPS, each exit", "RAPS, intersection", "1 - p, intersection", "nested conformal, 1 - p",
                     "nested conformal, 1 - p, equalised")  # fmt: skip
    drawings = {}
    for name, title, runs in (("wiggle", "Wiggle", wiggles), ("clusters", "Three clusters", clusters)):
        some = {key: [run.methods[key].many for run in runs] for key in shown}
        drawings[f"nested-sets-{name}-exits"] = lambda t=title, s=some: exits_figure(t, "standardised", s, below)
        drawings[f"nested-sets-{name}-intervals"] = lambda t=title, r=runs[0]: intervals_figure(
            f"{t}: intervals shrink with depth", r
        )
    some = {key: [run.methods[key] for run in labelled] for key in shown_classes}
    drawings["nested-sets-classes-exits"] = lambda s=some: exits_figure("Ten classes", "classes", s, below)
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

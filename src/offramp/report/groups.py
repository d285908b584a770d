"""Reports on groups: tables for a terminal that are Markdown as well, JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from offramp.files import replace_file, write_json
from offramp.metrics.group_changes import GroupChange
from offramp.metrics.group_exits import ExitsByGroup
from offramp.metrics.group_weights import WeightDiagnostics
from offramp.metrics.groups import GroupReport
from offramp.metrics.seeds import Paired, SeedSummary, Spread
from offramp.metrics.selection import Epoch, LabelBudget, choices
from offramp.tables import markdown

SCHEMA = "offramp/groups/1"


def groups_table(report: GroupReport) -> str:
    """Every group, then the aggregates.

    Args:
        report: Of a split.

    Returns:
        A table and a line.
    """
    binary = any(group.tpr is not None or group.fpr is not None for group in report.groups)
    shortcut = any(group.shortcut is not None for group in report.groups)
    head = ["group", "n", "accuracy", "interval", "NLL", "ECE", *(["TPR", "FPR"] if binary else [])]
    head += [*(["as attribute"] if shortcut else []), ""]
    rows = [
        [
            g.name, f"{g.n:,}", _percent(g.accuracy), f"{g.right.low:.1%} to {g.right.high:.1%}", f"{g.nll:.3f}",
            _number(g.ece), *([_percent(g.tpr), _percent(g.fpr)] if binary else []),
            *([_percent(g.shortcut)] if shortcut else []),
            "too small" if g.small else "worst" if g == report.worst else "",
        ] for g in report.groups
    ]  # fmt: skip
    worst = report.worst
    said = [
        f"average {_percent(report.average)} (this split's mix)",
        f"adjusted {_percent(report.adjusted)} (training's mix)",
        f"group mean {_percent(report.group_mean)}",
        "no group is large enough to be called the worst"
        if worst is None
        else f"worst group {_percent(worst.accuracy)} ({worst.name}, n = {worst.n:,})",
        f"average minus worst {_percent(report.gap)}",
        f"best minus worst {_percent(report.pairwise_gap)}",
        f"worst / best {_number(report.pairwise_ratio)}",
    ]
    return f"{markdown(head, rows)}\n\n{report.split}, {report.n:,} rows: {', '.join(said)}."


def changes_table(changes: Sequence[GroupChange]) -> str:
    """What a change of model did to each group."""
    rows = [
        [
            c.name, f"{c.n:,}", _percent(c.before), _percent(c.after),
            f"{c.change:+.1%} ({c.low:+.1%} to {c.high:+.1%})", "" if c.shown else "no difference shown",
        ] for c in changes
    ]  # fmt: skip
    return markdown(["group", "n", "before", "after", "change (interval)", ""], rows)


def exits_table(exits: ExitsByGroup) -> str:
    """Accuracy of every exit by group, the share that leaves there, and what a group costs."""
    count = len(exits.costs)
    head = ["group", "n", *(f"exit {e + 1}" for e in range(count)), "at its exit", "mean exit", "FLOPs"]
    rows = [
        [
            name, f"{int(exits.counts[g]):,}",
            *(f"{exits.accuracy[e, g]:.1%} / {exits.exit_rate[e, g]:.0%}" for e in range(count)),
            f"{exits.chosen_accuracy[g]:.1%}", f"{exits.depth[g]:.2f}", f"{exits.flops[g]:.3g}",
        ] for g, name in enumerate(exits.names)
    ]  # fmt: skip
    return f"{markdown(head, rows)}\n\nUnder an exit: accuracy if all left there / share that does."


def selection_table(history: Sequence[Epoch]) -> str:
    """What each rule would have chosen from a run, and how the test rows fare there."""

    def cells(rule: str, epoch: Epoch) -> list[str]:
        test = epoch.test
        return [
            rule, f"{epoch.number}", _percent(epoch.val.average), _percent(epoch.val.worst_group),
            _percent(test.average if test else None), _percent(test.worst_group if test else None),
        ]  # fmt: skip

    head = ["rule", "epoch", "val average", "val worst group", "test average", "test worst group"]
    return markdown(head, [cells(rule, epoch) for rule, epoch in choices(history).items()])


def weights_table(epochs: Mapping[int, WeightDiagnostics]) -> str:
    """Weights of every epoch: how many, how much, and whether they find the minority."""
    head = ["epoch", "reweighted", "mean", "median", "largest", "AUROC", "precision", "recall", ""]
    rows = [
        [
            f"{epoch}", _percent(w.reweighted), f"{w.mean:.2f}", f"{w.quantiles[3]:.2f}", f"{w.quantiles[-1]:.2f}",
            _number(w.auroc), _number(w.precision), _number(w.recall), "too few" if w.too_few else "",
        ] for epoch, w in epochs.items()
    ]  # fmt: skip
    return markdown(head, rows)


def seeds_table(
    summaries: Mapping[str, SeedSummary], comparisons: Mapping[str, Paired], reference: str | None = None
) -> str:
    """Methods over seeds.

    Args:
        summaries: By method.
        comparisons: Mean of minima against a reference, by method; the reference has none.
        reference: Its name, where other methods may lack a comparison too, having run on other seeds.

    Returns:
        A table.
    """
    head = ["method", "seeds", "mean of minima", "minimum of means", "difference (interval)", "Holm p", "verdict"]
    rows = []
    for name, s in summaries.items():
        against = comparisons.get(name)
        rows.append(
            [
                name, f"{s.seeds}", _spread(s.mean_of_minima),
                f"{s.minimum_of_means:.1%} ({s.minimum_group})",
                *(
                    ["", "", "reference" if reference in (None, name) else "not compared"]
                    if against is None
                    else [
                        f"{against.difference.mean:+.1%} ({against.low:+.1%} to {against.high:+.1%})",
                        _number(against.holm_p), against.verdict,
                    ]
                ),
            ]
        )  # fmt: skip
    return markdown(head, rows)


def report_dict(
    report: GroupReport,
    *,
    budget: LabelBudget,
    changes: Sequence[GroupChange] = (),
    exits: ExitsByGroup | None = None,
    weights: Mapping[int, WeightDiagnostics] | None = None,
    history: Sequence[Epoch] = (),
) -> dict[str, Any]:
    """JSON values of what is known about a model's groups.

    Args:
        report: Of the test split.
        budget: Where group labels were used.
        changes: From the teacher, or another model.
        exits: Exits by group.
        weights: Diagnostics by epoch.
        history: Of the run.

    Returns:
        An object with a `schema`; numbers that do not exist are null.
    """
    worst = report.worst
    values = {
        "schema": SCHEMA,
        "split": report.split,
        "rows": report.n,
        "groups": [dataclasses.asdict(group) for group in report.groups],
        "average": report.average,
        "adjusted": report.adjusted,
        "group_mean": report.group_mean,
        "worst": None if worst is None else {"name": worst.name, "n": worst.n, "accuracy": worst.accuracy},
        "gap": report.gap,
        "pairwise_gap": report.pairwise_gap,
        "pairwise_ratio": report.pairwise_ratio,
        "changes": [dataclasses.asdict(change) for change in changes],
        "exits": None if exits is None else dataclasses.asdict(exits),
        "weights": {str(epoch): dataclasses.asdict(found) for epoch, found in (weights or {}).items()},
        "selection": {rule: dataclasses.asdict(epoch) for rule, epoch in choices(history).items()} if history else {},
        "label_budget": {f"{use}, {split}": count for (use, split), count in budget.used.items()},
        "label_free": budget.label_free,
    }
    return plain(values)  # type: ignore[no-any-return]


def save_report(values: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write groups.json and groups.csv, a row per group.

    Args:
        values: Of `report_dict`.
        folder: Where to; made if missing.

    Returns:
        The files.
    """
    write_json(folder / "groups.json", dict(values))
    rows = []
    for group in values["groups"]:
        right = {"accuracy": group["right"]["value"], "low": group["right"]["low"], "high": group["right"]["high"]}
        rows.append({"name": group["name"], "n": group["n"]} | right | {k: v for k, v in group.items() if k != "right"})

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    replace_file(folder / "groups.csv", write)
    return [folder / "groups.json", folder / "groups.csv"]


def _spread(value: Spread) -> str:
    return f"{value.mean:.1%}" + (f" ± {value.sd:.1%}" if value.sd == value.sd else "")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def plain(value: Any) -> Any:
    """Tensors as lists, and what is not a number as null."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inside) for inside in value]
    return None if isinstance(value, float) and value != value else value

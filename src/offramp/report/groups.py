"""Tables on groups, for a terminal and for pages: of one model first, of methods over seeds last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offramp.metrics.group_effects import (
    TOO_FEW,
    TOO_MANY,
    BudgetByGroup,
    ExitsByGroup,
    GroupChange,
    ReadoutDiagnostics,
    WeightDiagnostics,
)
from offramp.metrics.groups import GroupReport
from offramp.metrics.intervals import Paired, SeedSummary, Spread
from offramp.metrics.selection import Epoch, choices
from offramp.runs.tables import Table, cell

TOO_FEW_NOTE = (
    f"Too few: below {TOO_FEW:.1%} of the rows weigh more than the others, so weights do next to nothing; the readout "
    "has hardly an error left: read at an earlier block, or teach the readout less."
)
READOUT_NOTE = (
    "Readout: its accuracy on the training rows, which it was taught on, and chance: that of its answers if they had "
    "nothing to do with the labels."
)
READOUT_NOTES = {
    "near chance": "Near chance: in a batch of the student such a readout could not be told from chance (Wilson, "
    "95 %), so its weights are noise; teach it at another learning rate, longer, or after a later block.",
    "nearly all gated": f"Nearly all gated: above {TOO_MANY:.1%} of the rows; weights change the size of the steps and "
    "little else.",
    "sets empty": "Sets empty: those of all rows, so they say nothing and all rows weigh 1; sets of a readout that is "
    "near chance are often empty.",
}
"""By flag of `ReadoutDiagnostics`."""
EXITS_NOTE = "Under an exit: accuracy if all left there / mean confidence there / share that leaves there."


def groups_table(report: GroupReport) -> Table:
    """Every group, then the aggregates."""
    binary = any(group.tpr is not None or group.fpr is not None for group in report.groups)
    shortcut = any(group.shortcut is not None for group in report.groups)
    head = ["group", "n", "accuracy", "interval", "NLL", "ECE", *(["TPR", "FPR"] if binary else [])]
    head += [*(["as attribute"] if shortcut else []), ""]
    rows = [
        [
            g.name, f"{g.n:,}", cell(g.accuracy, ".1%"), f"{g.right.low:.1%} to {g.right.high:.1%}", cell(g.nll),
            cell(g.ece), *([cell(g.tpr, ".1%"), cell(g.fpr, ".1%")] if binary else []),
            *([cell(g.shortcut, ".1%")] if shortcut else []),
            "too small" if g.small else "worst" if g == report.worst else "",
        ] for g in report.groups
    ]  # fmt: skip
    worst = report.worst
    said = [
        f"average {cell(report.average, '.1%')} (this split's mix)",
        f"adjusted {cell(report.adjusted, '.1%')} (training's mix)",
        f"group mean {cell(report.group_mean, '.1%')}",
        "no group is large enough to be called the worst"
        if worst is None
        else f"worst group {cell(worst.accuracy, '.1%')} ({worst.name}, n = {worst.n:,})",
        f"average minus worst {cell(report.gap, '.1%')}",
        f"best minus worst {cell(report.pairwise_gap, '.1%')}",
        f"worst / best {cell(report.pairwise_ratio)}",
    ]
    return Table(head, rows, "Every group", (f"{report.split}, {report.n:,} rows: {', '.join(said)}.",))


def changes_table(changes: Sequence[GroupChange]) -> Table:
    """What a change of model, from teacher to student, did to each group."""
    rows = [
        [
            c.name, f"{c.n:,}", cell(c.before, ".1%"), cell(c.after, ".1%"),
            f"{c.change:+.1%} ({c.low:+.1%} to {c.high:+.1%})", "" if c.shown else "no difference shown",
        ] for c in changes
    ]  # fmt: skip
    head = ["group", "n", "teacher", "student", "change (interval)", ""]
    note = "Intervals: paired bootstrap over rows, not corrected for the number of groups."
    return Table(head, rows, "What distillation cost each group", (note,))


def exits_head(exits: ExitsByGroup) -> list[str]:
    """Columns for `exits_rows`."""
    return ["group", *(f"exit {e + 1}" for e in range(len(exits.costs))), "at its exit", "mean exit", "FLOPs"]


def exits_rows(exits: ExitsByGroup) -> list[list[str]]:
    """A row per group: each exit, accuracy where rows leave, and what that costs."""
    count = len(exits.costs)
    return [
        [
            name,
            *(
                f"{exits.accuracy[e, g]:.1%} / {exits.confidence[e, g]:.1%} / {exits.exit_rate[e, g]:.0%}"
                for e in range(count)
            ),
            f"{exits.chosen_accuracy[g]:.1%}", f"{exits.depth[g]:.2f}", f"{exits.flops[g]:.3g}",
        ] for g, name in enumerate(exits.names)
    ]  # fmt: skip


def exits_table(exits: ExitsByGroup) -> Table:
    """Accuracy and confidence of every exit by group, the share that leaves there, and what a group costs."""
    costs = ", ".join(f"{cost:.3g}" for cost in exits.costs.tolist())
    notes = (EXITS_NOTE, f"FLOPs up to the exits: {costs}.")
    return Table(exits_head(exits), exits_rows(exits), "Exits by group", notes)


def budgets_table(budgets: Mapping[float, BudgetByGroup], names: Sequence[str]) -> Table:
    """The worst group at each threshold of confidence, and what each group costs there."""
    head = ["leave above", "FLOPs", "average", "worst group", "", *(f"FLOPs: {name}" for name in names)]
    rows = [
        [
            cell(at, ".1%"), f"{b.flops:.3g}", cell(b.average, ".1%"), cell(b.worst, ".1%"), b.group,
            *(f"{cost:.3g}" for cost in b.group_flops.tolist()),
        ] for at, b in budgets.items()
    ]  # fmt: skip
    return Table(head, rows, "The worst group at each budget", ("FLOPs are means over rows.",))


def selection_table(history: Sequence[Epoch]) -> Table:
    """What each rule would have chosen from a run, and how the test rows fare there."""

    def cells(rule: str, epoch: Epoch) -> list[str]:
        test = epoch.test
        return [
            rule, f"{epoch.number}", cell(epoch.val.average, ".1%"), cell(epoch.val.worst_group, ".1%"),
            cell(test.average if test else None, ".1%"), cell(test.worst_group if test else None, ".1%"),
        ]  # fmt: skip

    head = ["rule", "epoch", "val average", "val worst group", "test average", "test worst group"]
    rows = [cells(rule, epoch) for rule, epoch in choices(history).items()]
    return Table(head, rows, "What each rule would have chosen")


def accuracy_cell(readouts: Sequence[ReadoutDiagnostics]) -> str:
    """Mean accuracy and mean chance; of none a dash."""
    if not readouts:
        return "–"
    accuracy, chance = (
        sum(values) / len(readouts) for values in zip(*((r.accuracy, r.chance) for r in readouts), strict=True)
    )
    return f"{accuracy:.1%} (chance {chance:.1%})"


def weights_table(
    epochs: Mapping[int, WeightDiagnostics], readouts: Mapping[int, ReadoutDiagnostics] | None = None
) -> Table:  # fmt: skip
    """Weights by epoch, with readouts by the epoch behind which they were taught: how good, how many rows, whose."""
    taught = readouts or {}
    names = list(next(iter(epochs.values())).by_group) if epochs else []
    head = ["epoch", "readout", "reweighted", "mean", "median", "largest", *(f"mean: {name}" for name in names)]
    head += ["AUROC", "precision", "recall", ""]
    rows = [
        [
            f"{epoch}", accuracy_cell([taught[epoch]] if epoch in taught else []),
            cell(w.reweighted, ".1%"), f"{w.mean:.2f}", f"{w.quantiles[3]:.2f}", f"{w.quantiles[-1]:.2f}",
            *(cell(w.by_group.get(name), ".2f") for name in names),
            cell(w.auroc), cell(w.precision), cell(w.recall),
            ", ".join([*(["too few"] if w.too_few else []), *(taught[epoch].flags if epoch in taught else ())]),
        ] for epoch, w in epochs.items()
    ]  # fmt: skip
    notes = ["AUROC, precision and recall: of the weights as detectors of the minority."]
    if taught:
        notes.append(READOUT_NOTE)
    if any(w.too_few for w in epochs.values()):
        notes.append(TOO_FEW_NOTE)
    notes += [text for flag, text in READOUT_NOTES.items() if any(flag in r.flags for r in taught.values())]
    return Table(head, rows, "Weights after each epoch", tuple(notes))


PAIRED_HEAD = ["difference (interval)", "Holm p", "verdict"]


def paired_cells(found: Paired) -> list[str]:
    """A comparison over seeds, for columns `PAIRED_HEAD`."""
    interval = f"{found.difference.mean:+.1%} ({found.low:+.1%} to {found.high:+.1%})"
    return [interval, cell(found.holm_p), found.verdict]


def seeds_table(
    summaries: Mapping[str, SeedSummary],
    comparisons: Mapping[str, Paired],
    reference: str | None = None,
    also: Mapping[str, str] | None = None,
) -> Table:
    """Methods over seeds, compared with `reference` where they ran on its seeds; `also` stands behind a verdict."""
    head = ["method", "seeds", "mean of minima", "minimum of means", *PAIRED_HEAD]
    rows = []
    for name, s in summaries.items():
        against = comparisons.get(name)
        cells = ["", "", "reference" if reference in (None, name) else "not compared"]
        if against is not None:
            cells = paired_cells(against)
            cells[-1] += f", {also[name]}" if also and name in also else ""
        rows.append(
            [name, f"{s.seeds}", spread_cell(s.mean_of_minima), f"{s.minimum_of_means:.1%} ({s.minimum_group})", *cells]
        )
    return Table(head, rows, "Worst group")


def spread_cell(value: Spread) -> str:
    """A mean over seeds with its standard deviation, if there are several."""
    return f"{value.mean:.1%}" + (f" ± {value.sd:.1%}" if value.sd == value.sd else "")

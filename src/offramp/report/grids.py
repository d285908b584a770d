"""What a grid found: methods over seeds, group by group and rule by rule, with where group labels were used."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.distillation.results import (
    Result,
    budget_of,
    changes_of,
    chosen,
    confounded,
    confounded_note,
    large_groups,
    mean_changes,
    mean_exits,
    mean_report,
    readouts_of,
    report_of,
    selected_by,
    truncated_in,
    weights_of,
)
from offramp.metrics.groups import SMALLEST
from offramp.metrics.intervals import CHANGES, SIGNIFICANT, Paired, compare, paired, spread, summarise_seeds, together
from offramp.metrics.selection import RULES
from offramp.report.groups import (
    EXITS_NOTE,
    PAIRED_HEAD,
    READOUT_NOTE,
    READOUT_NOTES,
    TOO_FEW_NOTE,
    accuracy_cell,
    exits_head,
    exits_rows,
    paired_cells,
    seeds_table,
    spread_cell,
)
from offramp.runs.files import replace_file
from offramp.runs.tables import Table, cell

REFERENCE = "kd"
"""What other methods with the same teacher are compared with."""
FEW = 6
"""Methods in a printed table that has a row for each group of each method."""
INTERVALS = "In brackets: 95 % intervals, of several seeds by t, of one by its test rows (Wilson; changes: bootstrap)."
VERDICTS = (
    f"Verdicts follow Holm's p (below {SIGNIFICANT:g}), which counts all methods of a table; intervals are of one "
    "comparison each."
)
Methods = Mapping[str, Sequence[Result]]


def by_method(results: Sequence[Result], teacher: str | None) -> dict[str, list[Result]]:
    """Results of each method with this teacher, and of those without one, by name, in the order of seeds."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if result["teacher"] in (None, teacher):
            found.setdefault(result["name"], []).append(result)
    return {name: sorted(own, key=lambda result: result["seed"]) for name, own in found.items()}


def teachers_of(results: Sequence[Result]) -> list[str | None]:
    """The teachers in the order of the runs; None alone if there is none."""
    return list(dict.fromkeys(r["teacher"] for r in results if r["teacher"] is not None)) or [None]


def group_accuracies(results: Sequence[Result], rule: str) -> NDArray[np.float64]:
    """Accuracy of the test groups that are large enough, at the epoch a rule chooses, [S, G]."""
    kept = large_groups(results[0])
    return np.array([[chosen(result, rule)["groups"][g] for g in kept] for result in results], dtype=np.float64)


def worst(results: Sequence[Result], rule: str) -> NDArray[np.float64]:
    """Accuracy of the worst test group of each run, [S]."""
    found: NDArray[np.float64] = group_accuracies(results, rule).min(1)
    return found


def comparisons(methods: Methods, rule: str) -> dict[str, Paired]:
    """Worst groups against `REFERENCE`, seed by seed, of methods with the same seeds; {} if that has not two."""
    if REFERENCE not in methods or len(methods[REFERENCE]) < 2:
        return {}
    seeds = [result["seed"] for result in methods[REFERENCE]]
    figures = {
        name: worst(own, rule) for name, own in methods.items()
        if name != REFERENCE and [result["seed"] for result in own] == seeds
    }  # fmt: skip
    return compare(figures, worst(methods[REFERENCE], rule), bounds=CHANGES) if figures else {}


def matched_comparisons(methods: Methods, rule: str) -> dict[str, tuple[str, Paired]]:
    """Worst groups of confounded methods against plain distillation with their T and λ, by name, with its name."""
    pairs = {
        name: match for name, match in confounded(methods, REFERENCE).items()
        if match in methods and len(methods[match]) > 1
        and [result["seed"] for result in methods[name]] == [result["seed"] for result in methods[match]]
    }  # fmt: skip
    found = [
        paired(worst(methods[name], rule), worst(methods[match], rule), bounds=CHANGES) for name, match in pairs.items()
    ]
    return {name: (match, result) for (name, match), result in zip(pairs.items(), together(found), strict=True)}


# ---------------------------------------------------------------- all tables


def tables(results: Sequence[Result], rule: str, most: int | None = None) -> str:
    """All tables as Markdown, a section for each teacher; of large tables only the first `most` methods."""
    parts = []
    for teacher in teachers_of(results):
        parts.append("## " + (f"Teacher: {teacher}" if teacher else "Without a teacher"))
        for table in tables_of(by_method(results, teacher), rule, most):
            parts += [f"### {table.title}", str(table)]
    return "\n\n".join(parts) + "\n"


def tables_of(methods: Methods, rule: str, most: int | None = None) -> list[Table]:
    """The tables of the methods with one teacher, in the order of reading, but those that have nothing to say."""
    found = [
        methods_table(methods, rule), matched_table(methods, rule), groups_of_methods(methods, rule),
        changes_of_methods(methods),
        exits_of_methods(methods, most), detection_table(methods), rules_table(methods), labels_table(methods),
    ]  # fmt: skip
    return [table for table in found if table.rows or table.notes]


def methods_table(methods: Methods, rule: str) -> Table:
    """Mean of minima, minimum of means and the paired difference of each method."""
    summaries = {}
    for name, own in methods.items():
        names = [own[0]["groups"]["names"][g] for g in large_groups(own[0])]
        summaries[name] = summarise_seeds(group_accuracies(own, rule), names)
    mixed = confounded(methods, REFERENCE)
    table = seeds_table(summaries, comparisons(methods, rule), REFERENCE, also=dict.fromkeys(mixed, "confounded"))
    note = f"Accuracy on test rows, epochs chosen by {rule}; ± is a standard deviation over seeds."
    cut = truncated_in([result for own in methods.values() for result in own])
    against = f"Differences are to {REFERENCE}. {VERDICTS}"
    more = confounded_note(methods, REFERENCE)
    return replace(table, notes=(f"{note} {against}", *more, *cut))


def matched_table(methods: Methods, rule: str) -> Table:
    """Confounded methods against plain distillation with the same T and λ, where that has run."""
    rows = [
        [name, match, *paired_cells(result)] for name, (match, result) in matched_comparisons(methods, rule).items()
    ]
    head = ["method", "against", *PAIRED_HEAD]
    return Table(head, rows, "Worst group, with the same T and λ", (VERDICTS,) if rows else ())


def groups_of_methods(methods: Methods, rule: str) -> Table:
    """Accuracy of every test group with its interval, averages raw and adjusted, and the gaps to the worst group."""
    first = next(iter(methods.values()))[0]
    names, counts = first["groups"]["names"], first["groups"]["test"]
    head = ["method", *names, "average", "adjusted", "average - worst", "best - worst"]
    rows = [["test rows", *(f"{count:,}" for count in counts), "", "", "", ""]]
    for name, own in methods.items():
        report, judged = mean_report(own, rule), group_accuracies(own, rule)
        averages = np.array([chosen(result, rule)["test"]["average"] for result in own])
        rows.append(
            [
                name, *(_interval(g.accuracy, g.right.low, g.right.high) for g in report.groups),
                f"{report.average:.1%}", cell(report.adjusted, ".1%"),
                spread_cell(spread(averages - judged.min(1))), spread_cell(spread(judged.max(1) - judged.min(1))),
            ]
        )  # fmt: skip
    notes = (INTERVALS + " Adjusted: to the training rows' mix of groups.", *_too_small(names, counts))
    return Table(head, rows, "Every group", notes)


def _too_small(names: Sequence[str], counts: Sequence[int]) -> tuple[str, ...]:
    """What to say of groups that no verdict can rest on."""
    small = [name for name, count in zip(names, counts, strict=True) if count < SMALLEST]
    if len(small) == len(names):
        return (f"All groups have fewer than {SMALLEST} test rows: no worst group can be trusted.",)
    return (f"Too few test rows (below {SMALLEST}) to be called the worst: {', '.join(small)}.",) if small else ()


def changes_of_methods(methods: Methods) -> Table:
    """Accuracy of the teacher, and what distillation changed of it, at the selected epochs of both."""
    changes = {name: found for name, own in methods.items() if (found := mean_changes(own))}
    taught = [name for name, own in methods.items() if own[0]["teacher"] is not None]
    title = "What distillation cost each group"
    if not changes:
        missing = "Unknown: the runs have no answers of the teacher to test rows."
        return Table([], [], title, (missing,) if taught else ())
    first = next(iter(changes.values()))
    rows = [["the teacher's accuracy", *(f"{change.before:.1%}" for change in first)]]
    rows += [[name, *(_interval(c.change, c.low, c.high, "+") for c in found)] for name, found in changes.items()]
    unknown = any(result.get("teacher_unseen", True) is None for own in methods.values() for result in own)
    note = "The teacher does not say what it was trained on: test rows may be among it, and its accuracy too high."
    notes = (INTERVALS, *([note] if unknown else []))
    return Table(["student minus teacher", *(change.name for change in first)], rows, title, notes)


def exits_of_methods(methods: Methods, most: int | None = None) -> Table:
    """A row per group of `most` methods, mean over seeds: accuracy, confidence, leavers and cost of each exit."""
    shown = list(methods)[:most]
    found = {name: mean_exits(methods[name]) for name in shown}
    rows = [[name if g == 0 else "", *row] for name, exits in found.items() for g, row in enumerate(exits_rows(exits))]
    left = len(methods) - len(shown)
    more = (f"{left} more methods are in report.md.",) if left else ()
    threshold = next(iter(methods.values()))[0]["study"]["threshold"]
    note = f"{EXITS_NOTE} Rows leave where confidence is above {threshold:g}; FLOPs are a group's mean."
    return Table(["method", *exits_head(next(iter(found.values())))], rows, "Exits by group", (note, *more))


def detection_table(methods: Methods) -> Table:
    """Whether readouts know anything and weights find the minority: shares, mean weights by group, and AUROC."""
    groups = list(next(iter(methods.values()))[0]["groups"]["names"])
    rows, warned, wrong = [], False, set[str]()
    for name, own in methods.items():
        found = [w for result in own for w in weights_of(result).values()]
        read = [r for result in own for r in readouts_of(result).values()]
        if not found:
            continue
        few = sum(w.too_few for w in found)
        alike = (own[0]["method"]["weights"] or {}).get("control") == "mean-matched"  # on purpose
        warned |= bool(few) and not alike
        aurocs = [w.auroc for w in found if w.auroc is not None]
        flags = Counter(flag for r in read for flag in r.flags)
        wrong |= set(flags)
        said = [f"too few in {few} of {len(found)}"] if few and not alike else []
        rows.append([
            name, accuracy_cell(read),
            f"{np.mean([w.reweighted for w in found]):.1%}", f"{np.mean([w.mean for w in found]):.2f}",
            *(_number([w.by_group.get(group) for w in found]) for group in groups),
            f"{np.mean(aurocs):.3f}" if aurocs else "–",
            f"{min(aurocs):.2f} to {max(aurocs):.2f}" if aurocs else "–",
            "; ".join([*said, *(f"{flag} in {count} of {len(read)}" for flag, count in flags.items())]),
        ])  # fmt: skip
    head = ["method", "readout", "reweighted", "mean weight", *groups, "AUROC", "from to", "epochs"]
    notes = (
        "Means over epochs and seeds; under a group: its rows' mean weight. AUROC: of weights as minority detectors.",
        *([READOUT_NOTE] if any(row[1] != "–" for row in rows) else []), *([TOO_FEW_NOTE] if warned else []),
        *(READOUT_NOTES[flag] for flag in READOUT_NOTES if flag in wrong),
    )  # fmt: skip
    return Table(head, rows, "Weights of training rows", notes if rows else ())


def rules_table(methods: Methods) -> Table:
    """Test worst group by selection rule; how much of a gain is selection."""
    rows = []
    for name, own in methods.items():
        known = [rule for rule in RULES if all(rule in result["rules"] for result in own)]
        rows.append([name, *(spread_cell(spread(worst(own, rule))) if rule in known else "–" for rule in RULES)])
    return Table(["method", *RULES], rows, "Worst group by what each selection rule would have chosen")


def labels_table(methods: Methods) -> Table:
    """Where group labels were used, methods with the same account together; sentences, not rows."""
    lines: dict[str, list[str]] = {}
    for name, own in methods.items():
        lines.setdefault(budget_of(own[0]).line(), []).append(name)
    said = tuple(f"{', '.join(names)}: {line}" for line, names in lines.items())
    return Table([], [], "Where group labels were used", said)


# ---------------------------------------------------------------- files


def summary(results: Sequence[Result], rule: str) -> dict[str, Any]:
    """JSON values: by teacher and method the worst groups of all runs, and their differences."""
    found: dict[str, Any] = {}
    for teacher in teachers_of(results):
        methods = by_method(results, teacher)
        against, same = comparisons(methods, rule), matched_comparisons(methods, rule)
        mixed = confounded(methods, REFERENCE)
        found[teacher or "none"] = {
            name: {
                "seeds": [result["seed"] for result in own], "worst": worst(own, rule).tolist(),
                "seconds": sum(result["seconds"]["wall"] for result in own),
                "difference": None if name not in against else _difference(against[name]),
                "confounded": name in mixed, "same_temperature_and_fraction": mixed.get(name),
                "difference_to_same": None if name not in same else _difference(same[name][1]),
            } for name, own in methods.items()
        }  # fmt: skip
    return {"schema": "offramp/distill-summary/1", "select": rule, "teachers": found}


def _difference(result: Paired) -> dict[str, Any]:
    return {
        "mean": result.difference.mean, "low": result.low, "high": result.high, "wilcoxon_p": result.wilcoxon_p,
        "holm_p": result.holm_p, "verdict": result.verdict,
    }  # fmt: skip


def write_groups(results: Sequence[Result], path: Path) -> None:
    """Write or replace a CSV file: a row per group of each run, at the epoch that its study's rule chose."""
    head = ["method", "teacher", "seed", "group", "n", "accuracy", "low", "high", "nll", "ece", "tpr", "fpr"]
    head += ["change_from_teacher", "exit_accuracy", "mean_exit", "mean_flops"]
    rows = []
    for result in results:
        changes = {change.name: change.change for change in changes_of(result)}
        exits = result["exits"]
        for g, group in enumerate(report_of(result, selected_by(result)).groups):
            rows.append([
                result["name"], result["teacher"], result["seed"], group.name, group.n, group.accuracy,
                group.right.low, group.right.high, None if group.nll != group.nll else group.nll, group.ece, group.tpr,
                group.fpr, changes.get(group.name), exits["chosen_accuracy"][g], exits["depth"][g], exits["flops"][g],
            ])  # fmt: skip

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([head, *rows])

    replace_file(path, write)


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.1%} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def _number(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.2f}" if known else "–"

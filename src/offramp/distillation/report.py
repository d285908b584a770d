"""What a grid found: methods over seeds, group by group and rule by rule, with where group labels were used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.metrics.groups import SMALLEST
from offramp.metrics.seeds import Paired, compare, spread, summarise_seeds
from offramp.metrics.selection import RULES, LabelBudget
from offramp.report.groups import seeds_table
from offramp.tables import markdown

REFERENCE = "kd"
"""What other methods with the same teacher are compared with."""
Result = Mapping[str, Any]


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


def large_groups(result: Result) -> list[int]:
    """Places of the groups with test rows enough to be called the worst; of all if none has."""
    counts = result["groups"]["test"]
    return [g for g, n in enumerate(counts) if n >= SMALLEST] or list(range(len(counts)))


def group_accuracies(results: Sequence[Result], rule: str) -> NDArray[np.float64]:
    """Accuracy of the test groups that are large enough, at the epoch a rule chooses, [S, G]."""
    kept = large_groups(results[0])
    return np.array([[_chosen(result, rule)["groups"][g] for g in kept] for result in results], dtype=np.float64)


def worst(results: Sequence[Result], rule: str) -> NDArray[np.float64]:
    """Accuracy of the worst test group of each run, [S]."""
    found: NDArray[np.float64] = group_accuracies(results, rule).min(1)
    return found


def comparisons(methods: Mapping[str, Sequence[Result]], rule: str, reference: str = REFERENCE) -> dict[str, Paired]:
    """Worst groups against a reference, seed by seed, of the methods that have the same seeds; {} if it has not two."""
    if reference not in methods or len(methods[reference]) < 2:
        return {}
    seeds = [result["seed"] for result in methods[reference]]
    figures = {
        name: worst(own, rule) for name, own in methods.items()
        if name != reference and [result["seed"] for result in own] == seeds
    }  # fmt: skip
    return compare(figures, worst(methods[reference], rule)) if figures else {}


def tables(results: Sequence[Result], rule: str) -> str:
    """All tables as Markdown, a section for each teacher.

    Args:
        results: Of a grid.
        rule: By which epochs are chosen in the tables of methods and groups.

    Returns:
        The text.
    """
    parts = []
    for teacher in teachers_of(results):
        methods = by_method(results, teacher)
        parts.append("## " + (f"Teacher: {teacher}" if teacher else "Without a teacher"))
        parts.append(f"Test accuracy of the worst group, epochs chosen by {rule}; differences to {REFERENCE}.")
        parts.append(methods_table(methods, rule))
        parts.append(groups_of_methods(methods, rule))
        parts.append("What each rule would have chosen, mean of the test worst group:")
        parts.append(rules_table(methods))
        parts.append(budget_lines(methods))
    return "\n\n".join(parts) + "\n"


def methods_table(methods: Mapping[str, Sequence[Result]], rule: str) -> str:
    """Mean of minima, minimum of means and the paired difference of each method."""
    summaries = {}
    for name, own in methods.items():
        names = [own[0]["groups"]["names"][g] for g in large_groups(own[0])]
        summaries[name] = summarise_seeds(group_accuracies(own, rule), names)
    return seeds_table(summaries, comparisons(methods, rule), REFERENCE)


def groups_of_methods(methods: Mapping[str, Sequence[Result]], rule: str) -> str:
    """Accuracy of every test group, raw and adjusted average, mean ± sd over seeds."""
    first = next(iter(methods.values()))[0]
    names, counts = first["groups"]["names"], first["groups"]["test"]
    head = ["method", *(f"{name} (n = {count:,})" for name, count in zip(names, counts, strict=True))]
    head += ["average", "adjusted"]
    rows = []
    for name, own in methods.items():
        table = np.array([_chosen(result, rule)["groups"] for result in own])
        averages = [_chosen(result, rule)["test"]["average"] for result in own]
        adjusted = [result["adjusted"] for result in own]
        rows.append(
            [
                name, *(_cell(table[:, g]) for g in range(len(names))), _cell(averages),
                "–" if None in adjusted else _cell(adjusted),
            ]
        )  # fmt: skip
    return markdown(head, rows) + _too_small(names, counts)


def _too_small(names: Sequence[str], counts: Sequence[int]) -> str:
    """What to say of groups that no verdict can rest on."""
    small = [name for name, count in zip(names, counts, strict=True) if count < SMALLEST]
    if len(small) == len(names):
        return f"\n\nAll groups have fewer than {SMALLEST} test rows: no worst group can be trusted."
    return f"\n\nToo few test rows (below {SMALLEST}) to be called the worst: {', '.join(small)}." if small else ""


def rules_table(methods: Mapping[str, Sequence[Result]]) -> str:
    """Test worst group by selection rule; how much of a gain is selection."""
    rows = []
    for name, own in methods.items():
        known = [rule for rule in RULES if all(rule in result["rules"] for result in own)]
        rows.append([name, *(_cell(worst(own, rule)) if rule in known else "–" for rule in RULES)])
    return markdown(["method", *RULES], rows)


def budget_lines(methods: Mapping[str, Sequence[Result]]) -> str:
    """Where group labels were used, methods with the same account together."""
    lines: dict[str, list[str]] = {}
    for name, own in methods.items():
        line = LabelBudget({(use, split): count for use, split, count in own[0]["budget"]}).line()
        lines.setdefault(line, []).append(name)
    return "\n".join(f"- {', '.join(names)}: {line}" for line, names in lines.items())


def exits_of_methods(methods: Mapping[str, Sequence[Result]]) -> str:
    """Accuracy of every exit by group, mean over seeds, and where rows leave."""
    rows = []
    for name, own in methods.items():
        accuracy, rates = (np.mean([r["exits"][key] for r in own], 0) for key in ("accuracy", "exit_rate"))
        depth = np.mean([r["exits"]["depth"] for r in own], 0)
        for g, group in enumerate(own[0]["groups"]["names"]):
            cells = [f"{accuracy[e, g]:.1%} / {rates[e, g]:.0%}" for e in range(len(accuracy))]
            rows.append([name if g == 0 else "", group, *cells, f"{depth[g]:.2f}"])
    exits = len(next(iter(methods.values()))[0]["exits"]["accuracy"])
    head = ["method", "group", *(f"exit {e + 1}" for e in range(exits)), "mean exit"]
    return markdown(head, rows) + "\n\nUnder an exit: accuracy if all left there / share that does."


def detection_table(methods: Mapping[str, Sequence[Result]]) -> str:
    """Whether weights find the minority: share reweighted, mean weight and AUROC, mean over epochs and seeds."""
    rows = []
    for name, own in methods.items():
        found = [row["weights"] for result in own for row in result["history"] if row.get("weights")]
        found = [w for w in found if w["reweighted"] > 0]
        if not found:
            continue
        cells = [np.mean([w[key] for w in found]) for key in ("reweighted", "mean")]
        aurocs = [w["auroc"] for w in found if w["auroc"] is not None]
        rows.append([
            name, f"{cells[0]:.1%}", f"{cells[1]:.2f}", f"{np.mean(aurocs):.3f}" if aurocs else "–",
            f"{min(aurocs):.2f} to {max(aurocs):.2f}" if aurocs else "–",
        ])  # fmt: skip
    return markdown(["method", "reweighted", "mean weight", "AUROC of minority", "over epochs and seeds"], rows)


def summary(results: Sequence[Result], rule: str) -> dict[str, Any]:
    """JSON values: by teacher and method the worst groups of all runs, and their differences."""
    found: dict[str, Any] = {}
    for teacher in teachers_of(results):
        methods = by_method(results, teacher)
        against = comparisons(methods, rule)
        found[teacher or "none"] = {
            name: {
                "seeds": [result["seed"] for result in own], "worst": worst(own, rule).tolist(),
                "seconds": sum(result["seconds"]["wall"] for result in own),
                "difference": None if name not in against else _difference(against[name]),
            } for name, own in methods.items()
        }  # fmt: skip
    return {"schema": "offramp/distill-summary/1", "select": rule, "teachers": found}


def _difference(result: Paired) -> dict[str, Any]:
    return {
        "mean": result.difference.mean, "low": result.low, "high": result.high, "wilcoxon_p": result.wilcoxon_p,
        "holm_p": result.holm_p, "verdict": result.verdict,
    }  # fmt: skip


def _chosen(result: Result, rule: str) -> Any:
    rules = result["rules"]
    if rule not in rules:
        raise ValueError(f"{result['key']} has no epoch by the rule {rule}; it has {', '.join(rules)}")
    return rules[rule]


def _cell(values: Sequence[float] | NDArray[np.float64]) -> str:
    found = spread(values)
    return f"{found.mean:.1%}" + ("" if found.sd != found.sd else f" ± {found.sd:.1%}")

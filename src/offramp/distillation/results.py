"""Results of runs read again: as the types that metrics and pictures take, for one run and over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.distillation.config import SCHEMA
from offramp.distillation.history import AGAIN
from offramp.distillation.methods import METHODS
from offramp.metrics.group_effects import (
    BudgetByGroup,
    ExitsByGroup,
    GroupChange,
    ReadoutDiagnostics,
    WeightDiagnostics,
)
from offramp.metrics.groups import SMALLEST, GroupNumbers, GroupReport
from offramp.metrics.intervals import CHANGES, SHARES, Share, binomial, t_interval
from offramp.metrics.selection import Epoch, Judged, LabelBudget
from offramp.runs.bounded import read_object
from offramp.runs.codec import decode
from offramp.runs.digests import unsealed

Result = Mapping[str, Any]
"""What stands in result.json."""


def results_in(root: Path) -> tuple[list[Result], list[str]]:
    """Results of a grid's finished runs, by method, teacher and seed; and names of those without a result."""
    found: list[Result] = []
    unfinished = []
    for folder in sorted((root / "runs").iterdir()):
        if (folder / "result.json").is_file():
            values = read_result(folder / "result.json")
            if values.get("schema") == SCHEMA:
                found.append(values)
        elif (folder / "config.json").is_file():
            unfinished.append(folder.name)
    names = list(METHODS)

    def place(result: Result) -> tuple[int, str, str, int]:
        plain = result["name"].partition("+")[0]
        where = names.index(plain) if plain in names else len(names)
        return where, result["name"], result["teacher"] or "", result["seed"]

    return sorted(found, key=place), unfinished


def read_result(file: Path) -> Result:
    """What stands in the result.json of a run; a ValueError if it was changed or is damaged."""
    return unsealed(read_object(file, AGAIN), file, AGAIN)


def chosen(result: Result, rule: str) -> Any:
    """What a rule chose: "epoch", "val", "test", "groups" (accuracies); a ValueError where it lacks groups."""
    rules = result["rules"]
    if rule not in rules:
        raise ValueError(f"{result['key']} has no epoch by the rule {rule}; it has {', '.join(rules)}")
    return rules[rule]


# ---------------------------------------------------------------- one run


def selected_by(result: Result) -> str:
    """The rule that chose the epoch that is judged in detail: the study's, or "last" where groups are unknown."""
    rule: str = result["study"]["select"]
    return rule if rule in result["rules"] else "last"


def report_of(result: Result, rule: str | None = None) -> GroupReport:
    """The groups of the test rows; by another rule than the study's, or of an older run, without likelihoods."""
    rule = rule or selected_by(result)
    if "report" in result and chosen(result, rule)["epoch"] == result["selected"]:
        return decode(GroupReport, result["report"])
    found, counts = chosen(result, rule), result["groups"]["test"]
    numbers = []
    for name, n, accuracy in zip(result["groups"]["names"], counts, found["groups"], strict=True):
        share = binomial(round(accuracy * n), n, method="wilson")
        numbers.append(GroupNumbers(name, n, share, float("nan"), None, None, None, None, n < SMALLEST))
    rows = next(count for use, split, count in result["budget"] if (use, split) == ("reporting", "test"))
    train = result["groups"]["train"]
    adjusted = None
    if result["adjusted"] is not None and sum(train.values()):
        adjusted = sum(train[group.name] * group.accuracy for group in numbers) / sum(train.values())
    return GroupReport("test", rows, tuple(numbers), found["test"]["average"], adjusted)


def exits_of(result: Result) -> ExitsByGroup:
    """Exits by group at the selected epoch, leaving where confidence is above the study's threshold."""
    return decode(ExitsByGroup, result["exits"])


def changes_of(result: Result) -> list[GroupChange]:
    """From teacher to student; none if the teacher's answers are unknown, or by an older version."""
    return [GroupChange(**change) for change in result.get("changes") or ()]


def budgets_of(result: Result) -> dict[float, BudgetByGroup]:
    """Budgets by threshold; none by an older version."""
    return {
        entry["threshold"]: decode(BudgetByGroup, {name: v for name, v in entry.items() if name != "threshold"})
        for entry in result.get("budgets", ())
    }


def weights_of(result: Result) -> dict[int, WeightDiagnostics]:
    """Weights by epoch; without those before the first readout, all 1, and behind the last epoch, which has none."""
    weights, epochs = result["method"]["weights"], len(result["history"])
    warmup, last = (weights.get("warmup", 0), epochs - 1) if weights else (0, epochs)
    return {
        row["epoch"]: WeightDiagnostics(**row["weights"]) for row in result["history"]
        if row.get("weights") and warmup < row["epoch"] <= last
    }  # fmt: skip


def readouts_of(result: Result) -> dict[int, ReadoutDiagnostics]:
    """Readouts by the epoch behind which they were taught; none of a method without, or by an older version."""
    return {row["epoch"]: ReadoutDiagnostics(**row["readout"]) for row in result["history"] if row.get("readout")}


def large_groups(result: Result) -> list[int]:
    """Places of the groups with test rows enough to be called the worst; of all if none has."""
    counts = result["groups"]["test"]
    return [g for g, n in enumerate(counts) if n >= SMALLEST] or list(range(len(counts)))


def epochs_of(result: Result) -> list[Epoch]:
    """All epochs, those that a rule chose with the test rows; a worst group of these is one of `large_groups`."""
    kept = large_groups(result)
    tests = {
        found["epoch"]: replace(Judged(**found["test"]), worst_group=min(found["groups"][g] for g in kept))
        for found in result["rules"].values()
    }
    return [Epoch(row["epoch"], Judged(**row["val"]), tests.get(row["epoch"])) for row in result["history"]]


def truncated_in(results: Sequence[Result]) -> tuple[str, ...]:
    """One sentence on texts that were cut; none where none was, or nobody knows, as in runs of older versions."""
    known = [result["truncated"] for result in results if "truncated" in result]
    most = {split: max(counts[split] for counts in known) for split in known[0]} if known else {}
    if not any(most.values()):
        return ()
    said = ", ".join(f"{count:,} in {split}" for split, count in most.items())
    return (f"Texts longer than the student takes were cut: {said}{' at most' if len(known) > 1 else ''}.",)


def budget_of(result: Result) -> LabelBudget:
    """Where group labels were used."""
    return LabelBudget({(use, split): count for use, split, count in result["budget"]})


# ---------------------------------------------------------------- over seeds


def mean_report(own: Sequence[Result], rule: str) -> GroupReport:
    """Means over the runs of one method, with t intervals over seeds; rows are those of the first run."""
    reports = [report_of(result, rule) for result in own]
    if len(reports) == 1:
        return reports[0]
    first = reports[0]
    groups = []
    for g, group in enumerate(first.groups):
        values = np.array([report.groups[g].accuracy for report in reports])
        share = Share(float(values.mean()), *t_interval(values, bounds=SHARES))
        nll = float(np.mean([report.groups[g].nll for report in reports]))
        groups.append(GroupNumbers(group.name, group.n, share, nll, None, None, None, None, group.small))
    adjusted = [report.adjusted for report in reports if report.adjusted is not None]
    return GroupReport(
        first.split, first.n, tuple(groups), float(np.mean([report.average for report in reports])),
        float(np.mean(adjusted)) if len(adjusted) == len(reports) else None,
    )  # fmt: skip


def mean_exits(own: Sequence[Result]) -> ExitsByGroup:
    """Means over the runs of one method; rows and costs are those of the first."""
    names = ("accuracy", "confidence", "exit_rate", "early_accuracy", "chosen_accuracy", "depth", "flops", "average")
    first = own[0]["exits"]
    means = {name: _mean([result["exits"][name] for result in own]).tolist() for name in names}
    return decode(ExitsByGroup, {**first, **means})


def mean_changes(own: Sequence[Result]) -> list[GroupChange]:
    """Means over the runs of one method, with t intervals over seeds; of one run its own; none if one has none."""
    runs = [changes_of(result) for result in own]
    if len(runs) == 1 or not all(runs):
        return runs[0] if len(runs) == 1 else []
    found = []
    for each in zip(*runs, strict=True):
        low, high = t_interval([change.change for change in each], bounds=CHANGES)
        before, after = (float(np.mean([getattr(change, name) for change in each])) for name in ("before", "after"))
        found.append(GroupChange(each[0].name, each[0].n, before, after, low, high))
    return found


def _mean(values: Sequence[Any]) -> NDArray[np.float64]:
    """Over runs; NaN where one has null."""
    found: NDArray[np.float64] = np.array(values, dtype=np.float64).mean(0)
    return found

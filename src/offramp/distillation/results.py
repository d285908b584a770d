"""Results of runs: what a run knows after each epoch, its result read again, for one run and over seeds, and compared.

While it trains, only validation rows are looked at; test rows are judged once, when training is over, at the epochs
that some selection rule chose: their weights are kept.

Some comparisons with plain distillation are confounded. DEDIER's reference code has T = 3 and λ = 1, published KD T = 4
and λ = 0.9. A difference between them is that of the weights and of T and λ together; plain distillation with the same
T and λ tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp.distillation.config import SCHEMA
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
from offramp.metrics.selection import Epoch, Judged, LabelBudget, choices
from offramp.runs.bounded import read_json, read_object
from offramp.runs.codec import decode
from offramp.runs.digests import sealed, unsealed
from offramp.runs.files import write_json
from offramp.runs.tensor_files import read_tensors, write_tensors

AGAIN = "remove the run's folder to train it again"
Result = Mapping[str, Any]
"""What stands in result.json."""
MATTERS = ("temperature", "fraction")
"""T and λ, by their names in a method."""


class History:
    """The epochs of a run, in a folder.

    Args:
        folder: Holds history.json, and N.safetensors for each epoch N that a rule would choose so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "history.json"
        self.rows = _rows(self.file) if self.file.is_file() else []

    def add(self, epoch: int, val: Judged, more: Mapping[str, Any], model: nn.Module) -> None:
        """Record an epoch, counted from 1: its validation, and JSON values besides.

        One that is repeated after an interruption replaces what was recorded of it and later.
        """
        self.rows = [row for row in self.rows if row["epoch"] < epoch]
        self.rows.append({"epoch": epoch, "val": asdict(val), **more})
        chosen = {found.number for found in choices(self.epochs()).values()}
        if epoch in chosen:
            write_tensors(self.folder / f"{epoch}.safetensors", model.state_dict())
        write_json(self.file, sealed({"epochs": self.rows}))
        self._forget_but(chosen)

    def epochs(self) -> list[Epoch]:
        """As selection rules take them."""
        return [Epoch(row["epoch"], Judged(**row["val"])) for row in self.rows]

    def choices(self) -> dict[str, int]:
        """The epoch that each rule chooses."""
        return {rule: epoch.number for rule, epoch in choices(self.epochs()).items()}

    def weights(self, epoch: int) -> dict[str, Tensor]:
        """The state of the model after an epoch that a rule chooses."""
        return read_tensors(self.folder / f"{epoch}.safetensors", AGAIN)[1]

    def forget_weights(self) -> None:
        """Drop the weights: a finished run has been judged at all epochs that a rule chooses."""
        self._forget_but(set())

    def _forget_but(self, epochs: set[int]) -> None:
        for path in self.folder.glob("*.safetensors"):
            if path.stem.isdecimal() and int(path.stem) not in epochs:
                path.unlink()


def _rows(file: Path) -> list[dict[str, Any]]:
    """What is known after each epoch; earlier versions kept nothing but the list."""
    values = read_json(file, AGAIN)
    values = {"epochs": values} if isinstance(values, list) else values
    rows = unsealed(values, file, AGAIN).get("epochs") if isinstance(values, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"epoch", "val"} <= set(row) for row in rows):
        raise ValueError(f"{file} is damaged: it holds no epochs; {AGAIN}")
    return rows


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


def confounded(methods: Mapping[str, Sequence[Result]], reference: str) -> dict[str, str]:
    """Methods that differ from plain distillation in T or λ and in something else.

    Those that differ in nothing else are about T and λ, and those with another loss have neither.

    Returns:
        By name of the method: what plain distillation with its T and λ is called, here or on the command line.
    """
    if reference not in methods:
        return {}
    plain = dict(methods[reference][0]["method"])
    found = {}
    for name, own in methods.items():
        made = own[0]["method"]
        if made["loss"] == plain["loss"] and _of(made) != _of(plain) and made != {**plain, **_of(made)}:
            found[name] = _matched(methods, {**plain, **_of(made)}, reference)
    return found


def confounded_note(methods: Mapping[str, Sequence[Result]], reference: str) -> tuple[str, ...]:
    """What to say of confounded comparisons, one sentence for each T and λ; nothing where there are none."""
    said = []
    by_match: dict[str, list[str]] = {}
    for name, match in confounded(methods, reference).items():
        by_match.setdefault(match, []).append(name)
    for match, names in by_match.items():
        ours, theirs = (_words(methods[name][0]["method"]) for name in (names[0], reference))
        where = "which is compared below" if match in methods else f"add --method {match} to the same command"
        said.append(
            f"Confounded: {', '.join(names)} {'has' if len(names) == 1 else 'have'} {ours}, {reference} has {theirs}; "
            f"a difference may be theirs. Plain distillation with the same T and λ is {match}: {where}."
        )
    return tuple(said)


def _of(method: Mapping[str, Any]) -> dict[str, Any]:
    return {name: method[name] for name in MATTERS}


def _matched(methods: Mapping[str, Sequence[Result]], plain: Mapping[str, Any], reference: str) -> str:
    for name, own in methods.items():
        if own[0]["method"] == plain:
            return name
    return f"{reference}+temperature={plain['temperature']:g}+fraction={plain['fraction']:g}"


def _words(method: Mapping[str, Any]) -> str:
    return f"T = {method['temperature']:g}, λ = {method['fraction']:g}"

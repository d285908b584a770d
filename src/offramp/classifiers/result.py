"""An evaluation of calibration methods over training seeds: summaries, tables, JSON, files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.classifiers.evaluate import BASELINE, SHARES, Fitted, Method, Point
from offramp.metrics.intervals import spread, t_interval
from offramp.runs.results import Result
from offramp.runs.tables import Table

SCHEMA = "offramp/classifier-evaluation/2"
EARLIER = "offramp/classifier-evaluation/1"
"""With costs over those of a network that computes the heads of all exits."""
HEADS = {
    "top1": "Top-1 %", "top5": "Top-5 %", "nlpd": "NLPD", "ece": "ECE", "aurc": "AURC", "augrc": "AUGRC",
    "brier": "Brier", "cost": "cost",
}  # fmt: skip
"""Of columns; "cost" is the realised one over that of the plain full network."""


@dataclass(frozen=True)
class Summary:
    """A figure over S training seeds.

    Attributes:
        mean: Over the seeds.
        sd: Standard deviation over the seeds, S - 1 below; None for one seed.
        low: Lower end of a 95 % interval: Student's t over seeds; for one seed by bootstrap over test rows, or None.
        high: Upper end.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ClassifierEvaluation(Result):
    """What `offramp.classifiers.evaluate.evaluate` found, of one network or of several trained with other seeds.

    Attributes:
        conditions: What was held fixed, and versions; JSON values.
        seeds: For each network, the same methods on the same test sets.
        fitted: For each network and method, how it was fitted; empty: unknown.
    """

    schema, earlier, noun = SCHEMA, (EARLIER,), "evaluation of classifiers"

    conditions: dict[str, Any]
    seeds: tuple[tuple[Method, ...], ...]
    fitted: tuple[Mapping[str, Fitted], ...] = ()

    def __post_init__(self) -> None:
        names = [[(m.test, m.name) for m in methods] for methods in self.seeds]
        if not names or not names[0] or any(other != names[0] for other in names):
            raise ValueError(
                f"the {len(names)} seeds have {[len(n) for n in names]} methods on test sets; each must have the same"
            )
        if self.fitted and len(self.fitted) != len(names):
            raise ValueError(f"there are fits of {len(self.fitted)} networks for {len(names)} seeds; give one of each")

    def __repr__(self) -> str:
        networks = f"{len(self.seeds)} network{'s' if len(self.seeds) > 1 else ''}"
        return (
            f"ClassifierEvaluation({len(self.methods(self.tests[0]))} methods on {', '.join(self.tests)}, {networks})"
        )

    def _rows(self) -> Iterable[Any]:
        """A row per method, test set and network (`seed`, from 0), with its metrics averaged over the budgets."""
        return (
            {"test": m.test, "method": m.name, "seed": seed, **m.mean}
            for seed, methods in enumerate(self.seeds)
            for m in methods
        )

    @property
    def tests(self) -> tuple[str, ...]:
        """Names of the test sets."""
        return tuple(dict.fromkeys(method.test for method in self.seeds[0]))

    def methods(self, test: str) -> tuple[str, ...]:
        """Names of the methods on a test set."""
        return tuple(method.name for method in self.seeds[0] if method.test == test)

    def of(self, test: str, name: str) -> list[Method]:
        """A method on a test set, one per seed."""
        found = [method for methods in self.seeds for method in methods if (method.test, method.name) == (test, name)]
        if not found:
            raise ValueError(f"there is no {name!r} on {test!r}; there are {', '.join(self.methods(self.tests[0]))}")
        return found

    # ------------------------------------------------------------ figures

    def mean(self, test: str, name: str, metric: str) -> Summary:
        """A metric, or "cost", averaged over the budgets."""
        return self._over([method.mean[metric] for method in self.of(test, name)])

    def difference(self, test: str, name: str, metric: str) -> Summary | None:
        """The same minus the baseline's of the same seed; None where there is none."""
        found = self.of(test, name)
        return self._over([method.difference[metric] for method in found]) if found[0].difference else None

    @staticmethod
    def _over(found: Sequence[Any]) -> Summary:
        if len(found) == 1:
            return Summary(found[0].value, None, found[0].low, found[0].high)
        values = [interval.value for interval in found]
        over = spread(values)
        return Summary(over.mean, over.sd, *t_interval(values))

    # ------------------------------------------------------------ files

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the metrics over all seeds."""
        summary = {
            test: {
                name: {metric: vars(self.mean(test, name, metric)) for metric in self.of(test, name)[0].mean}
                for name in self.methods(test)
            }
            for test in self.tests
        }
        return {**super().to_dict(), "summary": summary}

    # ------------------------------------------------------------ tables

    def table(self) -> str:
        """All tables for a terminal that are Markdown as well, and how to read them."""
        blocks = []
        for test in self.tests:
            blocks += [f"## {test}", "Mean over the budgets", str(self.mean_table(test))]
            if (differences := self.difference_table(test)).rows:
                blocks += [f"Minus {BASELINE}", str(differences)]
            blocks += ["Along the curve over realised costs", str(self.curve_table(test))]
            blocks += ["Each exit alone", str(self.anytime_table(test))]
            blocks += [f"Asked and realised cost, {self.unit} = 1", str(self.cost_table(test))]
        if self.fitted:
            blocks += ["## Temperatures T and prior variances ω of the exits", str(self.fitted_table())]
        conditions = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.conditions.items())
        return "\n\n".join([*blocks, *self.notes(), *([f"Conditions: {conditions}."] if conditions else [])])

    def mean_table(self, test: str) -> Table:
        """Metrics averaged over the budgets: the head, and a row per method."""
        metrics = self._columns(test)
        rows = [[name, *(_cell(self.mean(test, name, m), m) for m in metrics)] for name in self.methods(test)]
        return Table(["method", *(HEADS[m] for m in metrics)], rows)

    def difference_table(self, test: str) -> Table:
        """The same minus the baseline's: the head, and a row per method; none without the baseline."""
        metrics = self._columns(test)
        rows = []
        for name in self.methods(test):
            found = [self.difference(test, name, m) for m in metrics]
            cells = [_interval(s, m, "+") for s, m in zip(found, metrics, strict=True) if s is not None]
            rows += [[name, *cells]] if cells else []
        return Table(["method", *(HEADS[m] for m in metrics)], rows)

    def curve_table(self, test: str) -> Table:
        """Read off at shares of the full cost, and mean heights: the head, and a row per method."""
        metrics = [m for m in ("top1", "nlpd", "ece") if m in self._columns(test)]
        places = [f"{share:.0%}" for share in SHARES]
        head = ["method", *(f"{HEADS[m]} at {place}" for m in metrics for place in places)]
        head += [f"{HEADS[m]} area" for m in metrics]
        rows = []
        for name in self.methods(test):
            found = self.of(test, name)
            if found[0].is_curve:
                values = [[method.at[place][m] for method in found] for m in metrics for place in places]
                values += [[method.area[m] for method in found] for m in metrics]
                kinds = [m for m in metrics for _ in places] + metrics
                rows.append([name, *(_mean(v, m) for v, m in zip(values, kinds, strict=True))])
        return Table(head, rows)

    def anytime_table(self, test: str) -> Table:
        """Each exit taken by all rows: the head, and a row per method and exit."""
        metrics = [m for m in self._columns(test) if m != "cost"]
        rows = []
        for name in self.methods(test):
            found = self.of(test, name)
            if found[0].points[0].q is not None and not name.startswith("static"):
                for exit_ in range(len(found[0].alone)):
                    points = [method.alone[exit_] for method in found]
                    cost = np.mean([p.cost / m.full_cost for p, m in zip(points, found, strict=True)])
                    values = [_mean([p.metrics[m] for p in points], m) for m in metrics]
                    rows.append([f"{name}, exit {exit_ + 1}", f"{cost:.3f}", *values])
        return Table(["method", "cost", *(HEADS[m] for m in metrics)], rows)

    def cost_table(self, test: str) -> Table:
        """What was asked and what it came to, at a cheap, a middle and a dear budget and at worst."""
        shown = (0.5, 1.0, 1.5)
        head = ["method"]
        for q in shown:
            head += [f"q = {q:g}: asked", "threshold rows", "test rows"]
        rows = []
        for name in self.methods(test):
            found = self.of(test, name)
            if not found[0].is_curve or name.startswith("static"):
                continue
            cells = []
            for q in shown:
                points = [(_closest(method.points, q), method.full_cost) for method in found]
                for key in ("target", "threshold_cost", "cost"):
                    cells.append(f"{np.mean([getattr(p, key) / full for p, full in points]):.3f}")
            worst = max((p.overshoot for method in found for p in method.points), key=abs)
            rows.append([name, *cells, f"{worst:+.1%}"])
        return Table([*head, "largest overshoot"], rows)

    def fitted_table(self) -> Table:
        """Settings as fitted: the head, and a row per method, network and kind; none of methods without any."""
        exits = len(self.seeds[0][0].alone)
        rows = []
        for network, fits in enumerate(self.fitted, 1):
            name = f", network {network}" if len(self.fitted) > 1 else ""
            for method, fit in fits.items():
                if fit.priors is not None or set(fit.temperatures) != {1.0}:
                    rows.append([f"{method}{name}", "T", *(f"{t:.3g}" for t in fit.temperatures)])
                if fit.priors is not None:
                    rows.append([f"{method}{name}", "ω", *(f"{omega:.3g}" for omega in fit.priors)])
        return Table(["method", "", *(f"exit {exit}" for exit in range(1, exits + 1))], rows)

    def warnings(self) -> list[str]:
        """What the fits warned of: each once, with the methods it is about, and of several networks which."""
        found: dict[str, dict[str, list[str]]] = {}
        for network, fits in enumerate(self.fitted, 1):
            for method, fit in fits.items():
                for message in fit.messages:
                    found.setdefault(message, {}).setdefault(method, []).append(str(network))
        several = len(self.fitted) > 1
        return [
            ", ".join(
                f"{method} (network {', '.join(networks)})" if several else method
                for method, networks in methods.items()
            )
            + f": {message}"
            for message, methods in found.items()
        ]

    def notes(self) -> list[str]:
        """How to read the tables, and what the fits warned of."""
        count = len(self.seeds)
        if count > 1:
            spread = (
                f"± is the standard deviation over {count} training seeds; brackets hold 95 % t intervals over them, "
                "differences paired by seed"
            )
        else:
            spread = (
                "Brackets hold 95 % bootstrap intervals over test rows, differences on the same draws; one training "
                "seed says nothing about others"
            )
        notes = [
            f"{spread}. Costs are FLOPs per row, with the heads of all exits on the way and what the method adds, "
            f"{self._relative()} A static exit is the plain network cut there, the best on the threshold split that "
            "the budget affords; it may cost less than asked, so compare it along the curve. All exits were computed "
            "and chosen afterwards: these are no measured times."
        ]
        clamped = {m.name: sum(m.clamped) for methods in self.seeds for m in methods if sum(m.clamped)}
        if clamped:
            words = ", ".join(f"{name} {n}" for name, n in clamped.items())
            notes.append(f"Probabilities below 1e-12 that count as that in the NLPD, over all exits: {words}.")
        return [*notes, *(f"* {message}" for message in self.warnings())]

    @property
    def unit(self) -> str:
        """What a cost of 1 is."""
        known = self.seeds[0][0].heads_cost is not None
        return "plain full network" if known else "full network with the heads of all exits"

    def _relative(self) -> str:
        """What costs are relative to, in words."""
        first = self.seeds[0][0]
        if first.heads_cost is None:
            return (
                "over those of the full network with the heads of all exits, which nobody would run: an earlier "
                "version wrote this. Evaluate again for shares of the plain full network."
            )
        return (
            f"over those of the plain full network, the backbone and its last exit's head ({first.full_cost:.4g} FLOPs "
            f"per row). With the heads of all exits that network costs {first.heads_cost / first.full_cost:.3f} of it."
        )

    def _columns(self, test: str) -> list[str]:
        first = self.of(test, self.methods(test)[0])[0]
        return [*first.metrics, "cost"]


def _closest(points: Sequence[Point], q: float) -> Point:
    return min(points, key=lambda p: abs((p.q or 0) - q))


def _number(value: float, metric: str, sign: str = "") -> str:
    """Shares of right answers in percent, others as they are."""
    percent = metric in ("top1", "top5")
    return f"{value * 100:{sign}.2f}" if percent else f"{value:{sign}.4f}"


def _cell(summary: Summary, metric: str) -> str:
    if summary.sd is not None:
        return f"{_number(summary.mean, metric)} ± {_number(summary.sd, metric)}"
    return _interval(summary, metric)


def _interval(summary: Summary, metric: str, sign: str = "") -> str:
    text = _number(summary.mean, metric, sign)
    if summary.low is None or summary.high is None:
        return text
    return f"{text} ({_number(summary.low, metric, sign)} to {_number(summary.high, metric, sign)})"


def _mean(values: Sequence[float | None], metric: str) -> str:
    there = [value for value in values if value is not None]
    return _number(float(np.mean(there)), metric) if len(there) == len(values) else "–"

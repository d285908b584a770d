"""What a calibration found, as files, tables and words."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.calibration.certificate import Certificate
from offramp.calibration.decoded import TEST
from offramp.calibration.grid import Setting
from offramp.calibration.promise import MEASURES, is_timed
from offramp.calibration.validate import Validation
from offramp.core.policy import ExitPolicy
from offramp.evaluation.result import COLUMNS, ratio_cell
from offramp.metrics.intervals import Interval
from offramp.risk import CRC, Outcome
from offramp.runs.files import write_json
from offramp.runs.results import Shown
from offramp.runs.tables import Table, cell

SCHEMA = "offramp/calibrate/1"
CONFIG, RESULT, POLICY = "config.json", "result.json", "policy.json"


@dataclass(frozen=True)
class Calibration(Shown):
    """A policy, why it may be used, and what else was tried.

    Attributes:
        certificate: Of the policy; says so if nothing was certified.
        settings: The whole grid, chain by chain.
        outcome: Which of it was looked at, and which was selected.
        validation: Repeated calibrations, if asked for.
        seconds: Over the full model's on the held-out part, as JSON values (see `seconds_held_out`). They are not part
            of the certificate, which is the same whenever it is made.
    """

    certificate: Certificate
    settings: tuple[Setting, ...]
    outcome: Outcome
    validation: Validation | None = None
    seconds: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"Calibration({len(self.settings)} settings, {len(self.outcome.tests)} tested: {self.certificate!r})"

    def _rows(self) -> Iterable[Any]:
        """A row per setting of the grid; what was found of those that were looked at, and missing values of others."""
        own = ("name", "knob", "setting", "chain", "losses")  # said of all settings, or packed
        found = {
            test.setting: {name: value for name, value in seen.items() if name not in own}
            for test, seen in zip(self.outcome.tests, self.certificate.tests, strict=True)
        }
        return (
            {"setting": s.name, "knob": s.knob, "chain": s.chain, "chosen": number == self.outcome.selected}
            | found.get(number, {})
            for number, s in enumerate(self.settings)
        )

    @property
    def policy(self) -> ExitPolicy:
        """The policy to use: one that passed, or one that never leaves early."""
        return ExitPolicy.from_dict(self.certificate.policy)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "schema": SCHEMA,
            "certificate": self.certificate.to_dict(),
            "words": self.certificate.words(),
            "settings": [
                {"name": s.name, "knob": s.knob, "chain": s.chain, "policy": s.policy.to_dict()} for s in self.settings
            ],
            "seconds": self.seconds,
            "validation": None if self.validation is None else self.validation.to_dict(),
        }

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write policy.json and result.json, over those of an earlier calibration; `offramp.report` draws."""
        folder = Path(folder)
        self.certificate.save(folder / POLICY)
        write_json(folder / RESULT, self.to_dict())
        return [folder / POLICY, folder / RESULT]

    def table(self) -> str:
        """The settings that were looked at, what the policy costs, the statement, and the repeated calibrations."""
        certificate = self.certificate
        blocks = [str(tests_table(certificate.to_dict())), str(self._costs())] if certificate.tests else []
        blocks += [certificate.words()]
        return "\n\n".join(blocks if self.validation is None else [*blocks, self.validation.words()])

    def _costs(self) -> Table:
        """Costs of the policy on each part."""
        seconds = self.seconds or {}
        parts = {
            part: {**seen, **(seconds if part == TEST else {})} for part, seen in self.certificate.estimates.items()
        }
        known = {name for seen in parts.values() for name, value in seen.items() if value is not None}
        columns = {name: column for name, column in COLUMNS.items() if not name.startswith("own") or name in known}
        rows = [
            [part, *(ratio_cell(Interval(**found) if (found := seen.get(name)) else None) for name in columns)]
            for part, seen in parts.items()
        ]
        return Table(["cost of the policy (× full model)", *columns.values()], rows)


def tests_table(certificate: Mapping[str, Any]) -> Table:
    """A row per setting that was tested, in its order: losses, costs where they are known, and verdicts."""
    minimise = certificate.get("minimise")
    timed = {"cost": MEASURES[minimise]} if minimise and is_timed(minimise) else {}
    columns = {"flops": "FLOPs", "flops_per_token": "FLOPs/token", **timed}
    p = "mean for CRC" if certificate["promise"]["bound"] == CRC else "p-value"
    rows = []
    for index, test in enumerate(certificate["tests"]):
        verdict = "chosen" if index == certificate["selected"] else "passed" if test["passed"] else "failed"
        costs = [cell(test.get(name)) for name in columns]
        rows.append([test["name"], f"{test['loss']:.4f}", f"{test['p_value']:.3g}", *costs, verdict])
    return Table(["setting", "mean loss", p, *(f"{name} ×" for name in columns.values()), "verdict"], rows)

"""What a calibration found, as files, tables and words."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.calibration.certificate import Certificate
from offramp.calibration.grid import Setting
from offramp.calibration.promise import CRC
from offramp.calibration.search import Outcome
from offramp.calibration.validate import Validation
from offramp.core.policy import ExitPolicy
from offramp.files import write_json
from offramp.tables import markdown

SCHEMA = "offramp/calibrate/1"
CONFIG, RESULT, POLICY = "config.json", "result.json", "policy.json"


@dataclass(frozen=True)
class Calibration:
    """A policy, why it may be used, and what else was tried.

    Attributes:
        certificate: Of the policy; says so if nothing was certified.
        settings: The whole grid, chain by chain.
        outcome: Which of it was looked at, and which was selected.
        validation: Repeated calibrations, if asked for.
    """

    certificate: Certificate
    settings: tuple[Setting, ...]
    outcome: Outcome
    validation: Validation | None = None

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
            "validation": None if self.validation is None else self.validation.to_dict(),
        }

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write policy.json, result.json and, if matplotlib is installed, the picture as SVG and PNG.

        Args:
            folder: Where to; made if missing. Files of an earlier calibration are replaced.

        Returns:
            The files.
        """
        from offramp.report import calibration_plots

        folder = Path(folder)
        self.certificate.save(folder / POLICY)
        write_json(folder / RESULT, self.to_dict())
        return [folder / POLICY, folder / RESULT, *calibration_plots.save_calibration(self, folder)]

    def table(self) -> str:
        """The settings that were looked at, the statement, and the repeated calibrations."""
        certificate = self.certificate
        p = "mean for CRC" if certificate.promise.bound == CRC else "p-value"
        rows = []
        for index, test in enumerate(certificate.tests):
            verdict = "chosen" if index == certificate.selected else "passed" if test["passed"] else "failed"
            rows.append((test["name"], f"{test['loss']:.4f}", f"{test['p_value']:.3g}", verdict))
        head = ("setting", "mean loss", p, "verdict")
        blocks = [markdown(head, rows), certificate.words()] if rows else [certificate.words()]
        return "\n\n".join(blocks if self.validation is None else [*blocks, self.validation.words()])

"""What a policy file's certificate says, for commands that use the policy: its task, and whether it applies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.cli import options as o

if TYPE_CHECKING:
    from offramp.calibration import Certificate
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy
    from offramp.tasks import Task


def certified_task(file: Path | None) -> str | None:
    """The task that the promise of a policy file is about.

    Args:
        file: A policy saved as JSON; None: no file.

    Returns:
        Its name; None where nothing is promised.
    """
    certificate = _certificate(file)
    return None if certificate is None or not certificate.certified else str(certificate.conditions["task"]["name"])


def check_drift(file: Path | None, answers: Iterable[Sequence[int]]) -> None:
    """Warn on standard error where the tokens of answers, given by their exit layers, left elsewhere than certified."""
    certificate = _certificate(file)
    drift = None if certificate is None else certificate.drift()
    if drift is not None and any([drift.add(answer) for answer in answers]):
        o.note(f"certificate may not apply: {drift.words()}")


def check_certificate(
    file: Path | None, lm: LanguageModel, policy: ExitPolicy | None, *, task: Task | None = None,
    settings: dict[str, Any] | None = None, batch_size: int | None = None,
) -> None:  # fmt: skip
    """Warn on standard error where a certificate in a policy file does not apply to how the policy is used."""
    certificate = _certificate(file)
    if certificate is not None:
        reasons = certificate.mismatches(lm, policy=policy, task=task, settings=settings, batch_size=batch_size)
        for reason in reasons:
            o.note(f"certificate does not apply: {reason}")


def _certificate(file: Path | None) -> Certificate | None:
    """That of a policy file, if there is one."""
    from offramp.calibration import load

    return None if file is None else load(file)

"""What the certificate in a policy's file says to those who use the policy: its task, and whether it applies."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.calibration.certificate import Certificate, load

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy
    from offramp.tasks import Task

log = logging.getLogger(__name__)
File = str | os.PathLike[str]


def certified_task(file: File | None) -> str | None:
    """The task that the promise of a policy file is about.

    Args:
        file: A policy saved as JSON; None: no file.

    Returns:
        Its name; None where nothing is promised.
    """
    certificate = _certificate(file)
    return None if certificate is None or not certificate.certified else str(certificate.conditions["task"]["name"])


def check_drift(file: File | None, answers: Iterable[Sequence[int]]) -> None:
    """Log a warning where the tokens of answers, given by their exit layers, left elsewhere than certified."""
    certificate = _certificate(file)
    drift = None if certificate is None else certificate.drift()
    if drift is not None and any([drift.add(answer) for answer in answers]):
        log.warning("certificate may not apply: %s", drift.words())


def check_certificate(
    file: File | None, lm: LanguageModel, policy: ExitPolicy | None, *, task: Task | None = None,
    settings: dict[str, Any] | None = None, batch_size: int | None = None,
) -> None:  # fmt: skip
    """Log a warning where a certificate in a policy file does not apply to how the policy is used."""
    certificate = _certificate(file)
    if certificate is not None:
        reasons = certificate.mismatches(lm, policy=policy, task=task, settings=settings, batch_size=batch_size)
        for reason in reasons:
            log.warning("certificate does not apply: %s", reason)


def _certificate(file: File | None) -> Certificate | None:
    """That of a policy file, if there is one."""
    return None if file is None else load(Path(file))

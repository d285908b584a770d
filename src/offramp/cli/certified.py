"""What a policy file's certificate says of its task, for commands that ask something else or cannot tell."""

from __future__ import annotations

from pathlib import Path


def certified_task(file: Path | None) -> str | None:
    """The task that the promise of a policy file is about.

    Args:
        file: A policy saved as JSON; None: no file.

    Returns:
        Its name; None where nothing is promised.
    """
    from offramp.calibration import load

    certificate = None if file is None else load(file)
    return None if certificate is None or not certificate.certified else str(certificate.conditions["task"]["name"])

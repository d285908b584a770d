"""`offramp train … --task image-classification` is `offramp train-classifier … --task image-classification`, and so on.

So that commands for language models and for classifiers have options, and help, of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer.core import TyperGroup

COMMANDS = ("train", "calibrate", "evaluate")


class ByTask(TyperGroup):
    """A group of commands of which some have a second form for classifiers."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that is meant."""
        task = task_of(args) or ""
        if args[0] in COMMANDS and "classif" in task:  # a misspelt one too: that command says what is allowed
            args = [f"{args[0]}-classifier", *args[1:]]
        return super().resolve_command(ctx, args)


def task_of(args: Sequence[str]) -> str | None:
    """What `--task` says; None if it is not there."""
    for place, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name == "--task":
            return value if equals else next(iter(args[place + 1 :]), None)
    return None

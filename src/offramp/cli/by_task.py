"""Commands with a second form for other tasks, so that each has options, and help, of its own.

`offramp train … --task image-classification` is `offramp train-classifier … --task image-classification`, and
`offramp distill … --task language-modelling` is `offramp distill-language-model …`.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

OF_CLASSIFIERS = ("train", "calibrate", "evaluate")
LANGUAGE_MODELLING = "language-modelling"


class ByTask(TyperGroup):
    """The group of all commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """The command that is meant, and its arguments."""
        return super().resolve_command(ctx, _routed(args))


def _routed(arguments: list[str]) -> list[str]:
    name, rest = arguments[0], arguments[1:]
    task, without = _task(rest)
    if name in OF_CLASSIFIERS and "classif" in task:  # a misspelt one too: that command says what is allowed
        return [f"{name}-classifier", *rest]
    if name == "distill" and task == LANGUAGE_MODELLING:
        return ["distill-language-model", *without]
    return arguments


def _task(arguments: list[str]) -> tuple[str, list[str]]:
    """What `--task` says, "" if it is not there, and the arguments without it."""
    for place, argument in enumerate(arguments):
        if argument.startswith("--task="):
            return argument.removeprefix("--task="), [*arguments[:place], *arguments[place + 1 :]]
        if argument == "--task" and place + 1 < len(arguments):
            return arguments[place + 1], [*arguments[:place], *arguments[place + 2 :]]
    return "", arguments

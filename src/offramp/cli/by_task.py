"""Commands with a second form for other tasks, so that each has options, and help, of its own.

`offramp train … --task image-classification` is `offramp train-classifier … --task image-classification`,
`offramp distill … --task language-modelling` is `offramp distill-language-model …`, and `offramp evaluate … --harness
TASKS` is `offramp evaluate-harness … --harness TASKS`.
"""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from offramp.values import ArgumentError

EARLIER = {
    "--count": "--limit", "--thresholds": "--threshold", "--min-layers": "--min-layer",
    "--vocabulary-sizes": "--vocabulary-size", "--n-mc": "--draws", "--field": "--text-column",
    "--prompt-field": "--prompt-column", "--group-field": "--group-column", "--engine": "--backend",
}  # fmt: skip
"""Options by what they were called, which still works where the name is not taken; no help speaks of it."""

OPTIONS = {
    "texts": "--text", "thresholds": "--threshold", "teachers": "--teacher", "settings": "--config",
    "student": "STUDENT",
}  # fmt: skip
"""What arguments of verbs are called here, where it is not the same."""

OF_CLASSIFIERS = ("train", "calibrate", "evaluate")
LANGUAGE_MODELLING = "language-modelling"


class ByTask(TyperGroup):
    """The group of all commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """The command that is meant, under the name that was typed, and its arguments."""
        typed, routed = _routed(args)
        _, command, rest = super().resolve_command(ctx, routed)
        return typed, command, _renamed(command, rest)


class Command(TyperCommand):
    """A command that calls a verb: arguments which that refuses are options here."""

    def invoke(self, ctx: Any) -> Any:
        """Run it; an `ArgumentError` is wrong usage."""
        try:
            return super().invoke(ctx)
        except ArgumentError as error:
            words = re.sub(r"`(\w+)`", lambda name: OPTIONS.get(name[1], f"--{name[1].replace('_', '-')}"), str(error))
            raise typer.BadParameter(words, ctx=ctx) from error


def _renamed(command: Any, arguments: list[str]) -> list[str]:
    """Arguments with options of earlier names called as they are today."""
    known = {name for parameter in getattr(command, "params", ()) for name in parameter.opts}
    found = []
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if "--" in arguments[:place] or name in known or EARLIER.get(name) not in known:
            found.append(argument)
        else:
            found.append(EARLIER[name] + equals + value)
    return found


def _routed(arguments: list[str]) -> tuple[str, list[str]]:
    """What usage lines call the command, so that it can be typed again, and the arguments of the one that is meant."""
    name, rest = arguments[0], arguments[1:]
    task, without = _task(rest)
    if name in OF_CLASSIFIERS and "classif" in task:  # a misspelt one too: that command says what is allowed
        return f"{name} --task {task}", [f"{name}-classifier", *rest]
    if name == "distill" and task == LANGUAGE_MODELLING:
        return f"{name} --task {task}", ["distill-language-model", *without]
    if name == "evaluate" and any(argument.partition("=")[0] == "--harness" for argument in rest):
        return name, ["evaluate-harness", *rest]
    return name, arguments


def _task(arguments: list[str]) -> tuple[str, list[str]]:
    """What `--task` says, "" if it is not there, and the arguments without it."""
    for place, argument in enumerate(arguments):
        if argument.startswith("--task="):
            return argument.removeprefix("--task="), [*arguments[:place], *arguments[place + 1 :]]
        if argument == "--task" and place + 1 < len(arguments):
            return arguments[place + 1], [*arguments[:place], *arguments[place + 2 :]]
    return "", arguments

"""The command line `offramp`, one function per command: parsing and printing, nothing else.

Results go to standard output, everything about them (progress, notes, errors) to standard error. Exit status: 0 done,
1 failed, 2 wrong usage.

Some commands have a second form for other tasks, so that each has options, and help, of its own: `offramp train …
--task image-classification` is `offramp train-classifier … --task image-classification`, `offramp distill … --task
language-modelling` is `offramp distill-language-model …`, `offramp evaluate … --harness TASKS` is `offramp
evaluate-harness … --harness TASKS`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from offramp.cli.bench import bench, probe
from offramp.cli.calibrate import calibrate
from offramp.cli.classifiers import calibrate_classifier, classify, evaluate_classifier, train_classifier
from offramp.cli.distill import distill, distill_language_model
from offramp.cli.evaluate import evaluate, evaluate_harness
from offramp.cli.generate import generate
from offramp.cli.options import note
from offramp.cli.report import report
from offramp.cli.serve import serve
from offramp.cli.train import train
from offramp.values import ArgumentError

# ---------------------------------------------------------------- commands with a second form for other tasks

EARLIER = {
    "--count": "--limit", "--thresholds": "--threshold", "--min-layers": "--min-layer",
    "--vocabulary-sizes": "--vocabulary-size", "--n-mc": "--draws", "--field": "--text-column",
    "--prompt-field": "--prompt-column", "--group-field": "--group-column", "--engine": "--backend",
}  # fmt: skip
"""Options by what they were called, which still works where the name is not taken; no help speaks of it."""

OPTIONS = {
    "texts": "--text", "thresholds": "--threshold", "corruptions": "--corruption", "teachers": "--teacher",
    "teacher_methods": "--teacher-method", "settings": "--config", "student": "STUDENT",
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


# ---------------------------------------------------------------- the commands

app = typer.Typer(
    name="offramp",
    cls=ByTask,
    help="Early-exit models: what is easy leaves the network early.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# the three for classifiers are also what train, calibrate and evaluate do with --task ...-classification
for command in (
    probe, train, evaluate, evaluate_harness, calibrate, generate, bench, serve, distill, distill_language_model,
    report, train_classifier, calibrate_classifier, evaluate_classifier, classify,
):  # fmt: skip
    app.command(cls=Command)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from offramp import __version__

        typer.echo(f"offramp {__version__}")
        raise typer.Exit


class _Notes(logging.Handler):
    """Writes what verbs log on the way as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    log, notes = logging.getLogger("offramp"), _Notes()
    level = log.level
    log.addHandler(notes)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(notes)
        log.setLevel(level)


@contextlib.contextmanager
def _warned() -> Iterator[None]:
    """Warnings about what a user gave become notes, each once, without the place that wrote them."""
    told: set[str] = set()
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            text = " ".join(str(message).split())
            if category is not UserWarning:
                usual(message, category, *place, **more)
            elif text not in told:
                told.add(text)
                note(f"note: {text}")

        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


@app.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Early-exit models: what is easy leaves the network early."""
    ctx.with_resource(_logged())
    ctx.with_resource(_warned())


_PATHS: dict[type[OSError], str] = {
    FileNotFoundError: "does not exist; check the path",
    FileExistsError: "is there and is no folder; name another path, or move it away",
    NotADirectoryError: "leads through a file that is no folder; name another path",
    IsADirectoryError: "is a folder; name a file",
    PermissionError: "may not be opened by this user; change its permissions, or name another path",
}
"""What to say of a path that the system refuses."""


def _said(error: Exception) -> str:
    """An error in words; what the system says of a path has its number in front and no advice."""
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return str(error)
    for kind, words in _PATHS.items():
        if isinstance(error, kind):
            return f"{error.filename} {words}"
    return f"{error.filename}: {error.strerror}"


def main() -> None:
    """Run the command line; errors are one line without a traceback, unless `--debug` stands anywhere."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except Exception as error:  # noqa: BLE001 - whatever went wrong, one line and status 1
        if debug:
            traceback.print_exc()
        else:
            text = " ".join(_said(error).split()) or type(error).__name__
            sys.stderr.write(f"offramp: error: {text} (--debug shows where)\n")
        sys.exit(1)

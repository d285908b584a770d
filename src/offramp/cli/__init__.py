"""The command line `offramp`, one function per command: parsing and printing, nothing else.

Results go to standard output, everything about them (progress, notes, errors) to standard error. Exit status: 0 done,
1 failed, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from offramp.cli.bench import bench
from offramp.cli.by_task import ByTask, Command
from offramp.cli.calibrate import calibrate
from offramp.cli.classifiers.calibrate import calibrate_classifier
from offramp.cli.classifiers.classify import classify
from offramp.cli.classifiers.evaluate import evaluate_classifier
from offramp.cli.classifiers.train import train_classifier
from offramp.cli.distill import distill
from offramp.cli.distill_language_model import distill_language_model
from offramp.cli.evaluate import evaluate
from offramp.cli.evaluate_harness import evaluate_harness
from offramp.cli.generate import generate
from offramp.cli.options import note
from offramp.cli.probe import probe
from offramp.cli.report import report
from offramp.cli.serve import serve
from offramp.cli.train import train

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


_PATHS: dict[type[OSError], str] = {
    FileNotFoundError: "does not exist; check the path",
    FileExistsError: "is there and is no folder; name another path, or move it away",
    NotADirectoryError: "leads through a file that is no folder; name another path",
    IsADirectoryError: "is a folder; name a file",
    PermissionError: "may not be opened by this user; change its permissions, or name another path",
}
"""What to say of a path that the system refuses."""


def _noted(usual: Callable[..., None]) -> Callable[..., None]:
    """Writes warnings for users as notes, and others as usual."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if category is UserWarning:
            note(f"note: {' '.join(str(message).split())}")
        else:
            usual(message, category, *place, **more)

    return show


def _said(error: Exception) -> str:
    """An error in words; what the system says of a path has its number in front and no advice."""
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return str(error)
    for kind, words in _PATHS.items():
        if isinstance(error, kind):
            return f"{error.filename} {words}"
    return f"{error.filename}: {error.strerror}"


def main() -> None:
    """Run the command line; errors are one line without a traceback, unless `--debug` stands anywhere.

    So are warnings about what a user gave: notes, without the place in this library that wrote them.
    """
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _noted(warnings.showwarning)
            app(arguments)
    except Exception as error:  # noqa: BLE001 - whatever went wrong, one line and status 1
        if debug:
            traceback.print_exc()
        else:
            text = " ".join(_said(error).split()) or type(error).__name__
            sys.stderr.write(f"offramp: error: {text} (--debug shows where)\n")
        sys.exit(1)

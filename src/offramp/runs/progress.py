"""How far a long run is, on standard error: a bar in a terminal or a notebook, a line now and then in a file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

FIRST, EVERY = 10.0, 30.0
"""Seconds until the first line, and between lines. What is done sooner leaves none."""


def shown(given: Callable[..., None] | None, label: str, **phases: str) -> Callable[..., None] | None:
    """What a verb reports to: what it was given, else a bar where somebody sees it, else None."""
    if given is not None or not _is_watched():
        return given
    open_bar = contextlib.ExitStack()
    update: Callable[..., None] | None = None

    def report(done: int, total: int, what: str = "") -> None:
        nonlocal update
        if update is None:
            update = open_bar.enter_context(_bar(label, phases))
        update(done, total, what)
        if done >= total:
            open_bar.close()
            update = None

    return report


def _is_watched() -> bool:
    """Whether standard error is a terminal or the output of a notebook's cell."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or getattr(shell, "kernel", None) is not None


def progress(label: str, **phases: str) -> contextlib.AbstractContextManager[Any]:
    """A context with a callback, (done, total[, what is next]); `phases` say what is done while something is next."""
    lines = contextlib.nullcontext(_Lines(label, phases))
    return _bar(label, phases) if sys.stderr.isatty() else lines


@contextlib.contextmanager
def _bar(label: str, phases: Mapping[str, str]) -> Iterator[Any]:
    from tqdm.auto import tqdm

    with tqdm(desc=label, file=sys.stderr, dynamic_ncols=True, leave=False) as bar:
        shown = None

        def update(done: int, total: int, what: str = "") -> None:
            nonlocal shown
            if shown != (shown := phases.get(what, label)):
                bar.reset(total)
                bar.set_description(shown, refresh=False)
                bar.initial = done  # a run that is continued: what was done before takes no time now
            bar.total, bar.n = total, done
            bar.set_postfix_str(what, refresh=False)
            bar.refresh()

        yield update


class _Lines:
    """Lines such as "calibrating: 240 of 960 after 45 s (answering)", each flushed, so that `tail -f` shows them."""

    def __init__(self, label: str, phases: Mapping[str, str]) -> None:
        self.label, self.phases, self.began = label, phases, time.monotonic()
        self.due = self.began + FIRST

    def __call__(self, done: int, total: int, what: str = "") -> None:
        now = time.monotonic()
        if now < self.due:
            return
        self.due = now + EVERY
        doing = f" ({what})" if what else ""
        sys.stderr.write(
            f"{self.phases.get(what, self.label)}: {done} of {total} after {now - self.began:.0f} s{doing}\n"
        )
        sys.stderr.flush()

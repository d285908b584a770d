"""How far a long command is, on standard error: a bar in a terminal, a line now and then in a file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

FIRST, EVERY = 10.0, 30.0
"""Seconds until the first line, and between lines. What is done sooner leaves none."""


def progress(label: str, **phases: str) -> contextlib.AbstractContextManager[Any]:
    """Progress on standard error.

    Args:
        label: What is being done, such as "calibrating".
        phases: What is being done instead while something is next, such as answers="answering".

    Returns:
        A context whose value is a callback, (done, total[, what is next]).
    """
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

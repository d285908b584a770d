"""How far a long command is, on standard error: a bar in a terminal, a line now and then in a file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

FIRST, EVERY = 10.0, 30.0
"""Seconds until the first line, and between lines. What is done sooner leaves none."""


def progress(label: str) -> contextlib.AbstractContextManager[Any]:
    """Progress on standard error.

    Args:
        label: What is being done, such as "calibrating".

    Returns:
        A context whose value is a callback, (done, total[, what is next]).
    """
    return _bar(label) if sys.stderr.isatty() else contextlib.nullcontext(_Lines(label))


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Any]:
    from tqdm.auto import tqdm

    with tqdm(desc=label, file=sys.stderr, dynamic_ncols=True, leave=False) as bar:

        def update(done: int, total: int, what: str = "") -> None:
            if bar.total is None:
                bar.initial = done  # a run that is continued: what was done before takes no time now
            bar.total, bar.n = total, done
            bar.set_postfix_str(what, refresh=False)
            bar.refresh()

        yield update


class _Lines:
    """Lines such as "calibrating: 240 of 960 after 45 s (answering)", each flushed, so that `tail -f` shows them."""

    def __init__(self, label: str) -> None:
        self.label, self.began = label, time.monotonic()
        self.due = self.began + FIRST

    def __call__(self, done: int, total: int, what: str = "") -> None:
        now = time.monotonic()
        if now < self.due:
            return
        self.due = now + EVERY
        doing = f" ({what})" if what else ""
        sys.stderr.write(f"{self.label}: {done} of {total} after {now - self.began:.0f} s{doing}\n")
        sys.stderr.flush()

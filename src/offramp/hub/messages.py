"""What users are told, in one line, and what is kept off their screens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class ModelError(Exception):
    """A model cannot be loaded, for a reason the user can act on; the message is one line."""


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Keep transformers' notes, and unless `bars` its progress bars, off the screen inside the block."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    verbosity, hide = logging.get_verbosity(), logging.is_progress_bar_enabled() and not bars
    hub_hidden = are_progress_bars_disabled()
    logging.set_verbosity_error()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if hide:
            logging.enable_progress_bar()  # this shows the hub's bars as well
            if hub_hidden:
                disable_progress_bars()


def first_line(error: BaseException) -> str:
    """What an exception says, on one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def say(text: str) -> None:
    """One line on standard error, about what takes long and is done once."""
    sys.stderr.write(f"offramp: {text}\n")
    sys.stderr.flush()

"""Progress of long commands: a bar in a terminal, a line now and then in a file."""

import io
import sys
from functools import partial

import pytest
import tqdm.auto

from offramp.runs import progress as module
from offramp.runs.progress import progress


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_file_gets_a_line_now_and_then(clock, capsys):
    with progress("calibrating") as update:
        for second in range(76):
            clock.now = 100.0 + second
            update(second, 80, "answering" if second < 40 else "")
    assert capsys.readouterr().err.splitlines() == [
        "calibrating: 10 of 80 after 10 s (answering)",
        "calibrating: 40 of 80 after 40 s",
        "calibrating: 70 of 80 after 70 s",
    ]


def test_another_phase_has_its_own_name(clock, capsys):
    with progress("training", answers="answering") as update:
        for second, what in ((30, "answers"), (61, "loss 1.2")):
            clock.now = 100.0 + second
            update(second, 80, what)
    assert capsys.readouterr().err.splitlines() == [
        "answering: 30 of 80 after 30 s (answers)",
        "training: 61 of 80 after 61 s (loss 1.2)",
    ]


def test_what_is_done_soon_leaves_no_line(clock, capsys):
    with progress("probing") as update:
        clock.now += 9
        update(20, 20)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("probing") as update:
        update(3, 20, "row 4")
    assert "probing:  15%" in terminal.getvalue()
    assert "3/20" in terminal.getvalue()
    assert "row 4" in terminal.getvalue()


@pytest.mark.parametrize("watched", [True, False])
def test_without_progress_there_is_a_bar_where_it_is_seen(monkeypatch, watched):
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(module, "_is_watched", lambda: watched)
    update = module.shown(None, "working", answers="answering")
    assert (update is not None) == watched
    if update is not None:
        for what in ("answers", "steps"):
            for done in range(4):
                update(done, 3, what)
    assert ("answering" in written.getvalue(), "working" in written.getvalue()) == (watched, watched)
    assert module.shown(print, "working") is print


def test_a_bar_can_be_turned_off(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(module, "_is_watched", lambda: True)
    monkeypatch.setattr(tqdm.auto, "tqdm", partial(tqdm.auto.tqdm, disable=True))  # as TQDM_DISABLE=1 does
    update = module.shown(None, "working")
    for done in range(4):
        update(done, 3, "answers")
    assert written.getvalue() == ""

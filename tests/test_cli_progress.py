"""Progress of long commands: a bar in a terminal, a line now and then in a file."""

import io
import sys

import pytest

from offramp.cli import progress as module
from offramp.cli.progress import progress


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

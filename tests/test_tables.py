"""Tables in narrow terminals: no line too long, nothing lost."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp import cli
from offramp.runs.tables import fitted, markdown

HEAD = ["cost (× full model)", "exit layer", "FLOPs", "FLOPs/token", "bytes", "seconds", "seconds/token", "front"]
ROWS = [
    [name, "24.9", *["0.593 (0.571–0.612)"] * 5, "*"]
    for name in ("full model", "static 26, prompt to 14", "jsd > 0.9, from 15, fixed, verify")
]


def cells(text):
    """All words of all tables, the first columns once, in any order."""
    return sorted(set(re.sub(r"[|]", " ", text).split()) - {"", *re.findall(r"-+:?", text)})


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_wide_table_fits_and_loses_nothing(width):
    table = markdown(HEAD, ROWS)
    assert len(table.split("\n")[0]) > width
    narrow = fitted(f"before\n\n{table}\n\nafter, a long line {'x' * 200}", width)
    lines = [line for line in narrow.split("\n") if line.startswith("|")]
    assert max(map(len, lines)) <= width
    for part in narrow.split("\n\n")[1:-1]:
        assert len({len(line) for line in part.split("\n")}) == 1
    assert cells("\n".join(lines)) == cells(table)
    assert narrow.startswith("before\n\n| cost")
    assert narrow.endswith("x" * 200)


def test_what_fits_or_goes_into_a_file_stays_what_it_is():
    table = markdown(HEAD, ROWS)
    assert fitted(table, None) == table
    assert fitted(table, 400) == table
    text = "| no table\n| at all | nor | this"
    assert fitted(text, 10) == text


def test_heads_are_folded_before_columns_go_below_each_other():
    table = markdown(["arm", "one long head", "another long head"], [["a", "1", "2"]])
    assert fitted(table, 30).split("\n") == [
        "| arm |  one | another |",
        "|     | long |    long |",
        "|     | head |    head |",
        "| --- | ---: | ------: |",
        "| a   |    1 |       2 |",
    ]


CELL = st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=5).map(" ".join)


@given(st.lists(st.lists(CELL, min_size=4, max_size=4), min_size=2, max_size=5), st.integers(20, 90))
def test_no_word_is_lost_at_any_width(rows, width):
    table = markdown(rows[0], rows[1:])
    lines = fitted(table, width).split("\n")
    assert cells("\n".join(lines)) == cells(table)
    longest = max(len(word) for row in rows for cell in row for word in [*cell.split(), ""])
    assert max(map(len, lines)) <= max(width, 2 * longest + 7)


@pytest.mark.parametrize(("columns", "width"), [("100", 100), ("80", 80), (None, None)])
def test_the_width_is_the_terminals_or_what_COLUMNS_says(monkeypatch, capsys, columns, width):  # noqa: N802
    """A file, as here, gets whole tables unless COLUMNS is set."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    cli.options.say(markdown(HEAD, ROWS))
    longest = max(map(len, capsys.readouterr().out.split("\n")))
    assert longest <= width if width else longest > 150


def test_a_terminal_has_a_width_of_its_own(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(cli.options.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(cli.options.shutil, "get_terminal_size", lambda: os.terminal_size((90, 24)))
    cli.options.say(markdown(HEAD, ROWS))
    assert max(map(len, capsys.readouterr().out.split("\n"))) <= 90

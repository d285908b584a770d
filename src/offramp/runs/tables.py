"""Tables: Markdown that also reads well in a terminal, however narrow it is; pages of reports take them as they are."""

from __future__ import annotations

import html
import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Table:
    """Rows of cells, and what is to be said of them.

    Attributes:
        head: Of the columns.
        rows: Cells, the first of each its name.
        title: What it shows.
        notes: Sentences for under it.
        marks: In pages, classes of rows: "full", "static", "front" or "".
    """

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: tuple[str, ...] = ()
    marks: Sequence[str] = ()

    def __str__(self) -> str:
        """As Markdown, without the title; nothing but the notes if it has no rows."""
        return "\n\n".join([*([markdown(self.head, self.rows)] if self.rows else []), *self.notes])

    __repr__ = __str__  # in a notebook it is the HTML's alternative

    def __html__(self) -> str:
        """As HTML without the title, everything escaped: what pages and notebooks show."""
        marks = self.marks or [""] * len(self.rows)
        lines = [_html_row(row, mark) for row, mark in zip(self.rows, marks, strict=True)]
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in self.head)
        lines = ["<tbody>", *lines, "</tbody>"]
        lines = [f"<thead><tr>{head}</tr></thead>", *lines] if "".join(self.head) else lines
        kind = "" if "".join(self.head) else ' class="facts"'
        table = [f'<div class="scroll"><table{kind}>', *lines, "</table></div>"] if self.rows else []
        said = [f"<p>{html.escape(note)}</p>" for note in self.notes]
        return "\n".join([*table, *(['<div class="text">', *said, "</div>"] if said else [])])

    _repr_html_ = __html__


def cell(value: float | None, form: str = ".3f") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None or value != value else format(value, form)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join([_line(head, widths), _rule(widths), *(_line(row, widths) for row in rows)])


def as_html(text: str) -> str:
    """A text with tables of `markdown` as HTML without styles of its own; what is aligned stays so."""
    found = []
    for is_table, lines in itertools.groupby(text.split("\n"), key=lambda line: line.startswith("| ")):
        block = list(lines)
        if is_table and (read := _read(block)):
            found.append(Table(*read).__html__())
            continue
        for part in "\n".join(block).strip("\n").split("\n\n"):
            shown = html.escape(part.removeprefix("## "))
            tag = "h4" if part.startswith("## ") else "pre" if "\n" in part or "   " in part else "p"
            found += [f"<{tag}>{shown}</{tag}>"] if part.strip() else []
    return "\n".join(found)


def fitted(text: str, width: int | None) -> str:
    """A text whose tables fit a terminal (None: it is none): cells fold at blanks, then columns go below each other."""
    if width is None:
        return text
    blocks = itertools.groupby(text.split("\n"), key=lambda line: line.startswith("| "))
    return "\n".join(line for table, lines in blocks for line in (_fitted(list(lines), width) if table else lines))


def _fitted(lines: list[str], width: int) -> list[str]:
    """The lines of a table that is perhaps too wide."""
    read = _read(lines)
    if read is None or max(map(len, lines)) <= width:
        return lines
    columns = list(zip(read[0], *read[1], strict=True))
    widths = [max(map(len, [*_words(column[0]), *column[1:]])) for column in columns]
    if _breadth(widths) > width:  # folded heads are not enough: fold names, too
        names = columns[0]
        widths[0] = min(widths[0], max([width // 3, *(len(word) for name in names for word in _words(name))]))
    room = width - _breadth(widths[:1])
    for place, column in enumerate(columns[1:], 1):
        if widths[place] + 3 > room:
            widths[place] = max([room - 3, *(len(word) for cell in column for word in _words(cell))])
    parts: list[list[int]] = [[0]]
    for place in range(1, len(columns)):
        if len(parts[-1]) > 1 and _breadth([widths[at] for at in (*parts[-1], place)]) > width:
            parts.append([0])
        parts[-1].append(place)
    tables = [_folded([columns[at] for at in part], [widths[at] for at in part]) for part in parts]
    return "\n\n".join("\n".join(table) for table in tables).split("\n")


def _read(lines: Sequence[str]) -> tuple[list[str], list[list[str]]] | None:
    """The head and the rows of a table of `markdown`; None of other lines, or where a cell has a bar in it."""
    head, *rest = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in lines]
    if not rest or any(len(row) != len(head) for row in rest) or any(cell.strip("-:") for cell in rest[0]):
        return None
    return head, rest[1:]


def _folded(columns: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """The lines of a table whose cells have as many lines as they need."""
    made: list[str] = []
    for row in zip(*columns, strict=True):
        cells = [
            textwrap.wrap(cell, max(size, 1), break_long_words=False, break_on_hyphens=False)
            for cell, size in zip(row, widths, strict=True)
        ]
        folded = itertools.zip_longest(*(cell or [""] for cell in cells), fillvalue="")
        made += [_line(line, widths) for line in folded] + ([] if made else [_rule(widths)])
    return made


def _html_row(row: Sequence[str], mark: str) -> str:
    name, *cells = [html.escape(cell) for cell in row]
    return f'<tr class="{mark}"><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _words(cell: str) -> list[str]:
    return cell.split() or [""]


def _breadth(widths: Sequence[int]) -> int:
    """Columns that a table takes."""
    return sum(size + 3 for size in widths) + 1


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return f"| {' | '.join(cells)} |"


def _rule(widths: Sequence[int]) -> str:
    return f"| {' | '.join(['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])])} |"

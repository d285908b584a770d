"""What the pages of a report are made of. The template `report.html.j2` knows how each kind of block looks."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from offramp.report.drawing import styled
from offramp.runs.tables import Table


@dataclass(frozen=True)
class Text:
    """Paragraphs; `mark` is "", "good" or "bad"."""

    kind: ClassVar[str] = "text"
    paragraphs: tuple[str, ...]
    mark: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, and what it shows in words."""

    kind: ClassVar[str] = "picture"
    source: str
    says: str


@dataclass(frozen=True)
class Code:
    """Text to be copied; with a `title` it is folded away under it."""

    kind: ClassVar[str] = "code"
    text: str
    title: str = ""


@dataclass(frozen=True)
class Bar:
    """One stacked bar: its name, its total in words, and its parts as (index of the legend, percent, in words)."""

    name: str
    total: str
    parts: Sequence[tuple[int, float, str]]
    mark: str = ""


@dataclass(frozen=True)
class Bars:
    """Stacked bars and their legend, (name, colour) each."""

    kind: ClassVar[str] = "bars"
    legend: Sequence[tuple[str, str]]
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Answer:
    """One answer: who gave it, what is to be said of it, and its tokens as (text, layer, in words)."""

    arm: str
    says: str
    tokens: Sequence[tuple[str, int, str]]


@dataclass(frozen=True)
class Answers:
    """Answers to some examples, coloured by exit layer; `legend` has the layers that occur, with names."""

    kind: ClassVar[str] = "answers"
    legend: Sequence[tuple[int, str]]
    examples: Sequence[tuple[str, Sequence[Answer]]]


Block = Text | Table | Picture | Code | Bars | Answers


@dataclass(frozen=True)
class Section:
    """A title and what stands under it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """All about one run.

    Attributes:
        title: Of what it is.
        place: The folder or file it was read from.
        sections: In the order of reading.
        colours: Of the exit layers, for `Answers`.
    """

    title: str
    place: str
    sections: Sequence[Section]
    colours: Mapping[int, str] = field(default_factory=dict)


# ---------------------------------------------------------------- making them


def draw(figure: Callable[[], Any], says: str) -> Picture:
    """A figure of `offramp.report` as a picture, the same bytes for the same figure; `says` is what it shows."""
    buffer = io.BytesIO()
    with styled():
        figure().savefig(buffer, format="svg", metadata={"Date": None})
    return svg(buffer.getvalue(), says)


def svg(content: bytes, says: str) -> Picture:
    """A picture of the bytes of an SVG file. As the source of an image it runs no scripts and loads nothing."""
    return Picture("data:image/svg+xml;base64," + base64.b64encode(content).decode(), says)


def facts(values: Mapping[str, Any]) -> Table:
    """Names and values, those that are None left out."""
    rows = [[name.replace("_", " "), _said(value)] for name, value in values.items() if value is not None]
    return Table(("", ""), rows)


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def repeat(command: str | None, about: Mapping[str, Any], config: Any = None) -> Section:
    """How to repeat a run: its command line, conditions and versions, and all settings as JSON, folded away."""
    how: Block = Code(command) if command else Text(("The command line was not recorded.",))
    blocks: list[Block] = [how, facts(about)]
    if config is not None:
        blocks.append(Code(json.dumps(config, indent=2, ensure_ascii=False), "All settings, as JSON"))
    return Section("How to repeat it", blocks)

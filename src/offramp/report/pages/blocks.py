"""What the pages of a report are made of. The template `report.html.j2` knows how each kind of block looks."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from offramp.report.drawing import require_matplotlib, styled
from offramp.report.inline import inline
from offramp.runs.tables import Table


@dataclass(frozen=True)
class Text:
    """Paragraphs; `mark` is "", "good" or "bad"."""

    kind: ClassVar[str] = "text"
    paragraphs: tuple[str, ...]
    mark: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a page opens with: a sentence, and what it rests on, as tiles (name, figure, in words)."""

    kind: ClassVar[str] = "verdict"
    sentence: str
    tiles: Sequence[tuple[str, str, str]] = ()
    mark: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture as the markup of an SVG (see `offramp.report.inline`), and what it shows in words."""

    kind: ClassVar[str] = "picture"
    markup: str
    says: str


@dataclass(frozen=True)
class Panels:
    """Pictures that stand side by side where there is room, and else one below the other."""

    kind: ClassVar[str] = "panels"
    pictures: Sequence[Picture]


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
    """Stacked bars and their legend, (name, style) each: a background, or a place on the scale of depth."""

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
class Asked:
    """An example: its title, what was asked as (name, text) each, and the answers."""

    title: str
    prompt: Sequence[tuple[str, str]]
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Answers:
    """Examples and their answers, coloured by exit layer; `places` of layers are 0 (first exit) to 1 (full)."""

    kind: ClassVar[str] = "answers"
    legend: Mapping[int, str]
    places: Mapping[int, float]
    examples: Sequence[Asked]


Block = Verdict | Text | Table | Picture | Panels | Code | Bars | Answers


@dataclass(frozen=True)
class Section:
    """A title and what stands under it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """All about one run, its folder or file, in sections."""

    title: str
    place: str
    sections: Sequence[Section]


# ---------------------------------------------------------------- making them


def draw(figure: Callable[[], Any], says: str) -> Picture:
    """A figure of `offramp.report` as a picture, the same markup for the same figure; `says` is what it shows."""
    buffer = io.BytesIO()
    with styled():
        require_matplotlib().rcParams["svg.fonttype"] = "none"  # letters stay letters, in the page's own type
        figure().savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return svg(buffer.getvalue(), says)


def svg(content: bytes, says: str) -> Picture:
    """A picture of the bytes of an SVG file."""
    return Picture(inline(content), says)


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


def repeat(about: Mapping[str, Any], config: Any = None, *, python: str = "") -> Section:
    """How to repeat a run: its "command", or what to call, conditions and versions, and all settings as JSON."""
    command = about.get("command")
    blocks: list[Block] = [Code(command)] if command else []
    if not command:
        what = "these lines do the same" if python else "the conditions and settings below are all that it went by"
        blocks += [Text((f"It was started from Python; {what}.",)), *([Code(python)] if python else [])]
    blocks.append(facts({name: value for name, value in about.items() if name != "command"}))
    if config is not None:
        blocks.append(Code(json.dumps(config, indent=2, ensure_ascii=False), "All settings, as JSON"))
    return Section("How to repeat it", blocks)

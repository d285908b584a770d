"""What the pages of a report are made of. The template `report.html.j2` knows how each kind of block looks."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from xml.etree import ElementTree

from offramp.report.drawing import COLOURS, GREY, GRID, require_matplotlib, styled
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
    """A picture as the markup of an SVG (see `offramp.report.blocks`), and what it shows in words."""

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


# ---------------------------------------------------------------- an SVG file as a part of a page

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_DRAWN = {"svg", "g", "defs", "clipPath", "path", "rect", "circle", "line", "polyline", "use", "image", "text", "tspan"}
_SAID = {
    "d", "id", "style", "transform", "x", "y", "x1", "x2", "y1", "y2", "r", "cx", "cy", "points", "width", "height",
    "viewBox", "clip-path", "preserveAspectRatio",
}  # fmt: skip
_STYLED = re.compile(r"(fill|stroke|opacity|font-(size|weight|style)|text|clip|image)(-[a-z-]+)?$")
"""Of letters, not their family: they are the page's."""
_NAMES = ("blue", "orange", "green", "pink", "sky", "amber", "ink", "plum")
_OURS = {colour.lower(): f"var(--{name})" for colour, name in zip(COLOURS, _NAMES, strict=True)} | {
    GREY: "var(--faint)", GRID: "var(--line)", "#ffffff": "var(--paper)", "#000000": "var(--ink)",
    "#333333": "var(--ink)", "#aaaaaa": "var(--faint)",
}  # fmt: skip
"""Colours of pictures, and the variables of `colours.css` that stand for them in light and in dark."""


def inline(content: bytes) -> str:
    """The element `<svg>` of a file, for HTML: only what draws, nothing that loads, ids of its own."""
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise ValueError(f"a picture is no SVG ({error}); make the run again") from error
    if root.tag != f"{_SVG}svg":
        raise ValueError(f"a picture is {root.tag!r:.80}, not an SVG; make the run again")
    own = f"p{hashlib.sha256(content).hexdigest()[:8]}-"
    _clean(root, own, set(re.findall(r"#([\w.-]+)", content.decode("utf-8", "replace"))))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _clean(element: ElementTree.Element, own: str, used: set[str]) -> None:
    for child in list(element):
        if not isinstance(child.tag, str) or child.tag.removeprefix(_SVG) not in _DRAWN:
            element.remove(child)
        else:
            _clean(child, own, used)
    element.tag = element.tag.removeprefix(_SVG)
    link = element.get(_LINK, element.get("href", ""))
    said = {name: value for name, value in element.attrib.items() if name in _SAID}
    if said.get("id") in used:
        said["id"] = own + said["id"]
    else:
        said.pop("id", None)
    if link.startswith("#"):
        said["href"] = f"#{own}{link[1:]}"
    elif element.tag == "image" and link.startswith("data:image/png;base64,"):
        said["href"] = link
    element.attrib.clear()
    element.attrib.update({name: value for name, text in said.items() if (value := _attribute(name, text, own))})


def _attribute(name: str, text: str, own: str) -> str:
    """A value whose references lead to the same picture; empty if one leads elsewhere."""
    if name == "style":
        parts = [part.strip() for part in text.split(";")]
        text = "; ".join(_style(part) for part in parts if _STYLED.match(part.partition(":")[0].strip()))
    text = re.sub(r"url\(#", f"url(#{own}", text)
    return "" if re.search(rf"url\((?!#{own})|\\|/\*", text) else text


def _style(part: str) -> str:
    name, _, value = part.partition(":")
    value = re.sub(r"#[0-9a-fA-F]{6}\b", lambda found: _OURS.get(found[0].lower(), found[0]), value)
    return f"{name}:{value}"

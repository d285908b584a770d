"""An SVG file as a part of a page: in the page's own colours and letters, and nothing in it but what is drawn."""

from __future__ import annotations

import hashlib
import re
from xml.etree import ElementTree

from offramp.report.drawing import COLOURS, GREY, GRID

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
    element.attrib.update({name: value for name, text in said.items() if (value := _said(name, text, own))})


def _said(name: str, text: str, own: str) -> str:
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

"""One HTML file about several runs, which needs nothing beside it: pictures and styles are inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from offramp import __version__
from offramp.core.generation import DEPTH
from offramp.runs.files import write_text

if TYPE_CHECKING:
    from offramp.report.pages.blocks import Page

TEMPLATE = "report.html.j2"


def colours() -> str:
    """The colours and the scale of depth of all pages, as CSS."""
    return DEPTH + Path(__file__).with_name("colours.css").read_text(encoding="utf-8")


def report(runs: Sequence[Path], out: Path, *, examples: int = 3, seed: int = 0) -> Path:
    """Write one file about runs, over an older one, with so many examples of each evaluation, drawn by the seed."""
    if not runs:
        raise ValueError("there are no runs to report; give at least one run folder")
    if examples < 0:
        raise ValueError(f"examples is {examples}; it must be at least 0")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a file, such as {out / 'report.html'}")
    from offramp.report.drawing import require_matplotlib
    from offramp.report.pages import pages_of

    require_matplotlib()  # before anything is read
    text = render([page for run in runs for page in pages_of(run, examples=examples, seed=seed)])
    write_text(out, text)
    return out


def render(pages: Sequence[Page]) -> str:
    """Pages as one HTML document; whatever stands in them is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE).render(pages=pages, colours=colours(), version=__version__)

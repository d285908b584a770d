"""What all pictures and pages share: colours, style, titles that say what is shown, footnotes that say what of, files.

Figures are made without pyplot, so no window system is needed and nothing global is left changed. The same data
give the same bytes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from offramp.core.generation import DEPTH
from offramp.runs.files import replace_file

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # told apart by the colour-blind (Okabe and Ito)
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#882255")
"""Of many lines, in turn."""
GRID = "#e4e4e4"
STYLE = {
    "svg.hashsalt": "offramp",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "legend.frameon": False,
}


def colours() -> str:
    """The colours and the scale of depth of all pages, as CSS."""
    return DEPTH + Path(__file__).with_name("colours.css").read_text(encoding="utf-8")


def available() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> Any:
    """The module matplotlib, `figure` and `ticker` loaded; a ModuleNotFoundError says how to install it."""
    try:
        import matplotlib
        import matplotlib.figure  # noqa: F401 - submodules of what is returned
        import matplotlib.ticker  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib; install it with: pip install 'offramp[report]'") from error
    return matplotlib


def headed(title: str, width: float, height: float) -> Any:
    """An empty figure, in inches, its title at the left; newlines at the title's end leave room for a wide legend."""
    figure = require_matplotlib().figure.Figure(figsize=(width, height), layout="constrained")
    fits = int(9.5 * width)  # letters of this size
    lines = [line for each in title.split("\n") for line in textwrap.wrap(each, fits) or [""]]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def footnote(figure: Any, text: str) -> None:
    """Say below a figure what it is of."""
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8, color=GREY)


def legend(axes: Any, *entries: Any, wide: bool = False, **options: Any) -> None:
    """A legend above the axes, of these or their own entries; `wide`: wider than its panel, below a longer title."""
    made = axes.legend(*entries, **{"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "fontsize": 9, **options})
    made.set_in_layout(not wide)


def layer_ticks(depth: int, first: int) -> list[int]:
    """Layers to name along an axis: the first and the last, of deep models every second or fourth between them."""
    step = 1 if depth <= 16 else 2 if depth <= 32 else 4
    return sorted({first, *range(depth, step // 2, -step)})


def percent() -> Any:
    """Labels of an axis from 0 to 1 in per cent, with the decimals that tell the ticks of a short axis apart."""
    return require_matplotlib().ticker.FuncFormatter(lambda share, _: f"{round(100 * share, 4) + 0:g}%")


def save_figures(drawings: Mapping[str, Callable[[], Any]], folder: Path) -> list[Path]:
    """Write figures as SVG and PNG into a folder; none without matplotlib, since they are there as numbers."""
    paths: list[Path] = []
    if not available():
        return paths
    with styled():
        for name, draw in drawings.items():
            figure = draw()
            for suffix, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
                path = folder / f"{name}.{suffix}"
                replace_file(path, partial(figure.savefig, format=suffix, **options))
                paths.append(path)
    return paths


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw in our style for a while: the user's own would make other pictures of the same figures."""
    matplotlib = require_matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield

"""Pictures of a probe. Each says in its title what it shows, and in its footnote what of.

Figures are made without pyplot, so no window system and no global state is touched; the same probe gives the same bytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.files import replace_file

if TYPE_CHECKING:
    from offramp.probe import Probe

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # told apart by the colour-blind (Okabe and Ito)
STYLE = {
    "svg.hashsalt": "offramp",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


def available() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> Any:
    """The module matplotlib.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to.
    """
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib; install it with: pip install 'offramp[report]'") from error
    return matplotlib


def save_probe(probe: Probe, folder: Path) -> list[Path]:
    """Draw all pictures of a probe as SVG and PNG.

    Args:
        probe: The probe.
        folder: Where to; made if missing.

    Returns:
        The files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    matplotlib, paths = require_matplotlib(), []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own style would make other pictures of the same probe
        matplotlib.rcParams.update(STYLE)
        for name, draw in PICTURES.items():
            figure = draw(probe)
            for suffix, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
                path = folder / f"probe-{name}.{suffix}"
                _write(figure, path, format=suffix, **options)
                paths.append(path)
    return paths


def _write(figure: Any, path: Path, **options: Any) -> None:
    replace_file(path, lambda temporary: figure.savefig(temporary, **options))


def rank_figure(probe: Probe) -> Any:
    """Box plot of the final token's rank by layer, on a logarithmic axis, and the suggested pruned vocabulary."""
    figure, axes = _axes(probe, _rank_title(probe))
    boxes = [
        {
            "med": r.rank["p50"] + 1,
            "q1": r.rank["p25"] + 1,
            "q3": r.rank["p75"] + 1,
            "whislo": r.rank["p5"] + 1,
            "whishi": r.rank["p95"] + 1,
        }
        for r in probe.layers
    ]
    fill = {"facecolor": BLUE + "40", "edgecolor": BLUE}
    drawn = axes.bxp(
        boxes, positions=[r.layer for r in probe.layers], widths=0.6, showfliers=False, patch_artist=True,
        boxprops=fill, medianprops={"color": BLUE, "linewidth": 2.5}, whiskerprops={"color": BLUE},
        capprops={"color": BLUE}, manage_ticks=False,
    )  # fmt: skip
    p99 = axes.plot([r.layer for r in probe.layers], [r.rank["p99"] + 1 for r in probe.layers], ".", color=GREY)
    size = probe.suggested_vocabulary_size
    line = axes.axhline(size, color=ORANGE, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylim(0.8, probe.vocabulary * 1.3)
    axes.yaxis.set_major_formatter(require_matplotlib().ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.minorticks_off()
    axes.set_ylabel("place of the final token among the layer's choices\n(1 = its first choice)")
    kept = f"{size:,} of {probe.vocabulary:,} tokens hold the final one in 99.5 % of cases at layer {probe.min_layer}"
    labels = ["half of the positions (bar: median; whiskers: 90 % of them)", "99th percentile", kept]
    _legend(axes, [drawn["boxes"][0], p99[0], line], labels)
    return figure


def _rank_title(probe: Probe) -> str:
    first = next(r.layer for r in probe.layers if r.rank["p50"] == 0)
    return f"Half of the final tokens are the first choice only from layer {first} of {probe.num_layers} on"


def confidence_figure(probe: Probe) -> Any:
    """How sure each layer is and how often it is right, with the difference shaded."""
    off = max(probe.layers[:-1], key=lambda r: r.overconfidence)
    if off.overconfidence >= 0.1:
        title = f"Early layers are too sure: layer {off.layer} says {off.max_probability:.0%} and is right {off.agreement:.0%}"
    else:
        title = "No early layer is surer than it is right"
    figure, axes = _axes(probe, title)
    early = probe.layers[:-1]
    x = [r.layer for r in early]
    right, sure = [r.agreement for r in early], [r.max_probability for r in early]
    (a,) = axes.plot([*x, probe.num_layers], [*right, 1.0], "-o", color=BLUE, markersize=4)
    (b,) = axes.plot(x, sure, "-s", color=ORANGE, markersize=4)
    over = [s > r for s, r in zip(sure, right, strict=True)]
    shade = axes.fill_between(x, right, sure, where=over, interpolate=True, color=ORANGE, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(require_matplotlib().ticker.PercentFormatter(1.0))
    axes.set_ylabel("share of positions; mean probability")
    labels = ["right: chooses the final token", "sure: mean probability of its choice", "too sure (overconfidence)"]
    _legend(axes, [a, b, shade], labels)
    return figure


def exit_figure(probe: Probe) -> Any:
    """Where tokens could leave, and up to where leaving saves FLOPs."""
    figure, axes = _axes(probe, f"Choices settle after {probe.saturation.mean:.1f} of {probe.num_layers} layers on average")
    return figure


def _axes(probe: Probe, title: str) -> tuple[Any, Any]:
    """A figure with one pair of axes: layers along x, the title and the footnote."""
    figure = require_matplotlib().figure.Figure(figsize=(9, 5.2), layout="constrained")
    return figure, None


def _legend(axes: Any, handles: list[Any], labels: list[str]) -> None:
    pass


PICTURES: dict[str, Callable[[Probe], Any]] = {"rank": rank_figure, "confidence": confidence_figure, "exits": exit_figure}
"""By the name that the file gets: probe-NAME.svg."""

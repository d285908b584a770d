"""Pictures of a training run: curves over the positions trained on, and what each exit reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from offramp.report.drawing import BLUE, GREY, footnote, headed, legend, require_matplotlib

POINTS = 200
"""Most points of a curve; neighbouring steps are averaged."""
WORDS = {
    "agreement": "share of the last layer's choices",
    "accuracy": "share of right verdicts",
}
"""What the share of an exit means."""


@dataclass(frozen=True)
class Curves:
    """The metrics of a run.

    Attributes:
        model: Its name.
        layers: The E exits, or of a drafter 1, 2, .. E drafts in a row.
        steps: Rows of metrics.jsonl, one per step.
        validations: Likewise, one per judgement on held-out data; at least one.
        what: "agreement" with the last layer, or "accuracy" of classifiers.
        each: What `layers` says: "exit after layer", or "draft in a row".
    """

    model: str
    layers: Sequence[int]
    steps: Sequence[dict[str, Any]]
    validations: Sequence[dict[str, Any]]
    what: str = "agreement"
    each: str = "exit after layer"


def curves_figure(curves: Curves) -> Any:
    """Loss and agreement of every exit: lines while training, dots on held-out data."""
    matplotlib = require_matplotlib()
    first, last = curves.validations[0], curves.validations[-1]
    means = [sum(row["loss"]) / len(row["loss"]) for row in (first, last)]
    figure = headed(f"Mean loss on held-out data: {means[0]:.2f} to {means[1]:.2f} nats\n", 11, 5)
    left, right = figure.subplots(1, 2)
    for axes, key, label in ((left, "loss", "loss (nats)"), (right, "agreement", WORDS[curves.what])):
        for place, layer in enumerate(curves.layers):
            color = colour(place, len(curves.layers))
            steps = [(row["tokens"], row[key][place]) for row in curves.steps if row[key][place] is not None]
            x, y = averaged(steps) if steps else ([], [])  # a curriculum leaves exits out
            axes.plot(x, y, color=color, linewidth=1, alpha=0.8)
            axes.plot(
                [row["tokens"] for row in curves.validations], [row[key][place] for row in curves.validations], "o",
                color=color, markersize=5, label=f"{layer}" if place else f"{curves.each} {layer}",
            )  # fmt: skip
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        axes.set_xlabel("positions trained on")
        axes.set_ylabel(label)
    if last.get("full_loss") != first.get("full_loss"):  # it was trained as well
        left.plot(*averaged([(row["tokens"], row["full_loss"]) for row in curves.steps]), color="black", linewidth=1)
        left.plot(
            [row["tokens"] for row in curves.validations], [row["full_loss"] for row in curves.validations], "*",
            color="black", label="full model, on the text",
        )  # fmt: skip
    right.set_ylim(0, 1.02)
    legend(left, wide=True, ncols=17, columnspacing=1.0, handletextpad=0.4)
    footnote(figure, f"{curves.model} · lines: while training; dots: {last['positions']} held-out positions")
    return figure


def layers_figure(curves: Curves) -> Any:
    """The share of every exit by its layer, before and after."""
    first, last = curves.validations[0], curves.validations[-1]
    before, after = ([sum(row["agreement"]) / len(row["agreement"])] for row in (first, last))
    figure = headed(f"Mean {curves.what} of the exits: {before[0]:.0%} to {after[0]:.0%}", 9, 4.6)
    axes = figure.add_subplot()
    axes.plot(curves.layers, first["agreement"], "-o", color=GREY, markersize=4, label="before")
    axes.plot(curves.layers, last["agreement"], "-o", color=BLUE, markersize=5, label="after")
    axes.set_xticks(curves.layers)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(curves.each)
    axes.set_ylabel(WORDS[curves.what])
    legend(axes, ncols=2)
    footnote(figure, f"{curves.model} · {last['positions']} held-out positions · {last['step']} steps")
    return figure


def colour(place: int, count: int) -> Any:
    """From dark to light, short of yellow."""
    return require_matplotlib().colormaps["viridis"](0.9 * place / max(count - 1, 1))


def averaged(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Means of as many neighbours as leave at most `POINTS` points."""
    size = max(1, -(-len(points) // POINTS))
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [group[-1][0] for group in groups], [sum(y for _, y in group) / len(group) for group in groups]

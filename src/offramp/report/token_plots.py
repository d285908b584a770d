"""Pictures of a distilled language model: how each group of prompts is served, on the way and in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from offramp.distillation.token_report import TokenDistillResult
from offramp.report.drawing import BLUE, GREY, footnote, headed, legend, percent, require_matplotlib
from offramp.report.training_plots import averaged, colour

PANELS = (("kd", "divergence from the teacher (nats)"), ("agreement", "agreement with the teacher"))
Rows = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl of one kind."""


def groups_figure(result: TokenDistillResult, model: str = "") -> Any:
    """Divergence and agreement of every group, before and after; lines at those of all tokens."""
    parts = result.groups or (result.overall,)
    low = result.worst or result.overall
    said = f"Worst group: {low.name}, agreement" if result.groups else "Agreement of all tokens:"
    figure = headed(f"{said} {low.agreement_before:.0%} to {low.agreement:.0%}", max(9.0, 4 + 1.6 * len(parts)), 4.6)
    x = np.arange(len(parts))
    for axes, (key, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for name, shift, shade, what in ((f"{key}_before", -0.2, GREY, "before"), (key, 0.2, BLUE, "after")):
            axes.bar(x + shift, [getattr(each, name) for each in parts], 0.37, color=shade, label=what)
            axes.axhline(getattr(result.overall, name), color=shade, linewidth=0.8, linestyle=":")
        axes.set_xticks(x, [f"{each.name}\n{each.tokens:,} tokens" for each in parts])
        axes.set_ylabel(label)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(percent())
    legend(figure.axes[0], ncols=2)
    footnote(figure, f"{model} · {result.overall.tokens:,} held-out tokens; dotted: all of them")
    return figure


def curves_figure(steps: Rows, judged: Rows, groups: Sequence[str], model: str = "") -> Any:
    """Divergence and agreement over the tokens trained on: a line while training, dots on held-out tokens by group."""
    figure = headed(f"Divergence on held-out tokens: {judged[0]['kd']:.2f} to {judged[-1]['kd']:.2f} nats", 11, 4.8)
    tokens = [row["tokens"] for row in judged]
    for axes, (key, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        if steps:
            x, y = averaged([(row["tokens"], row[key]) for row in steps])
            axes.plot(x, y, color=GREY, linewidth=1, label="while training")
        axes.plot(tokens, [row[key] for row in judged], "-o", color="black", markersize=5, label="all")
        for place, group in enumerate(groups):
            shade, values = colour(place, len(groups)), [row[f"group_{key}"][place] for row in judged]
            axes.plot(tokens, values, "--o", color=shade, linewidth=1, markersize=4, label=group)
        axes.xaxis.set_major_formatter(require_matplotlib().ticker.EngFormatter())
        axes.set_xlabel("tokens trained on")
        axes.set_ylabel(label)
    axes.set_ylim(0, 1.02)
    figure.axes[0].legend(fontsize=9)
    footnote(figure, f"{model} · grey: while training; dots: {judged[-1]['positions']:,} held-out tokens")
    return figure


def weights_figure(readouts: Rows, groups: Sequence[str], model: str = "") -> Any:
    """Mean weight of each group's training tokens after each readout; of unknown groups that of all tokens alone."""
    last = readouts[-1]
    means = {f" of {name}": mean for name, mean in zip(groups, last.get("weight", ()), strict=True)}
    heaviest, mean = max((means or {"": last["mean"]}).items(), key=lambda each: each[1])
    figure = headed(f"Step {last['step']}: tokens{heaviest} weigh {mean:.2f} on average", 8, 4.4)
    axes, steps = figure.add_subplot(), [row["step"] for row in readouts]
    axes.plot(steps, [row["mean"] for row in readouts], "-o", color="black", markersize=5, label="all")
    for place, group in enumerate(groups):
        values = [row["weight"][place] for row in readouts]
        axes.plot(steps, values, "--o", color=colour(place, len(groups)), linewidth=1, markersize=4, label=group)
    axes.xaxis.set_major_locator(require_matplotlib().ticker.MaxNLocator(integer=True))
    axes.set_xlabel("readout after step")
    axes.set_ylabel("mean weight of the training tokens")
    axes.legend(fontsize=9)
    footnote(figure, f"{model} · weights hold until the next readout")
    return figure

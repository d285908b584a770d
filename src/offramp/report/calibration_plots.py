"""The picture of a calibration: what settings lose, and how sure that is, from safe to bold."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.report.drawing import COLOURS, GREY, footnote, headed, legend, save_figures

if TYPE_CHECKING:
    from offramp.calibration.result import Calibration

SMALLEST = 1e-6
"""P-values below are drawn there."""


def save_calibration(calibration: Calibration, folder: Path) -> list[Path]:
    """Draw the picture, if settings were tested (see `save_figures`)."""
    tested = {"calibrate": partial(calibration_figure, calibration)} if calibration.certificate.tests else {}
    return save_figures(tested, folder)


def calibration_figure(calibration: Calibration) -> Any:
    """Mean loss and p-value of the settings that were looked at, with the lines that they must stay below."""
    certificate, promise = calibration.certificate, calibration.certificate.promise
    tests = certificate.tests
    chosen = None if certificate.selected is None else tests[certificate.selected]["name"]
    nothing = "Nothing certified costs less than the full model" if certificate.pays_nothing else "Nothing is certified"
    title = nothing if chosen is None else f"Certified: {chosen}"
    figure = headed(title, 9, 6.4)
    losses, p_values = figure.subplots(2, 1, sharex=True)
    numbers = calibration.settings
    groups: dict[int, list[int]] = {}  # tests by their setting's minimum layer and vocabulary size
    for place, test in enumerate(tests):
        groups.setdefault(numbers[test["setting"]].chain, []).append(place)
    for chain, places in groups.items():
        color = COLOURS[chain % 6]
        name = numbers[tests[places[0]]["setting"]].name if len(groups) > 1 else None
        label = None if name is None else name.partition(", ")[2] or name
        losses.plot(places, [tests[i]["loss"] for i in places], "-o", color=color, markersize=4, label=label)
        p_values.plot(places, [max(tests[i]["p_value"], SMALLEST) for i in places], "-o", color=color, markersize=4)
    crc = promise.bound == "crc"
    for axes, key, line, what in (
        (losses, "loss", promise.tolerance, "tolerance"),
        (p_values, "p_value", promise.tolerance if crc else certificate.level, "tolerance" if crc else "level"),
    ):
        axes.axhline(line, color=GREY, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"{what} {line:.3g}", (1, line), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right", fontsize=8,
            textcoords="offset points", color=GREY,
        )  # fmt: skip
        if certificate.selected is not None:
            value = max(tests[certificate.selected][key], SMALLEST if key == "p_value" else 0)
            axes.plot([certificate.selected], [value], "o", markersize=11, mfc="none", color="black", label="chosen")
    if len(groups) > 1 or chosen is not None:
        legend(losses, ncols=6)
    losses.set_ylabel("mean loss")
    p_values.set_ylabel("mean for conformal risk control" if crc else "p-value")
    if not crc:
        p_values.set_yscale("log")
    p_values.set_xticks(range(len(tests)), [test["name"] for test in tests], rotation=35, ha="right", fontsize=8)
    footnote(
        figure,
        f"{certificate.conditions['model']} · {certificate.conditions['task']['name']} · {promise.kind} losses of "
        f"{promise.metric} · bound {promise.bound} · {certificate.n} certification {promise.unit}s · in order of tests",
    )
    return figure

"""The page of a calibration: the certificate in words, what it rests on, and repeated calibrations.

It is made from result.json alone, with the picture that lies beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from offramp.calibration.certificate import BEFORE, SCHEMA, Certificate
from offramp.calibration.decoded import TEST
from offramp.calibration.promise import MEASURES
from offramp.calibration.result import tests_table
from offramp.calibration.statement import limit_words
from offramp.calibration.validate import READING
from offramp.evaluation.result import COLUMNS
from offramp.report.blocks import Block, Page, Section, Text, facts, repeat, svg
from offramp.risk import CRC
from offramp.runs.tables import Table

PICTURE = "calibrate.svg"
OLD_READING = (
    "The certifying part is itself part of the whole pool and drawn from it without replacement, so its mean is closer "
    "to the pool's than that of independent prompts would be: the first count understates how often the promise fails; "
    "calibrate again for one that does not. The second has the noise of {held_out:.0f} held-out prompts too. The "
    "splits share their prompts: the intervals are about the splitting."
)
"""How the counts of offramp/calibrate-validation/1 are to be read."""


def page(folder: Path, values: dict[str, Any]) -> Page:
    """The page of a calibration, from its result.json."""
    certificate, validation = values["certificate"], values["validation"]
    conditions, data = certificate["conditions"], certificate["data"]
    about = {
        **{name: value for name, value in conditions.items() if name not in ("task", "settings")},
        **conditions["settings"], "seed": certificate["seed"], "splits (examples, groups)": certificate["splits"],
        "order": certificate["order"], **{f"data {name}": value for name, value in data.items() if name != "command"},
        **certificate["versions"], "command": data.get("command"),
    }  # fmt: skip
    sections = [
        Section("The certificate", _certificate(values)),
        *([Section("What was tested", _tests(certificate, folder / PICTURE))] if certificate["tests"] else []),
        Section("What the policy loses and saves", [_estimates(certificate["estimates"], values.get("seconds"))]),
    ]
    if validation is not None:
        sections.append(Section("Repeated calibrations", _validation(validation)))
    everything = {name: certificate[name] for name in ("promise", "base", "grid", "policy")}
    task = conditions["task"]["name"]
    return Page(
        f"Calibration: {conditions['model']}, {task}",
        str(folder),
        [*sections, repeat(about, everything)],
    )


def _certificate(values: Mapping[str, Any]) -> list[Block]:
    certificate, words, mark = values["certificate"], values["words"], "good"
    promise = certificate["promise"]
    if certificate.get("schema") in (SCHEMA, BEFORE):  # what is in the file is not repeated, but worked out again
        made = Certificate.from_dict(certificate)
        words, mark = made.words(), "good" if made.saving_is_sure else ""
    good = certificate["certified"]
    said = {
        "certified": good, "metric": promise["metric"], "kind of loss": promise["kind"], "margin": promise["margin"],
        "tolerance": promise["tolerance"], "failure probability": promise["failure"], "bound": promise["bound"],
        "unit": promise["unit"], "minimised": MEASURES.get(certificate.get("minimise")),
        "certification draws": certificate["n"], **_room(certificate.get("room")),
    }  # fmt: skip
    return [Text((words,), mark if good else "bad"), facts(said)]


def _room(room: Mapping[str, Any] | None) -> dict[str, Any]:
    """What there was to lose; earlier versions did not look."""
    if room is None:
        return {}
    return {
        "tokeniser": room["tokeniser"], "most that could be lost, on average": f"{room['mean']:.3g}",
        "prompts with nothing to lose": f"{room['none']:.1%}",
        "prompts with texts that the metric cannot read": f"{room['unread']:.1%}",
    }  # fmt: skip


def _tests(certificate: Mapping[str, Any], picture: Path) -> list[Block]:
    table = tests_table(certificate)
    marks = ["front full" if place == certificate["selected"] else "" for place in range(len(table.rows))]
    drawn: list[Block] = []
    if picture.is_file():
        drawn.append(svg(picture.read_bytes(), "Mean losses and p-values of the settings, in the order of the tests"))
    return [*drawn, replace(table, marks=marks)]


def _estimates(estimates: Mapping[str, Any], seconds: Mapping[str, Any] | None) -> Table:
    columns = {name: f"{column} (× full model)" for name, column in COLUMNS.items()}
    head = ["part", "examples", "mean loss", "at most", *columns.values(), "exit layer", "quality"]
    rows = [
        [
            part, f"{seen['examples']}", _interval(seen["loss"]), limit_words(seen["upper"]) if "upper" in seen else "",
            *(_interval({**((seconds or {}) if part == TEST else {}), **seen}.get(name)) for name in columns),
            f"{seen['exit_layer']['value']:.1f}",
            ", ".join(f"{name} {value['value']:.3f}" for name, value in seen["quality"].items()),
        ]
        for part, seen in estimates.items()
    ]  # fmt: skip
    return Table(head, rows)


def _interval(value: Mapping[str, float | None] | None) -> str:
    if value is None:  # an earlier version, answers of a single token, or seconds that do not compare
        return "–"
    if value["low"] is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _validation(seen: Mapping[str, Any]) -> list[Block]:
    """Counts of broken promises."""
    promise, repeats = seen["promise"], seen["repeats"]

    def share(name: str) -> str:
        low, high = seen[f"{name}_interval"]
        return f"{seen[name]} of {repeats} ({seen[name] / repeats:.1%}; exact 95 % interval {low:.1%} to {high:.1%})"

    crc, drawn = promise["bound"] == CRC, "exceeded_population" in seen
    above, held_out = f"above {promise['tolerance']:g}", seen["pool"] - seen["certifying"]
    split = f"splits, about {seen['certifying']:.0f} certifying"
    rows = [
        ["promised", "", "a mean loss within the tolerance" if crc else f"at most {promise['failure']:.1%} failures"],
        [f"mean loss of the held-out part {above}", split, share("exceeded_held_out")],
        ["nothing certified", split, f"{seen['uncertified']} of {repeats}"],
        ["mean loss held out", split, f"{seen['loss']:.3g}"],
        [f"{seen.get('cost', 'FLOPs')} held out (× full model)", split, f"{seen['flops_ratio']:.3f}"],
    ]
    if drawn:
        draws = f"{seen['drawn']} {promise['unit']}s drawn with replacement"
        rows[1:1] = [
            [f"mean loss of the pool {above}", draws, share("exceeded_population")],
            ["mean loss of the pool, on average", draws, f"{seen['loss_population']:.3g}"],
            ["nothing certified", draws, f"{seen['uncertified_drawn']} of {repeats}"],
        ]
    else:
        rows[1:1] = [[f"mean loss of the whole pool {above}", split, share("exceeded_pool")]]
    note = f"{repeats} calibrations in each way, on a pool of {seen['pool']} prompts. "
    note += (READING if drawn else OLD_READING).format(held_out=held_out)
    return [Table(("", "certified by", ""), rows), Text((note,))]

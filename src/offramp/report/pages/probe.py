"""The page of a probe: what every layer would have said, and whether leaving pays."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from offramp.lm.probe_result import Probe
from offramp.report import plots
from offramp.report.pages.blocks import Code, Page, Section, Text, draw, repeat
from offramp.runs.tables import Table

PICTURES = {
    "confidence": "How sure each layer is, and how often it is right",
    "rank": "Place of the final token among each layer's choices",
    "exits": "Where tokens could leave, and up to where leaving saves FLOPs",
}


def page(path: Path, values: dict[str, Any]) -> Page:
    """The page of a probe, from its JSON."""
    probe = Probe.from_dict(values)
    pictures = {name: draw(partial(plots.PICTURES[name], probe), says) for name, says in PICTURES.items()}
    head = ["after layer", "accuracy", "confidence", "too sure by", "gap", "settled so far", "median rank"]
    rows = [
        [
            f"{r.layer}", f"{r.agreement:.1%}", f"{r.max_probability:.1%}",
            "" if r.layer == probe.num_layers else f"{r.overconfidence:+.1%}", f"{r.gap:.2f}", f"{r.settled:.1%}",
            f"{r.rank['p50'] + 1:,.0f}",
        ]
        for r in probe.layers
    ]  # fmt: skip
    marks = ["full" if r.layer == probe.num_layers else "" for r in probe.layers]
    note = (
        "Accuracy: how often the layer's choice is the final token. Confidence: mean probability of its choice. Gap: "
        "mean difference of its two largest probabilities. Settled: share of positions at which this and all later "
        "layers choose the final token."
    )
    about = {
        "model": probe.model, "source": probe.source, "examples": probe.examples, "positions": probe.tokens,
        "min_layer": probe.min_layer,
    }  # fmt: skip
    return Page(
        f"Probe: {probe.model}",
        str(path),
        [
            Section("Is it worth it?", [Text((probe.verdict,), _mark(probe.verdict)), pictures["exits"]]),
            Section(
                "Confidence and accuracy by layer",
                [pictures["confidence"], Table(head, rows, marks=marks), Text((note,)), pictures["rank"]],
            ),
            Section("In figures", [Code(probe.table(), "The probe as text")]),
            repeat(about),
        ],
    )


def _mark(verdict: str) -> str:
    """Of its box; an earlier version's praise, which no interval supports, has none."""
    return "good" if verdict.startswith("Worth trying") else "bad" if verdict.startswith("Not suitable") else ""

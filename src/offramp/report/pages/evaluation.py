"""The page of an evaluation: tables, Pareto front, exits, costs by part, and answers coloured by exit layer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from offramp.evaluation.arms import FULL
from offramp.evaluation.record_file import Record, read_records
from offramp.evaluation.records import PREFILL
from offramp.evaluation.result import Evaluation
from offramp.evaluation.summary import PERPLEXITY, ArmSummary
from offramp.report import drawing, plots
from offramp.report.pages.blocks import Answer, Answers, Bar, Bars, Block, Page, Section, Text, draw, repeat

SHOWN = 3
"""Policies whose answers are shown beside the full model's."""
PARTS = {
    PREFILL: ("prompt", "#7f8c9b"),
    "encoder": ("encoder", "#b39ddb"),
    "blocks": ("blocks", drawing.BLUE),
    "fill": ("keys and values of skipped layers", "#56B4E9"),
    "readout": ("readouts of all tokens", drawing.ORANGE),
    "pruned_readout": ("pruned readouts", "#E69F00"),
    "select": ("choosing the kept tokens", "#F0E442"),
    "confidence": ("classifiers", drawing.GREEN),
}
"""Names and colours of the parts of the costs."""
EARLY, MIDDLE, LATE, LAST = (140, 197, 240), (246, 239, 176), (247, 166, 96), "#cfcfcf"
"""From the first exit to the last one, and the full model; light, for dark letters, and no red beside green."""


def page(folder: Path, values: dict[str, Any], *, examples: int, seed: int) -> Page:
    """The page of a finished evaluation, from its results.json, with some examples drawn by the seed."""
    result = Evaluation.from_dict(values)
    conditions = result.conditions
    answers, colours = _answers(result, folder / "records", examples, seed)
    about = {name: value for name, value in conditions.items() if name != "command"}
    return Page(
        f"Evaluation: {conditions['model']}, {conditions['task']}",
        str(folder),
        [
            Section("Quality and cost", _tables(result)),
            Section("Pareto front", _front(result)),
            Section("Where tokens leave", [_exits(result)]),
            Section("Costs by part", _costs(result)),
            Section("Examples, token by token", answers),
            repeat(conditions.get("command"), about, {arm.name: arm.policy for arm in result.arms}),
        ],
        colours,
    )


def _tables(result: Evaluation) -> list[Block]:
    front = set(result.front())
    marks = [" ".join(filter(None, [_mark(arm), "front" * (arm.name in front)])) for arm in result.arms]
    says = tuple(f"{line}." for line in result.verdict())
    return [
        *([Text(says, "good" if result.recommended() else "")] if says else []),
        replace(result.quality_table(), marks=marks),
        replace(result.cost_table(), marks=marks),
        Text((f"{result.reading()}. The full model's row is bold, those of static exits are grey.",)),
    ]


def _mark(arm: ArmSummary) -> str:
    return "full" if arm.policy is None else "static" if arm.is_static else ""


def _front(result: Evaluation) -> list[Block]:
    fronts = {"FLOPs": result.front("flops_ratio"), "seconds": result.front("seconds_ratio")}
    says = [
        f"By the estimates, not beaten in {result.metric} for as few {cost}: {'; '.join(arms)}."
        for cost, arms in fronts.items()
        if arms
    ]
    picture = draw(
        partial(plots.pareto_figure, result),
        f"{result.metric} over FLOPs and, where arms took turns, seconds, of the full model, static exits and policies",
    )
    return [picture, Text(tuple(says))]


def _exits(result: Evaluation) -> Block:
    return draw(partial(plots.histogram_figure, result), "Share of the tokens that left after each layer, by arm")


def _costs(result: Evaluation) -> list[Block]:
    used = [part for part in PARTS if any(arm.parts.get(part) for arm in result.arms)]
    most = max(sum(arm.parts.values()) for arm in result.arms)
    bars = [
        Bar(
            arm.name,
            f"{sum(arm.parts.values()):.3f}",
            [
                (index, 100 * arm.parts[part] / most, f"{PARTS[part][0]}: {arm.parts[part]:.3f}")
                for index, part in enumerate(used)
                if arm.parts.get(part)
            ],
            _mark(arm),
        )
        for arm in result.arms
    ]
    note = "FLOPs by part, as shares of the full model's whole; every matrix product counts."
    return [Text((note,)), Bars([PARTS[part] for part in used], bars)]


# ---------------------------------------------------------------- examples


def _answers(result: Evaluation, folder: Path, count: int, seed: int) -> tuple[list[Block], dict[int, str]]:
    """A few answers, and the colours of the layers in them."""
    records = {found[0].arm: found for path in sorted(folder.glob("*.jsonl")) if (found := read_records(path)[1])}
    chosen = [name for name in _chosen(result) if name in records]
    if FULL not in chosen or len(chosen) < 2:
        return [Text(("The records of the answers are not there.",))], {}
    if not any(record.pieces for name in chosen for record in records[name]):
        why = "made without a tokenizer, or by a version that did not keep the texts of single tokens"
        return [Text((f"The records hold no texts of tokens: they were {why}.",))], {}
    by_id = {name: {record.id: record for record in records[name]} for name in chosen}
    ids = [record.id for record in records[FULL] if all(record.id in arm for arm in by_id.values())]
    picked = sorted(random.Random(seed).sample(range(len(ids)), min(count, len(ids))))
    shown = {ids[place]: [by_id[name][ids[place]] for name in chosen] for place in picked}
    layers = sorted({layer for found in shown.values() for record in found for layer in record.exit_layers})
    legend = [(layer, "full model" if layer == result.num_layers else str(layer)) for layer in layers]
    kind = "a text, word by word: what each would have said next" if result.metric == PERPLEXITY else "answers"
    note = (
        f"{len(shown)} examples drawn with seed {seed}; {kind}. Each token has the colour of the layer after which it "
        "left; pointing at it shows the layer and the confidence. A dot stands for a token without text of its own."
    )
    examples = [
        (f"Example {id}", [_answer(record, result) for record in found]) for id, found in shown.items()
    ]  # fmt: skip
    return [Text((note,)), Answers(legend, examples)], _colours(layers, result.num_layers)


def _chosen(result: Evaluation) -> list[str]:
    """The full model and a few others: recommended policies, those ahead or on the front, the rest."""
    first = [*result.recommended(), *result.ahead(), *result.front()]
    wanted = dict.fromkeys([*first, *(arm.name for arm in result.arms)])
    others = sorted((name for name in wanted if name != FULL), key=lambda name: result.arm(name).is_static)
    return [FULL, *others[:SHOWN]]


def _answer(record: Record, result: Evaluation) -> Answer:
    depth = result.num_layers
    scores = ", ".join(f"{name} {100 * value:.0f}" for name, value in record.scores.items())
    mean = sum(record.exit_layers) / max(len(record.exit_layers), 1)
    says = f"{scores}; {len(record.tokens)} tokens, mean exit layer {mean:.1f} of {depth}"
    if record.arm != FULL:
        says += (
            "; the full model's very answer"
            if record.same
            else f"; its token at {record.agreement:.0%} of the positions"
        )
    sure = record.confidences or [None] * len(record.exit_layers)
    tokens = [
        (piece or "·", layer, f"layer {layer} of {depth}" + ("" if value is None else f", confidence {value:.2f}"))
        for piece, layer, value in zip(record.pieces, record.exit_layers, sure, strict=False)
    ]
    return Answer(record.arm, says, tokens)


def _colours(layers: Sequence[int], depth: int) -> dict[int, str]:
    early = [layer for layer in layers if layer < depth]
    return {layer: _between(layer, early[0], early[-1]) for layer in early} | {depth: LAST}


def _between(layer: int, first: int, last: int) -> str:
    place = 2 * (layer - first) / max(last - first, 1)
    low, high = (EARLY, MIDDLE) if place < 1 else (MIDDLE, LATE)
    return "#" + "".join(
        f"{round(a + (b - a) * (place % 1 if place < 2 else 1)):02x}" for a, b in zip(low, high, strict=True)
    )

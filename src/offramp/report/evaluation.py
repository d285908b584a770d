"""The page of an evaluation: a verdict, answers coloured by exit layer, pictures, costs by part, and all figures."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from offramp.core.generation import places
from offramp.evaluation.arms import FULL
from offramp.evaluation.evaluate import EXAMPLES
from offramp.evaluation.perplexity import PERPLEXITY
from offramp.evaluation.record_file import Record, read_records
from offramp.evaluation.records import PREFILL
from offramp.evaluation.result import GOOD, NOTHING, REASONS, Evaluation, heading, quality_cell, ratio_cell
from offramp.evaluation.summary import ArmSummary
from offramp.report import plots
from offramp.report.blocks import (
    Answer,
    Answers,
    Asked,
    Bar,
    Bars,
    Block,
    Page,
    Panels,
    Section,
    Text,
    Verdict,
    draw,
    repeat,
)
from offramp.runs.resume import read_lines

SHOWN = 3
"""Policies whose answers are shown beside the full model's."""
PARTS = {
    PREFILL: ("prompt", "faint"), "encoder": ("encoder", "pink"), "blocks": ("blocks", "blue"),
    "fill": ("keys and values of skipped layers", "sky"), "readout": ("readouts of all tokens", "orange"),
    "pruned_readout": ("pruned readouts", "amber"), "select": ("choosing the kept tokens", "plum"),
    "confidence": ("classifiers", "green"),
}  # fmt: skip
"""Names of the parts of the costs, and their colours in `colours.css`."""


def page(folder: Path, values: dict[str, Any], *, examples: int, seed: int) -> Page:
    """The page of a finished evaluation, from its results.json, with some examples drawn by the seed."""
    result = Evaluation.from_dict(values)
    conditions = result.conditions
    policies = {arm.name: arm.policy for arm in result.arms}
    return Page(
        f"Evaluation: {conditions['model']}, {conditions['task']}",
        str(folder),
        [
            Section("In short", _short(result)),
            Section("Examples, token by token", _answers(result, folder, examples, seed)),
            Section("Pareto front", _front(result)),
            Section("Where tokens leave", _exits(result)),
            Section("Costs by part", _costs(result)),
            Section("Quality and cost", _tables(result)),
            repeat(conditions, policies, python=_python(result, folder)),
        ],
    )


# ---------------------------------------------------------------- in short


def _short(result: Evaluation) -> list[Block]:
    """The verdict, and what the policy that it names, or the nearest to one it could name, scores and costs."""
    order = [GOOD, *reversed([reason for reason in REASONS if reason != GOOD])]  # the least that is against it first
    found = sorted(result.findings(), key=lambda each: order.index(each.reason))
    if not found:
        return [Verdict("Only the full model and static exits were compared.")]
    first, good = result.arm(found[0].arm), found[0].reason == GOOD
    why = heading(result, found[0].reason)
    sentence = f"{first.name}: {why[0].lower()}{why[1:]}." if good else f"{NOTHING}; nearest to it is {first.name}."
    whole = quality_cell(replace(result.arms[0].quality[result.metric], low=None, high=None), result.metric)
    points = "" if result.metric == PERPLEXITY else "points "
    tiles = [
        (f"{result.metric} of {first.name}", quality_cell(first.difference[result.metric], result.metric, "+"),
         f"{points}beside the full model's {whole}"),
        ("FLOPs per generated token", ratio_cell(first.flops_per_token_ratio), "× the full model's"),
        ("seconds per generated token", ratio_cell(first.seconds_per_token_ratio),
         "× the full model's" if first.seconds_per_token_ratio else "they do not compare: the two did not take turns"),
    ]  # fmt: skip
    says = tuple(f"{line}." for line in result.verdict() if line != NOTHING)
    return [Verdict(sentence, tiles, "good" if good else ""), Text(says)]


def _tables(result: Evaluation) -> list[Block]:
    front = set(result.front())
    marks = [" ".join(filter(None, [_mark(arm), "front" * (arm.name in front)])) for arm in result.arms]
    note = f"{result.reading()}. The full model's row is bold, those of static exits are grey."
    return [
        replace(result.quality_table(), marks=marks), replace(result.cost_table(), marks=marks), Text((note,)),
    ]  # fmt: skip


def _mark(arm: ArmSummary) -> str:
    return "full" if arm.policy is None else "static" if arm.is_static else ""


# ---------------------------------------------------------------- pictures


def _front(result: Evaluation) -> list[Block]:
    fronts = {"FLOPs": result.front("flops_ratio"), "seconds": result.front("seconds_ratio")}
    says = [
        f"By the estimates, not beaten in {result.metric} for as few {cost}: {'; '.join(arms)}."
        for cost, arms in fronts.items()
        if arms
    ]
    panels = [
        draw(
            partial(plots.pareto_panel, result, cost),
            f"{result.metric} over {label}: full model, static exits, policies",
        )
        for cost, label in plots.pareto_costs(result).items()
    ]
    says.append(f"Bars are {result.conditions.get('level', 0.95):.0%} intervals.")
    return [Panels(panels), Text(tuple(says))]


def _exits(result: Evaluation) -> list[Block]:
    """Static exits only say their own layer."""
    arms = [arm for arm in result.arms if not arm.is_static]
    first = result.num_layers + 1 - max(len(arm.histogram) for arm in result.arms)  # 0 where a drafter drafted
    counts = {arm.name: dict(enumerate(arm.histogram, result.num_layers + 1 - len(arm.histogram))) for arm in arms}
    layers = [
        layer for layer in range(first, result.num_layers + 1) if any(count.get(layer) for count in counts.values())
    ]
    at = places(layers, result.num_layers)
    bars = [
        Bar(arm.name, f"mean {arm.exit_layer.value:.1f}", [
            (index, 100 * counts[arm.name][layer] / sum(arm.histogram),
             f"layer {layer}: {counts[arm.name][layer] / sum(arm.histogram):.1%}")
            for index, layer in enumerate(layers) if counts[arm.name].get(layer)
        ])
        for arm in arms
    ]  # fmt: skip
    styles = {layer: "background:var(--plain)" if place == 1 else f"--at:{place:.3f}" for layer, place in at.items()}
    legend = [(_name(layer, result.num_layers), styles[layer]) for layer in layers]
    note = f"Shares of the tokens by the layer they left after, of {result.num_layers}; static exits left out."
    return [Text((note,)), Bars(legend, bars)] if bars else [Text(("No policy was compared.",))]


def _name(layer: int, depth: int) -> str:
    return "full depth" if layer == depth else str(layer)


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
    legend = [(name, f"background:var(--{colour})") for name, colour in map(PARTS.__getitem__, used)]
    return [Text((note,)), Bars(legend, bars)]


# ---------------------------------------------------------------- examples


def _answers(result: Evaluation, folder: Path, count: int, seed: int) -> list[Block]:
    """A few answers beside what was asked."""
    paths = sorted((folder / "records").glob("*.jsonl"))
    records = {found[0].arm: found for path in paths if (found := read_records(path)[1])}
    chosen = [name for name in _chosen(result) if name in records]
    if FULL not in chosen or len(chosen) < 2:
        return [Text(("The records of the answers are not there.",))]
    if not any(record.pieces for name in chosen for record in records[name]):
        why = "made without a tokenizer, or by a version that did not keep the texts of single tokens"
        return [Text((f"The records hold no texts of tokens: they were {why}.",))]
    by_id = {name: {record.id: record for record in records[name]} for name in chosen}
    ids = [record.id for record in records[FULL] if all(record.id in arm for arm in by_id.values())]
    picked = sorted(random.Random(seed).sample(range(len(ids)), min(count, len(ids))))
    shown = {ids[place]: [by_id[name][ids[place]] for name in chosen] for place in picked}
    layers = sorted({layer for found in shown.values() for record in found for layer in record.exit_layers})
    kind = "a text, word by word: what each would have said next" if result.metric == PERPLEXITY else "answers"
    note = (
        f"{len(shown)} examples drawn with seed {seed}; {kind}. The stronger a token's colour, the earlier it left; "
        "what went to full depth is plain. Pointing at it shows the layer and the confidence. A dot stands for a token "
        "without text of its own."
    )
    kept = folder / EXAMPLES
    asked = {line["id"]: line for line in read_lines(kept, "examples")} if kept.is_file() else {}
    examples = [
        Asked(f"Example {id}", _prompt(asked.get(id, {})), [_answer(record, result) for record in found])
        for id, found in shown.items()
    ]
    legend = {layer: _name(layer, result.num_layers) for layer in layers}
    return [Text((note,)), Answers(legend, places(layers, result.num_layers), examples)]


def _prompt(example: dict[str, Any]) -> list[tuple[str, str]]:
    """What was asked, and a right answer; nothing of a passage, which is its own prompt, nor of an earlier version."""
    named = {"asked": example.get("question"), "text": example.get("source")}
    named |= {"reference": next(iter(example.get("references") or ()), None)}
    return [(name, text) for name, text in named.items() if text]


def _chosen(result: Evaluation) -> list[str]:
    """The full model and a few others: one that is lossless, recommended policies, those ahead or on the front."""
    lossless = [arm.name for arm in result.arms if _lossless(arm)][:1]
    first = [*lossless, *result.recommended(), *result.ahead(), *result.front()]
    wanted = dict.fromkeys([*first, *(arm.name for arm in result.arms)])
    others = sorted((name for name in wanted if name != FULL), key=lambda name: result.arm(name).is_static)
    return [FULL, *others[:SHOWN]]


def _lossless(arm: ArmSummary) -> bool:
    return arm.policy is not None and arm.policy.get("skipped") == "verify" and arm.policy.get("accept", 1.0) >= 1


def _answer(record: Record, result: Evaluation) -> Answer:
    depth = result.num_layers
    scores = ", ".join(f"{name} {100 * value:.0f}" for name, value in record.scores.items())
    mean = sum(record.exit_layers) / max(len(record.exit_layers), 1)
    says = f"{scores}; {len(record.tokens)} tokens, mean exit layer {mean:.1f} of {depth}"
    if record.arm != FULL:
        share = f"; its token at {record.agreement:.0%} of the positions"
        says += "; the full model's very answer" if record.same else share
    if _lossless(result.arm(record.arm)):
        says += "; lossless: every token is checked by the full model"
    sure = record.confidences or [None] * len(record.exit_layers)
    tokens = [
        (piece or "·", layer, f"layer {layer} of {depth}" + ("" if value is None else f", confidence {value:.2f}"))
        for piece, layer, value in zip(record.pieces, record.exit_layers, sure, strict=False)
    ]
    return Answer(record.arm, says, tokens)


def _python(result: Evaluation, folder: Path) -> str:
    """What to call where no command line was recorded."""
    conditions = result.conditions
    if conditions["task"] == PERPLEXITY:
        return ""
    options = {name: conditions[name] for name in ("max_new_tokens", "batch_size") if name in conditions}
    return "\n".join([
        "import json",
        "from pathlib import Path",
        "",
        "import offramp",
        "from offramp.runs.resume import read_lines",
        "from offramp.tasks import Example",
        "",
        f"folder = Path({json.dumps(str(folder))})",
        'arms = json.loads((folder / "results.json").read_text())["arms"]',
        f'examples = [Example(**line) for line in read_lines(folder / "{EXAMPLES}", "examples")]',
        'policies = {a["name"]: offramp.ExitPolicy.from_dict(a["policy"]) for a in arms if a["policy"]}',
        f"lm = offramp.load({json.dumps(conditions['model'])}, dtype={json.dumps(conditions['dtype'])})",
        f"lm.evaluate({json.dumps(conditions['task'])}, examples, policies, "
        + ", ".join(f"{name}={value!r}" for name, value in options.items()) + ', out="again")',
    ])  # fmt: skip

"""What "Early Exit LLMs" claims of its figures 4 to 9, as paired differences between arms on the same examples.

    python benchmarks/claims.py EVALUATION.json [EVALUATION.json ...] --records FOLDER

The evaluations are those of `benchmarks/figures.py`, the folder is the one they were written to. Every row compares two
arms with the same minimum exit layer: a measure with softmax, a pruned test with the one on the whole vocabulary,
adaptive with fixed pruning. An interval that holds 0 (for ratios 1) shows no difference.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from figures import Rule, by_layer, named, together

from offramp.evaluation import Evaluation, Record, read_records, summarise
from offramp.metrics.intervals import Bootstrap, Interval
from offramp.runs.tables import markdown

PAIRS: tuple[tuple[Rule, Rule], ...] = (
    (("contrastive", None), ("softmax", None)),
    (("jsd", None), ("softmax", None)),
    (("softmax", "fixed"), ("softmax", None)),
    (("softmax", "decaying"), ("softmax", None)),
    (("softmax", "adaptive"), ("softmax", None)),
    (("jsd", "adaptive"), ("jsd", None)),
    (("jsd", "adaptive"), ("jsd", "fixed")),
)

READ_AS = (
    "Paired differences and ratios on the same examples, in brackets 95% intervals; + is later, or better; /token: per "
    "generated token, without encoder and prompt, so that lengths do not count."
)


def earlier(one: Sequence[Record], other: Sequence[Record], bootstrap: Bootstrap) -> Interval:
    """Mean exit layer over all tokens, minus the other's."""
    columns = [
        [sum(a.exit_layers), len(a.tokens), sum(b.exit_layers), len(b.tokens)] for a, b in zip(one, other, strict=True)
    ]
    return bootstrap.estimate(columns, lambda sums: sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3])


def comparisons(evaluation: Evaluation, folder: Path) -> tuple[list[str], list[list[str]]]:
    """The head of a table, and a row for every pair of arms at every minimum layer; quality in points of 100."""
    records = records_of(folder)
    metric = evaluation.metric.removesuffix(" (corpus)")  # of a sentence: a corpus score has no mean over examples
    head = ["arm", "against", "from layer", *compared(metric)]
    rows = []
    for pair in PAIRS:
        one, other = (by_layer(evaluation, rule) for rule in pair)
        for layer in sorted(one.keys() & other.keys()):
            found = differences(records[one[layer].name], records[other[layer].name], metric, evaluation.num_layers)
            rows.append([*map(named, pair), str(layer), *found])
    return head, rows


def compared(metric: str) -> list[str]:
    """The head above what `differences` gives."""
    return ["exit layer", f"{metric} of an example", "FLOPs/token (ratio)", "seconds/token (ratio)"]


def differences(mine: Sequence[Record], theirs: Sequence[Record], metric: str, num_layers: int) -> list[str]:
    """One arm beside another on the same examples: depth and quality (points of 100) minus, costs per token over it."""
    bootstrap = Bootstrap([record.group for record in theirs])
    found = summarise(mine, theirs, policy=None, num_layers=num_layers, bootstrap=bootstrap)
    return [
        shown(earlier(mine, theirs, bootstrap), 2, sign="+"), shown(found.difference[metric], 1, 100, "+"),
        shown(found.flops_per_token_ratio, 3), shown(found.seconds_per_token_ratio, 2),
    ]  # fmt: skip


def records_of(folder: Path) -> dict[str, list[Record]]:
    """By arm."""
    found = [read_records(path)[1] for path in sorted((folder / "records").glob("*.jsonl"))]
    return {records[0].arm: records for records in found if records}


def shown(interval: Interval | None, digits: int, scale: float = 1, sign: str = "") -> str:
    """A value with its ends; a dash where there is none to be compared."""
    if interval is None:
        return "–"
    value, *ends = (
        "?" if end is None else f"{scale * end:{sign}.{digits}f}"
        for end in (interval.value, interval.low, interval.high)
    )
    return f"{value} ({ends[0]} to {ends[1]})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description='Compare the arms that "Early Exit LLMs" makes claims about.')
    parser.add_argument("evaluations", type=Path, nargs="+")
    parser.add_argument("--records", type=Path, required=True)
    options = parser.parse_args()
    read = [Evaluation.from_dict(json.loads(path.read_text(encoding="utf-8"))) for path in options.evaluations]
    print(markdown(*comparisons(together(read), options.records)))
    print(f"\n{READ_AS}")


if __name__ == "__main__":
    main()

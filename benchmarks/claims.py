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

from baseline import records_of
from figures import Rule, by_layer, named, together

from offramp.evaluation import Evaluation, Record, summarise
from offramp.metrics.bootstrap import Bootstrap, Interval
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
    head = [
        "arm", "against", "from layer", "exit layer", f"{metric} of an example", "FLOPs, no prompt (ratio)",
        "seconds (ratio)",
    ]  # fmt: skip
    rows = []
    for pair in PAIRS:
        one, other = (by_layer(evaluation, rule) for rule in pair)
        for layer in sorted(one.keys() & other.keys()):
            mine, theirs = records[one[layer].name], records[other[layer].name]
            bootstrap = Bootstrap([record.group for record in theirs])
            found = summarise(mine, theirs, policy=None, num_layers=evaluation.num_layers, bootstrap=bootstrap)
            rows.append([
                *map(named, pair), str(layer), shown(earlier(mine, theirs, bootstrap), 2, sign="+"),
                shown(found.difference[metric], 1, 100, "+"), shown(found.decode_flops_ratio, 3),
                shown(found.seconds_ratio, 2),
            ])  # fmt: skip
    return head, rows


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
    print("\nPaired differences and ratios on the same examples, in brackets 95% intervals; + is later, or better.")


if __name__ == "__main__":
    main()

"""Compare the policies of one model with the full model of another, on the same examples.

    python benchmarks/baseline.py RUN BASELINE-RUN [OTHER-RUN ...] [--arm ARM]

All are folders of `offramp evaluate`; of the others, the full models are shown: smaller ones, say, trained alone. A
model trained for early exits may itself be worse, or better, than one trained without them; what an early exit is worth
is its distance from the latter. Costs are over the baseline's, too; quality is the mean over examples. Models that were
trained for shortened prompts are compared with such: `--arm "prompt to 14"`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from claims import records_of, shown

from offramp.evaluation import FULL, Evaluation, summarise
from offramp.metrics.intervals import Bootstrap
from offramp.runs.results import RESULTS
from offramp.runs.tables import markdown


def comparison(
    folder: Path, baseline: Path, others: Sequence[Path] = (), against: str = FULL
) -> tuple[list[str], list[list[str]]]:
    """The head of a table and a row for every arm of both folders; quality in points of 100.

    Args:
        folder: With the policies.
        baseline: With the arm that all is compared with.
        others: With an arm of this name, or else a full model, to be shown besides.
        against: Name of the arm.
    """
    mine, theirs = records_of(folder), records_of(baseline)
    full = theirs[against]
    result = Evaluation.from_dict(json.loads((folder / RESULTS).read_text(encoding="utf-8")))
    metric = result.metric.removesuffix(" (corpus)")
    bootstrap = Bootstrap([record.group for record in full])
    arms = {f"baseline's {name}": records for name, records in theirs.items() if records is not full} | mine
    for other in others:
        found = records_of(other)
        name = against if against in found else FULL
        arms[f"{other.name}'s {name}"] = found[name]
    rows = [["baseline", f"{100 * sum(r.scores[metric] for r in full) / len(full):.1f}", "", "1.000", "1.000"]]
    for name, records in sorted(arms.items(), key=lambda arm: -sum(r.scores[metric] for r in arm[1])):
        arm = summarise(records, full, policy=None, num_layers=result.num_layers, bootstrap=bootstrap)
        rows.append([
            name, f"{100 * arm.quality[metric].value:.1f}", shown(arm.difference[metric], 1, 100, "+"),
            f"{arm.flops_ratio.value:.3f}", shown(arm.flops_per_token_ratio, 3),
        ])  # fmt: skip
    return ["arm", metric, "minus the baseline's", "FLOPs (baseline = 1)", "FLOPs/token"], rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare policies with the full model of another evaluation.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("others", type=Path, nargs="*")
    parser.add_argument("--arm", default=FULL, help="of the baseline; default: %(default)s")
    options = parser.parse_args()
    print(markdown(*comparison(options.folder, options.baseline, options.others, options.arm)))


if __name__ == "__main__":
    main()

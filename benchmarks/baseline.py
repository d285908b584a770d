"""Compare the policies of one model with the full model of another, on the same examples.

    python benchmarks/baseline.py RUN BASELINE-RUN

Both are folders of `offramp evaluate`. A model trained for early exits may itself be worse, or better, than one trained
without them; what an early exit is worth is its distance from the latter. Costs are over the baseline's, too.
"""

import argparse
import json
from pathlib import Path

from offramp.evaluation import FULL, Evaluation, Record, read_records, summarise
from offramp.metrics.intervals import Bootstrap
from offramp.runs.results import RESULTS
from offramp.runs.tables import markdown


def records_of(folder: Path) -> dict[str, list[Record]]:
    """By arm."""
    found = [read_records(path)[1] for path in sorted((folder / "records").glob("*.jsonl"))]
    return {records[0].arm: records for records in found if records}


def comparison(folder: Path, baseline: Path) -> tuple[list[str], list[list[str]]]:
    """The head of a table and a row for every arm of both folders; quality in points of 100."""
    mine, theirs = records_of(folder), records_of(baseline)
    full = theirs[FULL]
    result = Evaluation.from_dict(json.loads((folder / RESULTS).read_text(encoding="utf-8")))
    bootstrap = Bootstrap([record.group for record in full])
    arms = {f"baseline's {name}": records for name, records in theirs.items() if records is not full} | mine
    rows = [["baseline", f"{100 * sum(r.scores[result.metric] for r in full) / len(full):.1f}", "", "1.000"]]
    for name, records in sorted(arms.items(), key=lambda arm: -sum(r.scores[result.metric] for r in arm[1])):
        arm = summarise(records, full, policy=None, num_layers=result.num_layers, bootstrap=bootstrap)
        gain, flops = arm.difference[result.metric], arm.flops_ratio
        limits = "" if gain.low is None else f" ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
        rows.append([
            name, f"{100 * arm.quality[result.metric].value:.1f}", f"{100 * gain.value:+.1f}{limits}",
            f"{flops.value:.3f}",
        ])  # fmt: skip
    return ["arm", result.metric, "minus the baseline's", "FLOPs (baseline = 1)"], rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare policies with the full model of another evaluation.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("baseline", type=Path)
    options = parser.parse_args()
    print(markdown(*comparison(options.folder, options.baseline)))


if __name__ == "__main__":
    main()

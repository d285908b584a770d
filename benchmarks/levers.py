"""Which lever moved what: pairs of arms of one evaluation that differ in one thing, on the same examples.

    python benchmarks/levers.py RUN "ARM|OTHER" ["ARM|OTHER" ...]

RUN is a folder of `offramp evaluate`; arms have the names of its tables. An interval that holds 0 (for ratios 1) shows
no difference.
"""

import argparse
import json
from pathlib import Path

from claims import READ_AS, compared, differences, records_of

from offramp.evaluation import Evaluation
from offramp.runs.results import RESULTS
from offramp.runs.tables import markdown


def levers(folder: Path, pairs: list[str]) -> tuple[list[str], list[list[str]]]:
    """The head of a table, and a row for every pair."""
    records = records_of(folder)
    evaluation = Evaluation.from_dict(json.loads((folder / RESULTS).read_text(encoding="utf-8")))
    metric = evaluation.metric.removesuffix(" (corpus)")  # of a sentence: a corpus score has no mean over examples
    rows = []
    for pair in pairs:
        names = pair.split("|")
        if len(names) != 2 or (unknown := set(names) - set(records)):
            found = "" if len(names) != 2 else f"; there is no {', '.join(sorted(unknown))}"
            raise SystemExit(f"{pair!r} is not two arms with | between them{found}; there are {', '.join(records)}")
        one, other = names
        rows.append([one, other, *differences(records[one], records[other], metric, evaluation.num_layers)])
    return ["arm", "against", *compared(metric)], rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare arms of an evaluation that differ in one thing.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("pairs", nargs="+", metavar="ARM|OTHER")
    options = parser.parse_args()
    print(markdown(*levers(options.folder, options.pairs)))
    print(f"\n{READ_AS}")


if __name__ == "__main__":
    main()

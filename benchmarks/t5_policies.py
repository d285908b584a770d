"""Write the policies of the translation study, one JSON file each: `offramp evaluate --policy` takes them.

    python benchmarks/t5_policies.py FOLDER

They test a T5 with trained exits after layers 2 to 4 of 6. `LEVERS` differ in one thing each: what is tested,
on which tokens, after which layers, and what becomes of skipped layers. `CLAIMS` are what "Early Exit LLMs" compares,
from two minimum exit layers on and after every layer from there, trained or not, so that JSD with candidates "all" has
some to choose from after each of its later exits.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from offramp.core.confidence import Contrast
from offramp.core.policy import ExitPolicy

THRESHOLD = 0.4  # the one that paid in the study before; of all measures, as in the source document
ALL = Contrast(candidates="all")
SOFTMAX = ExitPolicy("softmax", threshold=THRESHOLD, exit_layers=(2, 3, 4))
PRUNED = replace(SOFTMAX, vocabulary="frequent-fixed")
LEVERS = {
    "softmax": SOFTMAX,
    **{kind: replace(SOFTMAX, vocabulary=kind) for kind in ("fixed", "decaying", "adaptive", "frequent")},
    "frequent-fixed": PRUNED,
    "threshold-0.2": replace(PRUNED, threshold=0.2),
    "threshold-0.9": replace(PRUNED, threshold=0.9),
    "only-after-2": replace(PRUNED, vocabulary="frequent", exit_layers=(2,)),
    "only-after-3": replace(PRUNED, vocabulary="frequent", exit_layers=(3,)),
    "after-2-and-4": replace(PRUNED, exit_layers=(2, 4)),
    "classifier-0.5": replace(SOFTMAX, confidence="classifier", threshold=0.5),
    "classifier-0.9": replace(SOFTMAX, confidence="classifier", threshold=0.9),
    "contrastive": replace(SOFTMAX, confidence="contrastive"),
    "jsd-all": replace(SOFTMAX, confidence="jsd", contrast=ALL),
    "verify": replace(PRUNED, skipped="verify"),
    "verify-after-2": ExitPolicy("static", min_layer=2, vocabulary="frequent", skipped="verify", draft_length=3),
}
"""By name of file."""


def claims() -> dict[str, ExitPolicy]:
    """By name of file, at both minimum layers."""
    found = {}
    for first in (2, 3):
        base = replace(SOFTMAX, min_layer=first, exit_layers=tuple(range(first, 6)), contrast=ALL)
        for confidence in ("softmax", "contrastive", "jsd"):
            kinds = {"softmax": ("fixed", "decaying", "adaptive"), "jsd": ("fixed", "adaptive")}.get(confidence, ())
            for kind in (None, *kinds):
                name = "-".join(filter(None, (confidence, kind, f"from-{first}")))
                found[name] = replace(base, confidence=confidence, vocabulary=kind)
    return found


CLAIMS = claims()


def main() -> None:
    """Write them all."""
    parser = argparse.ArgumentParser(description="Write the policies of the translation study.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, policy in {**LEVERS, **CLAIMS}.items():
        policy.save(folder / f"{name}.json")


if __name__ == "__main__":
    main()

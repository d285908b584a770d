"""SHA-256 of what a fit has read, to see later that a chain of fits belongs together."""

from __future__ import annotations

from offramp.runs.digests import of
from offramp.uncertainty.outputs import ExitOutputs


def of_outputs(outputs: ExitOutputs) -> str:
    """Of all that exits say about a split."""
    groups = () if outputs.groups is None else (outputs.groups,)
    tensors = (*outputs.features, *outputs.logits, outputs.labels, outputs.costs, *groups)
    return of(list(outputs.ids), tensors)

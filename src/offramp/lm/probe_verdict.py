"""What a probe comes to, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping


def verdict(
    flops: Mapping[str, float], margins: Mapping[str, float], head: float, saturation: float, min_layer: int,
    depth: int, examples: int,
) -> str:  # fmt: skip
    """Whether a model is worth early exits, no surer than the margins (half 95 % intervals over examples) allow."""
    tests = f"after each of layers {min_layer}..{depth - 1}" if min_layer < depth - 1 else f"after layer {min_layer}"
    setting = (
        f"if every token left where its choice is settled (after {saturation:.1f} of {depth} layers on average), "
        f"with a test {tests},"
    )
    tested, pruned = flops["tested"], flops["pruned"]
    bound = "No rule knows where a choice is settled: `offramp evaluate` shows what one saves and loses."
    if tested + margins["tested"] < 1:
        also = f", {pruned:.0%} with a pruned vocabulary" if pruned < tested - 0.005 else ""
        sure = f"(at most {tested + margins['tested']:.0%}, by a 95 % interval over {examples} examples)"
        return f"Worth trying: {setting} it would cost {tested:.0%} {sure} of the full model's FLOPs{also}. {bound}"
    if pruned + margins["pruned"] < 1:
        sure = f"(at most {pruned + margins['pruned']:.0%}, by a 95 % interval over {examples} examples)"
        return (
            f"Worth trying with a pruned vocabulary: {setting} it would cost {pruned:.0%} {sure} of the full model's "
            f"FLOPs, but {tested:.0%} without, as one readout of the whole vocabulary costs as much as {head:.1f} "
            f"layers. {bound}"
        )
    if min(tested, pruned) < 1:
        return (
            f"Not shown: {setting} it would cost {min(tested, pruned):.0%} of the full model's FLOPs"
            f"{' (pruned)' if pruned < tested else ''}, which {examples} examples do not tell from 100%; "
            f"{_wanted(flops, margins, examples)} would."
        )
    reasons = []
    if saturation > 0.75 * depth:
        reasons.append("the final token is settled late")
    if flops["untested"] < 0.95:
        reasons.append(
            f"the tests eat the gain (one readout of the whole vocabulary costs as much as {head:.1f} layers)"
        )
    elif head >= 1:
        reasons.append(f"one readout of the whole vocabulary costs as much as {head:.1f} layers")
    cheaper = " (pruned)" if pruned < tested else ""
    return (
        f"Not suitable as is: {setting} it would cost {min(tested, pruned):.0%} of the full model's FLOPs{cheaper}; "
        f"{' and '.join(reasons) or 'the tests cost more than the skipped layers save'}. Remedies: train the exits, "
        "test fewer of them, prune the vocabulary, or let the deep layers verify the tokens, which keeps the output "
        'exact (skipped="verify").'
    )


def _wanted(flops: Mapping[str, float], margins: Mapping[str, float], examples: int) -> str:
    """About how many examples an interval would have to be of to end below the full model's cost."""
    if examples < 2:
        return "more"
    ratios = [(margins[name] / (1 - flops[name])) ** 2 for name in margins if flops[name] < 1]
    return f"about {math.ceil(1 + (examples - 1) * min(ratios)) + 1:,}"

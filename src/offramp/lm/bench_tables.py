"""A bench as Markdown tables: speed and cost, peers, where the time went, what pruning saved, and batch sizes."""

from __future__ import annotations

from collections.abc import Sequence

from offramp.core.costs import PARTS
from offramp.lm.bench_results import ArmResult, Bench, Saving, Spread
from offramp.runs.tables import cell, markdown


def bench_table(bench: Bench) -> str:
    """All that a bench has something for, conditions and notes below."""
    blocks = [_speed_table(bench), _time_table(bench.arms)]
    if bench.peers or bench.bandwidth:
        blocks.insert(0, _peer_table(bench))
    if bench.savings:
        blocks.append(_saving_table(bench.savings))
    return "\n\n".join([*blocks, bench.footing])


def _speed_table(bench: Bench) -> str:
    head = "arm|tokens/s|× generate (quartiles)|exit|same|identical|prefix|tests|seconds ×|seconds/token ×|FLOPs ×"
    return markdown([*head.split("|"), "FLOPs/token ×", "bytes ×"], [
        [
            arm.name, f"{arm.tokens_per_second.median:.1f}", str(arm.ratio), f"{arm.mean_exit_layer:.1f}",
            f"{arm.agreement:.0%}", f"{arm.identical:.0%}", f"{arm.common_prefix:.1f}", f"{arm.tests:.1f}",
            f"{bench.seconds_ratio(arm).median:.2f}", _times(arm.token_seconds),
            f"{arm.flops_ratio:.2f}", _times(arm.token_flops_ratio), f"{arm.bytes_ratio:.2f}",
        ]
        for arm in bench.arms
    ])  # fmt: skip


def _times(ratio: Spread | float | None) -> str:
    return cell(ratio.median if isinstance(ratio, Spread) else ratio, ".2f")


def sizes_table(benches: Sequence[Bench]) -> str:
    """Every arm at every batch size: beside `generate` and full depth at that size, and beside the first size."""
    head = (
        "rows|arm|tokens/s|× generate (quartiles)|exit|seconds × (quartiles)|FLOPs ×|bytes ×|step ×|of the plain read"
    )
    known = {arm.name: arm for arm in benches[0].arms}
    rows = []
    for bench in benches:
        for arm in bench.arms:
            share, alone = bench.of_the_probe(arm), known.get(arm.name)
            rows.append([
                str(bench.conditions["batch_size"]), arm.name, f"{arm.tokens_per_second.median:.1f}", str(arm.ratio),
                f"{arm.mean_exit_layer:.1f}", str(bench.seconds_ratio(arm)), f"{arm.flops_ratio:.2f}",
                f"{arm.bytes_ratio:.2f}", cell(bench.over(alone, arm).median if alone else None, ".2f"),
                cell(share.median if share else None, ".0%"),
            ])  # fmt: skip
    return "\n\n".join([markdown(head.split("|"), rows), benches[0].footing])


def _peer_table(bench: Bench) -> str:
    """Own arms and peers, fastest first, in what can be said of both."""
    fastest = bench.fastest_llama_cpp
    head = ["arm", "tokens/s", "× generate (quartiles)"]
    head += [f"× {fastest.name} (quartiles)"] if fastest else []
    same = "same as float32" if bench.is_compared_with_float32 else "same"
    head += ["first token ms", "seconds/token ×", same, "prefix"] + (["of the plain read"] if bench.bandwidth else [])
    rows = []
    for arm in sorted([*bench.arms, *bench.peers], key=lambda arm: -arm.tokens_per_second.median):
        first = cell(1000 * arm.first_token.median if arm.first_token else None, ".0f")
        row = [arm.name, f"{arm.tokens_per_second.median:.1f}", str(arm.ratio)]
        row += [str(bench.over(arm, fastest))] if fastest else []
        row += [first, _times(arm.token_seconds)]
        row += [f"{arm.exact_agreement:.0%}", f"{arm.exact_prefix:.1f}"]
        if bench.bandwidth:
            share = bench.of_the_probe(arm) if isinstance(arm, ArmResult) else None
            row.append(cell(share.median if share else None, ".0%"))
        rows.append(row)
    return markdown(head, rows)


def _time_table(arms: list[ArmResult]) -> str:
    parts = [p for p in (*PARTS, "other") if any(arm.shares.get(p, 0) > 0 for arm in arms)]
    rows = [[arm.name, *(f"{arm.shares[part]:.0%}" for part in parts)] for arm in arms if arm.shares]
    return markdown(["share of time", *(part.replace("_", " ") for part in parts)], rows)


def _saving_table(savings: list[Saving]) -> str:
    head = ["pruning saves (×)", "over", "tests", "confidence seconds", "its FLOPs", "source's count", "all seconds"]
    return markdown(head, [
        [
            s.pruned, s.unpruned, f"{s.tests:.2f}", str(s.seconds), f"{s.flops:.1f}", f"{s.draft_flops:.1f}",
            str(s.whole),
        ]
        for s in savings
    ])  # fmt: skip

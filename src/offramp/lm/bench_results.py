"""What a bench found: every arm beside the full model, as numbers, JSON and Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from offramp.core.costs import PARTS
from offramp.core.policy import ExitPolicy
from offramp.hub.pretrained import Rounded
from offramp.lm.bench_arms import COMPILED, FULL, REFERENCE, ArmResult, PeerResult, Saving, Spread, Timing
from offramp.runs.codec import encode
from offramp.runs.results import Shown
from offramp.runs.tables import cell, markdown


@dataclass(frozen=True)
class Bench(Shown):
    """The outcome of `run_bench`.

    Attributes:
        conditions: What was held fixed, and versions.
        arms: Results, the two full models first.
        order: order[round][batch]: names in the order in which they ran.
        peers: Results of other engines.
        left_out: Why arms, peers and engines could not be had or failed, by name.
        bandwidth: Bytes per second of a plain read, one number per round; empty without a probe.
        is_compared_with_float32: Whether `exact_agreement` is with the model in float32, not just with the reference.
    """

    conditions: dict[str, Any]
    arms: list[ArmResult]
    order: list[list[list[str]]]
    peers: list[PeerResult] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    bandwidth: tuple[float, ...] = ()
    is_compared_with_float32: bool = True

    def __repr__(self) -> str:
        rounds = len(self.arms[0].seconds)
        return f"Bench({len(self.arms)} arms and {len(self.peers)} peers in {rounds} rounds, × {REFERENCE})"

    def _rows(self) -> Iterable[Any]:
        """A row per arm, then per peer, with "seconds_ratio": see there."""
        values = self.to_dict()
        ratios = [encode(self.seconds_ratio(each)) for each in [*self.arms, *self.peers]]
        rows = [*values["arms"], *values["peers"]]
        return [{**row, "seconds_ratio": ratio} for row, ratio in zip(rows, ratios, strict=True)]

    def arm(self, name: str) -> ArmResult:
        """The result of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def fastest_llama_cpp(self) -> PeerResult | None:
        """The format of llama.cpp with the most tokens per second; None: it did not run."""
        formats = [peer for peer in self.peers if peer.name.startswith("llama.cpp")]
        return max(formats, key=lambda peer: peer.tokens_per_second.median, default=None)

    def over(self, arm: Timing, other: Timing) -> Spread:
        """Tokens per second of one over those of the other, in the same round."""
        return Spread.of(theirs / mine for mine, theirs in zip(arm.seconds, other.seconds, strict=True))

    def seconds_ratio(self, arm: Timing) -> Spread:
        """Seconds over those of the full model in our loop, in the same round: beside the ratio of FLOPs."""
        return self.over(self.arm(FULL), arm)

    def of_the_probe(self, arm: ArmResult) -> Spread | None:
        """Bytes per second that an arm read, as the ledger counts them, over those of the probe in the same round.

        Returns:
            The share; None without a probe, and in fewer bits, which the ledger counts as what they were made from.
        """
        rounded = any(form in self.conditions["dtype"] or arm.name.startswith(f"{form} ") for form in get_args(Rounded))
        if not self.bandwidth or rounded:
            return None
        tokens = sum(map(len, arm.exit_layers))
        return Spread.of(
            arm.bytes * tokens / seconds / reached for seconds, reached in zip(arm.seconds, self.bandwidth, strict=True)
        )

    @property
    def savings(self) -> list[Saving]:
        """Every pruned arm beside its unpruned twin, where both ran."""
        pairs = [(a, b) for a in self.arms for b in self.arms if a is not b and _is_pruned_twin(a.policy, b.policy)]
        return [_saving(pruned, unpruned) for pruned, unpruned in pairs]

    @property
    def notes(self) -> list[str]:
        """What to know before reading the numbers: arms that should give the full model's output and do not."""
        dtype = self.conditions["dtype"]
        exactly = dtype.startswith("float32")
        exact = [arm for arm in self.arms if arm.policy is None or arm.policy.is_lossless]
        differing = [
            f"{arm.name} differs from {REFERENCE} at {1 - arm.agreement:.1%} of the positions; in {dtype}, "
            + ("unless scores tie, that is a bug" if exactly and arm.name != COMPILED else "rounding can do that")
            for arm in exact
            if arm.agreement < 1
        ]
        return [*differing, *(f"{name} is left out: {reason}" for name, reason in self.left_out.items())]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without NaN and infinities."""
        fastest = self.fastest_llama_cpp
        arms = [
            {**vars(arm), "policy": policy_values(arm.policy), "of_the_probe": self.of_the_probe(arm)}
            for arm in self.arms
        ]
        timed = [
            {**values, "over_llama_cpp": fastest and self.over(each, fastest)}
            for each, values in zip([*self.arms, *self.peers], [*arms, *map(vars, self.peers)], strict=True)
        ]
        found: dict[str, Any] = encode({
            "schema": "offramp/bench/1",
            "conditions": self.conditions,
            "arms": timed[: len(arms)],
            "peers": timed[len(arms) :],
            "fastest_llama_cpp": fastest and fastest.name,
            "left_out": self.left_out,
            "bandwidth": self.bandwidth,
            "savings": self.savings,
            "order": self.order,
            "notes": self.notes,
        })  # fmt: skip
        return found

    @property
    def footing(self) -> str:
        """What stands below tables: conditions and notes."""
        conditions = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.conditions.items())
        if self.bandwidth:
            gigabytes = Spread.of(rate / 1e9 for rate in self.bandwidth)
            conditions += f", a plain read of the weights' size reaches {gigabytes} GB/s"
        made_of = [", ".join(f"{key} {value}" for key, value in peer.versions.items()) for peer in self.peers]
        for versions in dict.fromkeys(made_of):
            names = [peer.name for peer, own in zip(self.peers, made_of, strict=True) if own == versions]
            conditions += f"; {' and '.join(names)}: {versions}"
        return "\n\n".join([f"Conditions: {conditions}.", *(f"Note: {note}." for note in self.notes)])

    def table(self) -> str:
        """All that a bench has something for, conditions and notes below."""
        blocks = [_speed_table(self), _time_table(self.arms)]
        if self.peers or self.bandwidth:
            blocks.insert(0, _peer_table(self))
        if self.savings:
            blocks.append(_saving_table(self.savings))
        return "\n\n".join([*blocks, self.footing])


def script_of(policy: ExitPolicy) -> Any:
    """The `offramp.lm.scripted.Script` of a policy whose exits are prescribed; None for others."""
    return getattr(policy.confidence, "script", None)


def policy_values(policy: ExitPolicy | None) -> dict[str, Any] | None:
    """A policy as JSON values; a callable confidence by its name."""
    if policy is None:
        return None
    measure = policy.confidence
    if isinstance(measure, str):
        values = policy.to_dict()
    else:
        values = replace(policy, confidence="softmax").to_dict()
        values["confidence"] = getattr(measure, "__name__", type(measure).__name__)
        if script := script_of(policy):
            values["script"] = script.depths
    if isinstance(policy.threshold, tuple):
        values["threshold"] = [str(tau) if abs(tau) == float("inf") else tau for tau in policy.threshold]
    return values


def _is_pruned_twin(pruned: ExitPolicy | None, unpruned: ExitPolicy | None) -> bool:
    if pruned is None or unpruned is None or pruned.vocabulary is None or unpruned.vocabulary is not None:
        return False
    sizes: dict[str, Any] = {"vocabulary_size": None, "vocabulary_floor": None, "vocabulary_start": None}
    sizes |= {"vocabulary_shrink": unpruned.vocabulary_shrink, "vocabulary_recursive": unpruned.vocabulary_recursive}
    return replace(pruned, vocabulary=None, **sizes) == replace(unpruned, **sizes)


def _saving(pruned: ArmResult, unpruned: ArmResult) -> Saving:
    def over(name: str) -> float:
        divisor = getattr(pruned, name)
        return float(getattr(unpruned, name) / divisor) if divisor else 1.0

    pairs = zip(unpruned.confidence_seconds, pruned.confidence_seconds, strict=True)
    return Saving(
        pruned=pruned.name,
        unpruned=unpruned.name,
        tests=over("tests"),
        seconds=Spread.of(a / b for a, b in pairs),
        flops=over("confidence_flops"),
        draft_flops=over("draft_flops"),
        whole=Spread.of(a / b for a, b in zip(unpruned.seconds, pruned.seconds, strict=True)),
    )


# ---------------------------------------------------------------- tables


def _speed_table(bench: Bench) -> str:
    head = "arm|tokens/s|× generate (quartiles)|exit|same|identical|prefix|tests|seconds ×|seconds/token ×|FLOPs ×"
    columns = [*head.split("|"), "FLOPs/token ×", "bytes ×", "peak GB"]
    rows = [
        [
            arm.name, f"{arm.tokens_per_second.median:.1f}", str(arm.ratio), f"{arm.mean_exit_layer:.1f}",
            f"{arm.agreement:.0%}", f"{arm.identical:.0%}", f"{arm.common_prefix:.1f}", f"{arm.tests:.1f}",
            f"{bench.seconds_ratio(arm).median:.2f}", _times(arm.token_seconds),
            f"{arm.flops_ratio:.2f}", _times(arm.token_flops_ratio), f"{arm.bytes_ratio:.2f}", _gigabytes(arm.memory),
        ]
        for arm in bench.arms
    ]  # fmt: skip
    return _told(columns, [*rows, *_missing(bench, len(columns))])


def _missing(bench: Bench, width: int, *before: str) -> list[list[str]]:
    """Rows of what could not run; why stands below the table."""
    return [[*before, name, "left out", *["–"] * (width - len(before) - 2)] for name in bench.left_out]


def _told(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose last column is left out if it has nothing to say."""
    told = len(columns) - all(row[-1] == "–" for row in rows)
    return markdown(columns[:told], [row[:told] for row in rows])


def _gigabytes(count: int | None) -> str:
    return cell(None if count is None else count / 1e9, ".2f")


def _times(ratio: Spread | float | None) -> str:
    return cell(ratio.median if isinstance(ratio, Spread) else ratio, ".2f")


def sizes_table(benches: Sequence[Bench]) -> str:
    """Every arm at every batch size: beside `generate` and full depth at that size, and beside the first size."""
    head = (
        "rows|arm|tokens/s|× generate (quartiles)|exit|seconds × (quartiles)|seconds/token ×|FLOPs ×|bytes ×|step ×|"
        "of the plain read|peak GB"
    )
    known = {arm.name: arm for arm in benches[0].arms}
    rows = []
    for bench in benches:
        for arm in bench.arms:
            share, alone = bench.of_the_probe(arm), known.get(arm.name)
            rows.append([
                str(bench.conditions["batch_size"]), arm.name, f"{arm.tokens_per_second.median:.1f}", str(arm.ratio),
                f"{arm.mean_exit_layer:.1f}", str(bench.seconds_ratio(arm)), _times(arm.token_seconds),
                f"{arm.flops_ratio:.2f}", f"{arm.bytes_ratio:.2f}",
                cell(bench.over(alone, arm).median if alone else None, ".2f"),
                cell(share.median if share else None, ".0%"), _gigabytes(arm.memory),
            ])  # fmt: skip
        rows += _missing(bench, len(head.split("|")), str(bench.conditions["batch_size"]))
    notes = [f"Note: {size} together: {note}." for size, note in _further_notes(benches)]
    return "\n\n".join([_told(head.split("|"), rows), benches[0].footing, *notes])


def _further_notes(benches: Sequence[Bench]) -> Iterable[tuple[int, str]]:
    """What to know of the sizes behind the first, whose notes the footing has, where it is something new."""
    said = set(benches[0].notes)
    for bench in benches[1:]:
        yield from ((bench.conditions["batch_size"], note) for note in bench.notes if note not in said)


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

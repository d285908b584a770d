"""What a bench found: every arm beside the full model, as numbers, JSON and Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from offramp.core.policy import ExitPolicy
from offramp.runs.codec import encode

REFERENCE = "transformers generate"
"""The arm all ratios refer to: the model's own `generate`."""
FULL = "full depth (offramp)"
"""The arm that shows what our loop costs: all layers, no test."""
CONFIDENCE_PARTS = ("readout", "pruned_readout", "select", "confidence")
"""Parts of a generation that reading out and judging belong to, the readout of the emitted token included."""
Arms = Mapping[str, ExitPolicy | None]
"""Policies by the name of their row; None: the full model."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one number per round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value; quartiles interpolate between the values."""
        values = list(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True)
class Timing:
    """What is measured of anything that generates. Texts are of the first round (greedy rounds repeat each other).

    Attributes:
        name: Its name.
        seconds: Wall-clock time of each round, all prompts.
        tokens_per_second: Over whole generations, prompt and encoder included.
        ratio: Tokens per second over those of `REFERENCE` in the same round.
        first_token: Seconds until the first token of a batch is known; None: rounds of an earlier version.
        token_seconds: Seconds per token after the first over those of `FULL` in the same round; None: likewise, or
            there is no second token.
        agreement: Share of positions with the reference's token. After a first difference the two continue different
            texts, so this is a lower bound of how often the arm would have followed the full model.
        identical: Share of prompts with the very same output.
        common_prefix: Mean number of tokens before the first difference.
        exact_agreement: As `agreement`, with what the full model generates in float32. Without peers, and in float32,
            that is the reference.
        exact_prefix: As `common_prefix`, likewise.
    """

    name: str
    seconds: tuple[float, ...]
    tokens_per_second: Spread
    ratio: Spread
    first_token: Spread | None
    token_seconds: Spread | None
    agreement: float
    identical: float
    common_prefix: float
    exact_agreement: float
    exact_prefix: float


@dataclass(frozen=True)
class PeerResult(Timing):
    """What another engine did.

    Attributes:
        versions: Of the engine and what it rests on.
    """

    versions: dict[str, str]


@dataclass(frozen=True)
class ArmResult(Timing):
    """What one arm did. Counts are of the first round.

    Attributes:
        policy: Its policy; None: the full model.
        mean_exit_layer: Mean layer after which the tokens left.
        exit_layers: That layer of every token, per prompt.
        tests: Confidence tests per token.
        flops: FLOPs per token, prompt and encoder included.
        bytes: Bytes read per token, likewise.
        flops_ratio: FLOPs over those of the full model.
        token_flops_ratio: The same per generated token, without encoder and prompt; None: rounds of an earlier version,
            or there is no such token.
        bytes_ratio: Bytes over those of the full model.
        draft_flops: "FLOPs" per token as the source document counts them (see `Costs`).
        confidence_flops: FLOPs per token of `CONFIDENCE_PARTS`.
        confidence_seconds: Seconds of `CONFIDENCE_PARTS` in each round; empty for the reference.
        shares: Share of the time by part, and "other" (preparation, processors, bookkeeping); empty for the reference,
            whose inside is not timed and whose counts are those of `FULL`, which makes the same products.
    """

    policy: ExitPolicy | None
    mean_exit_layer: float
    exit_layers: list[list[int]]
    tests: float
    flops: float
    bytes: float
    flops_ratio: float
    token_flops_ratio: float | None
    bytes_ratio: float
    draft_flops: float
    confidence_flops: float
    confidence_seconds: tuple[float, ...]
    shares: dict[str, float]


@dataclass(frozen=True)
class Saving:
    """What pruning made of the confidence part of an arm (readout, selection and the measure itself).

    All are unpruned over pruned, per token: above 1 is a saving. Arms whose tokens left at different layers made
    different numbers of tests; only under a script are these equal.

    Attributes:
        pruned: Name of the arm that prunes.
        unpruned: Name of the arm that is the same in all else.
        tests: Tests made.
        seconds: Measured seconds, in the same round.
        flops: FLOPs, first (full) readout included.
        draft_flops: "FLOPs" by the source document's count, first readout left out.
        whole: Measured seconds of the whole generation, in the same round.
    """

    pruned: str
    unpruned: str
    tests: float
    seconds: Spread
    flops: float
    draft_flops: float
    whole: Spread


@dataclass(frozen=True)
class Bench:
    """The outcome of `run_bench`.

    Attributes:
        conditions: What was held fixed, and versions.
        arms: Results, the two full models first.
        order: order[round][batch]: names in the order in which they ran.
        peers: Results of other engines.
        left_out: Of those that could not be had or failed, why, by name.
        bandwidth: Bytes per second of a plain read, one number per round; empty without a probe.
    """

    conditions: dict[str, Any]
    arms: list[ArmResult]
    order: list[list[list[str]]]
    peers: list[PeerResult] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    bandwidth: tuple[float, ...] = ()

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
            The share; None without a probe, and in eight bits, which the ledger counts as what they were made from.
        """
        in_eight_bits = "int8" in self.conditions["dtype"] or arm.name.startswith("int8 ")
        if not self.bandwidth or in_eight_bits:
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
        cause = "unless scores tie, that is a bug" if dtype.startswith("float32") else "rounding can do that"
        exact = [arm for arm in self.arms if arm.policy is None or arm.policy.is_lossless]
        differing = [
            f"{arm.name} differs from {REFERENCE} at {1 - arm.agreement:.1%} of the positions; in {dtype}, {cause}"
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

    @property
    def is_compared_with_float32(self) -> bool:
        """Whether `exact_agreement` is with the model in float32, and not just with the reference."""
        return bool(self.peers or self.left_out) or self.conditions["dtype"].startswith("float32")


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

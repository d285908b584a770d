"""Rounds of a bench: what each arm did in one, a file to go on from, and what they add up to."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from offramp.core.costs import PARTS, Costs
from offramp.core.language_model import LanguageModel
from offramp.core.policy import ExitPolicy
from offramp.core.prefixes import common_prefix
from offramp.lm.bench_arms import CONFIDENCE_PARTS, FULL, REFERENCE, THEIRS, ArmResult, Arms, PeerResult, Spread
from offramp.lm.bench_results import Bench, policy_values
from offramp.peers import Answer
from offramp.runs.codec import decode
from offramp.runs.digests import fingerprint
from offramp.runs.resume import append_lines, open_lines

ROUNDS = "rounds.jsonl"
SCHEMA = "offramp/bench-rounds/1"
COUNTS = ("tests", "flops", "bytes", "draft_flops", "prompt_flops", "prompt_tokens", "confidence_flops")
Texts = list[list[int]]
"""Tokens of each prompt."""


@dataclass
class Turn:
    """One arm in one round, over all batches.

    Attributes:
        seconds: Wall-clock time.
        parts: Seconds by part of the generation.
        counts: Sums by `COUNTS`; of a model's own `generate` they stay 0. Earlier versions did not count the prompt's.
        tokens: Tokens of each prompt.
        layers: After which they left; of a peer there are none.
        first: Seconds until the first token of each batch.
        memory: As `Timing.memory`.
    """

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    tokens: list[list[int]] = field(default_factory=list)
    layers: list[list[int]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    memory: int | None = None

    def add(self, costs: Costs) -> None:
        """The costs of one batch."""
        for part, entry in costs.parts.items():
            self.parts[part] += entry.seconds
        for name in COUNTS[:-1]:
            self.counts[name] += getattr(costs, name)
        self.counts[COUNTS[-1]] += sum(costs.parts[part].flops for part in CONFIDENCE_PARTS)

    def add_answer(self, answer: Answer) -> None:
        """What a peer answered."""
        self.seconds += answer.seconds
        self.first.append(answer.first)
        self.tokens.append(answer.tokens)


@dataclass
class Round:
    """All prompts with all arms.

    Attributes:
        order: For each batch, the names of the arms in the order they ran.
        arms: What each did, peers included.
        bandwidth: Bytes per second that a plain read reached before each batch; empty without a probe.
    """

    order: list[list[str]]
    arms: dict[str, Turn]
    bandwidth: list[float] = field(default_factory=list)


def header_of(
    lm: LanguageModel, arms: Arms, batches: Sequence[Mapping[str, Tensor]], conditions: Mapping[str, Any],
    peers: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:  # fmt: skip
    """How rounds come about, as JSON values: all but their number, which may be asked for later."""
    content = [{name: tensor.tolist() for name, tensor in batch.items()} for batch in batches]
    return {
        "schema": SCHEMA,
        "weights": fingerprint(lm.model),
        "exits": None if lm.exits is None else fingerprint(lm.exits),
        "prompt_ids": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        "arms": {name: policy_values(policy) for name, policy in arms.items()},
        **({"peers": peers} if peers else {}),
        **{name: value for name, value in conditions.items() if name != "repeats"},
    }


def read_rounds(folder: Path, header: Mapping[str, Any]) -> list[Round]:
    """The finished rounds in a folder, where further ones may now be written.

    Args:
        folder: Folder of the run.
        header: From `header_of`.

    Returns:
        The rounds.

    Raises:
        ValueError: They are of another bench.
    """
    return [decode(Round, value) for value in open_lines(folder / ROUNDS, header, "rounds")]


def write_round(folder: Path, played: Round) -> None:
    """Add a finished round."""
    append_lines(folder / ROUNDS, [asdict(played)])


def summary(
    conditions: dict[str, Any],
    arms: Arms,
    versions: Mapping[str, dict[str, str]],
    lost: Mapping[str, str],
    rounds: Sequence[Round],
    exact: Texts | None = None,
) -> Bench:
    """What rounds say of every arm and peer.

    Args:
        conditions: What was held fixed.
        arms: Policies by name.
        versions: Versions of the peers that were started, by name.
        lost: Why arms and peers could not be had or failed, by name.
        rounds: The rounds.
        exact: What the full model generates in float32; None: that is what the reference generated.

    Returns:
        The results.
    """
    left_out = dict(lost)
    for name in (*arms, *versions):
        missing = sum(name not in played.arms for played in rounds)
        if missing and name not in left_out:
            left_out[name] = f"it failed in {missing} of {len(rounds)} rounds that were kept; use another folder"
    compared = exact is not None or conditions["dtype"].startswith("float32")
    exact = rounds[0].arms[REFERENCE].tokens if exact is None else exact
    there = [name for name in versions if name not in left_out]
    return Bench(
        conditions,
        [_result(arm, arms[arm], rounds, exact) for arm in arms if arm not in left_out],
        [played.order for played in rounds],
        [PeerResult(**_timing(name, rounds, exact), versions=versions[name]) for name in there],
        left_out,
        tuple(statistics.mean(played.bandwidth) for played in rounds if played.bandwidth),
        compared,
    )


def _timing(name: str, rounds: Sequence[Round], exact: Texts) -> dict[str, Any]:
    """The fields of `Timing`."""
    run, reference, full = ([played.arms[which] for played in rounds] for which in (name, REFERENCE, FULL))
    own, theirs = run[0].tokens, reference[0].tokens  # greedy rounds repeat each other
    tokens = sum(map(len, own))
    return {
        "name": name,
        "seconds": tuple(turn.seconds for turn in run),
        "tokens_per_second": Spread.of(tokens / turn.seconds for turn in run),
        "ratio": Spread.of(a.seconds / b.seconds for a, b in zip(reference, run, strict=True)),
        "first_token": Spread.of(statistics.mean(t.first) for t in run) if all(t.first for t in run) else None,
        "token_seconds": _token_seconds(run, full),
        "agreement": _same(own, theirs),
        "identical": statistics.mean(a == b for a, b in zip(own, theirs, strict=True)),
        "common_prefix": _prefix(own, theirs),
        "exact_agreement": _same(own, exact),
        "exact_prefix": _prefix(own, exact),
        "memory": max((turn.memory for turn in run if turn.memory is not None), default=None),
    }


def _result(arm: str, policy: ExitPolicy | None, rounds: Sequence[Round], exact: Texts) -> ArmResult:
    run, full = ([played.arms[name] for played in rounds] for name in (arm, FULL))
    counts, whole = (full if arm in THEIRS else run)[0].counts, full[0].counts
    tokens = sum(map(len, run[0].tokens))
    return ArmResult(
        **_timing(arm, rounds, exact),
        policy=policy,
        mean_exit_layer=statistics.mean(layer for row in run[0].layers for layer in row),
        exit_layers=run[0].layers,
        tests=counts["tests"] / tokens,
        flops=counts["flops"] / tokens,
        bytes=counts["bytes"] / tokens,
        flops_ratio=counts["flops"] / whole["flops"],
        token_flops_ratio=_token_flops(counts, whole, tokens),
        bytes_ratio=counts["bytes"] / whole["bytes"],
        draft_flops=counts["draft_flops"] / tokens,
        confidence_flops=counts["confidence_flops"] / tokens,
        confidence_seconds=() if arm in THEIRS else tuple(_confidence_seconds(turn) for turn in run),
        shares={} if arm in THEIRS else _shares(run),
    )


def _token_seconds(run: Sequence[Turn], full: Sequence[Turn]) -> Spread | None:
    """Seconds per token behind the first tokens, over the full model's in the same round."""
    pairs = [(_per_later_token(a), _per_later_token(b)) for a, b in zip(run, full, strict=True)]
    found = [a / b for a, b in pairs if a is not None and b]
    return Spread.of(found) if len(found) == len(pairs) else None


def _per_later_token(turn: Turn) -> float | None:
    later = sum(len(row) - 1 for row in turn.tokens)
    return (turn.seconds - sum(turn.first)) / later if turn.first and later else None


def _token_flops(counts: Mapping[str, int], whole: Mapping[str, int], tokens: int) -> float | None:
    """FLOPs without encoder and prompt over the full model's; all arms generate as many tokens."""
    if "prompt_flops" not in counts or "prompt_flops" not in whole or tokens == whole["prompt_tokens"]:
        return None
    return (counts["flops"] - counts["prompt_flops"]) / (whole["flops"] - whole["prompt_flops"])


def _same(own: Texts, theirs: Texts) -> float:
    """Share of positions with the same token."""
    pairs = [pair for a, b in zip(own, theirs, strict=True) for pair in zip(a, b, strict=False)]
    return sum(a == b for a, b in pairs) / sum(map(len, theirs))


def _prefix(own: Texts, theirs: Texts) -> float:
    """Mean number of tokens before the first difference."""
    return statistics.mean(common_prefix(a, b) for a, b in zip(own, theirs, strict=True))


def _confidence_seconds(turn: Turn) -> float:
    return sum(turn.parts[part] for part in CONFIDENCE_PARTS)


def _shares(run: Sequence[Turn]) -> dict[str, float]:
    whole = sum(turn.seconds for turn in run)
    shares = {part: sum(turn.parts[part] for turn in run) / whole for part in PARTS}
    return {**shares, "other": max(0.0, 1 - sum(shares.values()))}

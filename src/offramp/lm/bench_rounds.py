"""Rounds of a bench: what one arm did in one of them, and a file that an interrupted bench goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from offramp.core.costs import PARTS, Costs
from offramp.core.language_model import LanguageModel
from offramp.lm.bench_arms import CONFIDENCE_PARTS, Arms
from offramp.lm.bench_results import policy_values
from offramp.peers import Answer
from offramp.runs.codec import decode
from offramp.runs.digests import fingerprint
from offramp.runs.lines import append_lines, open_lines

ROUNDS = "rounds.jsonl"
SCHEMA = "offramp/bench-rounds/1"
COUNTS = ("tests", "flops", "bytes", "draft_flops", "prompt_flops", "prompt_tokens", "confidence_flops")


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

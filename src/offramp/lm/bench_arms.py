"""What a bench measures: what it calls its full models, and the figures of an arm and of a peer."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from offramp.core.policy import ExitPolicy

REFERENCE = "transformers generate"
"""The arm all ratios refer to: the model's own `generate`."""
COMPILED = "transformers compiled"
"""The same with a static cache and `torch.compile`."""
THEIRS = (REFERENCE, COMPILED)
"""The arms that our loop has no part in."""
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
        memory: Most bytes of tensors on the device: the weights, what this engine keeps between turns (caches, graphs'
            buffers) and the most of a turn. None: not on a CUDA device, a peer, or rounds of an earlier version.
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
    memory: int | None


@dataclass(frozen=True)
class PeerResult(Timing):
    """What another engine did.

    Attributes:
        versions: Versions of the engine and what it rests on.
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
        confidence_seconds: Seconds of `CONFIDENCE_PARTS` in each round; empty for `THEIRS`.
        shares: Share of the time by part, and "other" (preparation, processors, bookkeeping); empty for `THEIRS`,
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

"""What the records of an arm add up to, beside those of the full model: quality, agreement, depth and costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from offramp.evaluation.perplexity import PERPLEXITY as PERPLEXITY
from offramp.evaluation.record_file import Record
from offramp.evaluation.records import PREFILL
from offramp.metrics.intervals import Bootstrap, Floats, Interval, quotient
from offramp.metrics.text import corpus_metric

CORPUS = ("bleu", "chrf")
"""Metrics with a score of a whole corpus, in 0..100."""


@dataclass(frozen=True)
class ArmSummary:
    """One arm, over all examples, beside the full model over the same ones.

    Ratios are of sums over all examples. Intervals are those of the cluster bootstrap (`offramp.metrics.intervals`).

    Attributes:
        name: Of the arm.
        policy: Its policy as JSON values; None: the full model.
        quality: Mean of each per-sample metric, in [0, 1]; corpus scores, "bleu (corpus)" and the like, in 0..100;
            "perplexity" from 1.
        difference: The same, minus that of the full model.
        agreement: Share of positions with the full model's token, mean over the examples.
        identical: Share of examples with the full model's very answer.
        exit_layer: Mean over all tokens.
        length: Mean tokens of an answer.
        flops_ratio: FLOPs of all parts, encoder and prompt included, over the full model's.
        decode_flops_ratio: Without the encoder and the pass over the prompt.
        bytes_ratio: Bytes over the full model's.
        seconds_ratio: Seconds over the full model's, over the examples at which the two took turns. None: they did so
            at fewer than half, and their seconds do not compare.
        flops: FLOPs per example.
        seconds: Seconds per example.
        parts: FLOPs by part, as shares of the full model's whole.
        histogram: Tokens by exit layer, 1..L; where a drafter drafted, 0..L.
        outside: Share of the text's tokens that pruning had excluded; perplexity only.
        flops_per_token_ratio: FLOPs per generated token, encoder and the prompt's pass (and so the token read off it)
            left out of both, over the full model's: what exits do, however long prompts and answers are. None: one of
            the two generated no such token, or it was not recorded apart.
        seconds_per_token_ratio: The same of seconds, over the examples that `seconds_ratio` is of. None: as for both.
        own_flops_per_token_ratio: FLOPs per generated token over those of the same prompt without any exits: of
            policies whose prompts stop early, where an arm that has nothing else was run (see
            `offramp.evaluation.arms.baselines`); None of others.
        own_seconds_per_token_ratio: The same of seconds, where the two took turns.
    """

    name: str
    policy: dict[str, Any] | None
    quality: dict[str, Interval]
    difference: dict[str, Interval]
    agreement: Interval
    identical: Interval
    exit_layer: Interval
    length: Interval
    flops_ratio: Interval
    decode_flops_ratio: Interval
    bytes_ratio: Interval
    seconds_ratio: Interval | None
    flops: float
    seconds: float
    parts: dict[str, float]
    histogram: list[int]
    outside: float | None = None
    flops_per_token_ratio: Interval | None = None
    seconds_per_token_ratio: Interval | None = None
    own_flops_per_token_ratio: Interval | None = None
    own_seconds_per_token_ratio: Interval | None = None

    @property
    def is_static(self) -> bool:
        """Whether every token leaves after the same layer, as the full model's do: no policy that tests any."""
        return self.policy is None or self.policy["confidence"] == "static" or self.policy["threshold"] is None


def summarise(
    records: Sequence[Record],
    full: Sequence[Record],
    *,
    policy: Mapping[str, Any] | None,
    num_layers: int,
    bootstrap: Bootstrap,
    references: Sequence[Sequence[str]] | None = None,
    same_prompt: Sequence[Record] | None = None,
) -> ArmSummary:
    """Add up one arm beside the full model, and where its prompt is shortened beside that prompt without exits."""
    if [r.id for r in records] != [r.id for r in full] or len(records) != len(bootstrap.index):
        raise ValueError("the arm's records and the full model's are of different examples; summarise the same ones")
    quality, difference = _quality(records, full, bootstrap, references)
    tokens = [float(len(r.tokens)) for r in records]
    whole = sum(r.flops for r in full)
    layers = np.bincount([layer for r in records for layer in r.exit_layers], minlength=num_layers + 1)

    def over(name: str) -> Interval:
        return bootstrap.ratio([getattr(r, name) for r in records], [getattr(r, name) for r in full])

    return ArmSummary(
        name=records[0].arm,
        policy=None if policy is None else dict(policy),
        quality=quality,
        difference=difference,
        agreement=bootstrap.mean([r.agreement for r in records]),
        identical=bootstrap.mean([float(r.same) for r in records]),
        exit_layer=bootstrap.ratio([float(sum(r.exit_layers)) for r in records], tokens),
        length=bootstrap.mean(tokens),
        flops_ratio=over("flops"),
        decode_flops_ratio=bootstrap.ratio(list(map(later_flops, records)), list(map(later_flops, full))),
        bytes_ratio=over("bytes"),
        seconds_ratio=_seconds(records, full, bootstrap),
        flops=sum(r.flops for r in records) / len(records),
        seconds=sum(r.seconds for r in records) / len(records),
        parts={part: sum(r.parts[part] for r in records) / whole for part in records[0].parts},
        histogram=layers[0 if layers[0] else 1 :].tolist(),
        outside=sum(r.sums["outside"] for r in records) / sum(tokens) if "outside" in records[0].sums else None,
        flops_per_token_ratio=_per_token(records, full, bootstrap, later_flops),
        seconds_per_token_ratio=_seconds_per_token(records, full, bootstrap),
        **_own(records, same_prompt, bootstrap),
    )


# ---------------------------------------------------------------- costs


def later_flops(record: Record) -> float:
    """FLOPs without the encoder and the pass over the prompt."""
    return float(record.flops - record.parts["encoder"] - record.parts[PREFILL])


def later_seconds(record: Record) -> float:
    """Seconds without preparation, encoder and the pass over the prompt; all of them in an earlier version's record."""
    return record.seconds - (record.prompt_seconds or 0.0)


def later_tokens(record: Record) -> int:
    """Tokens that have a pass of their own: all but the one that is read off the prompt's, where that has one."""
    return len(record.tokens) - (record.parts[PREFILL] > 0)


def _per_token(
    records: Sequence[Record], full: Sequence[Record], bootstrap: Bootstrap, cost: Callable[[Record], float],
    counted: Sequence[bool] | None = None,
) -> Interval | None:  # fmt: skip
    """A cost without the prompt's, per token with a pass of its own, over the full model's; None: there is no such."""
    counted = [True] * len(records) if counted is None else counted
    columns = np.array([
        [used * value for r in pair for value in (cost(r), later_tokens(r))]
        for used, pair in zip(counted, zip(records, full, strict=True), strict=True)
    ])  # fmt: skip
    if not columns[:, 1].any() or not columns[:, 2:].any(axis=0).all():
        return None

    def ratio(sums: Floats) -> Floats:
        return quotient(sums[:, 0] * sums[:, 3], sums[:, 1] * sums[:, 2])

    return bootstrap.estimate(columns, ratio)


def _own(
    records: Sequence[Record], same_prompt: Sequence[Record] | None, bootstrap: Bootstrap
) -> dict[str, Interval | None]:  # fmt: skip
    if same_prompt is None:
        return {}
    return {
        "own_flops_per_token_ratio": _per_token(records, same_prompt, bootstrap, later_flops),
        "own_seconds_per_token_ratio": _seconds_per_token(records, same_prompt, bootstrap),
    }


def turns(records: Sequence[Record], full: Sequence[Record]) -> list[bool] | None:
    """At which examples the two took turns; None: at fewer than half."""
    found = [a.round is not None and a.round == b.round for a, b in zip(records, full, strict=True)]
    return found if 2 * sum(found) >= len(found) else None


def _seconds(records: Sequence[Record], full: Sequence[Record], bootstrap: Bootstrap) -> Interval | None:
    used = turns(records, full)
    if used is None:
        return None
    return bootstrap.ratio(*([some * r.seconds for some, r in zip(used, rs, strict=True)] for rs in (records, full)))


def _seconds_per_token(records: Sequence[Record], full: Sequence[Record], bootstrap: Bootstrap) -> Interval | None:
    used = turns(records, full)
    if used is None or any(r.prompt_seconds is None for rs in (records, full) for r in rs):
        return None
    return _per_token(records, full, bootstrap, later_seconds, used)


# ---------------------------------------------------------------- quality


def _quality(
    records: Sequence[Record], full: Sequence[Record], bootstrap: Bootstrap, references: Sequence[Sequence[str]] | None
) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Estimates by metric, and their differences from the full model's."""
    quality, difference = {}, {}
    for name in records[0].scores:
        mine, theirs = ([r.scores[name] for r in rs] for rs in (records, full))
        quality[name] = bootstrap.mean(mine)
        difference[name] = bootstrap.mean([a - b for a, b in zip(mine, theirs, strict=True)])
    if "nats" in records[0].sums:
        columns = [_nats(records), _nats(full)]
        quality[PERPLEXITY], difference[PERPLEXITY] = _compared(bootstrap, columns, _perplexity)
    for name in CORPUS if references is not None else ():
        if name in records[0].scores:
            assert references is not None
            metric = corpus_metric(name, references)
            columns = [_corpus_columns(metric, [r.text for r in rs], references) for rs in (records, full)]
            found = _compared(bootstrap, columns, partial(_corpus_scores, metric))
            quality[f"{name} (corpus)"], difference[f"{name} (corpus)"] = found
    return quality, difference


def _compared(bootstrap: Bootstrap, columns: Sequence[Floats], statistic: Any) -> tuple[Interval, Interval]:
    """An arm's statistic, and its difference from the full model's, of columns [N, K] of both."""
    width = columns[0].shape[1]
    both = np.hstack(columns)
    return (
        bootstrap.estimate(columns[0], statistic),
        bootstrap.estimate(both, lambda sums: statistic(sums[:, :width]) - statistic(sums[:, width:])),
    )


def _nats(records: Sequence[Record]) -> Floats:
    return np.array([[r.sums["nats"], len(r.tokens)] for r in records])


def _perplexity(sums: Floats) -> Floats:
    values: Floats = np.exp(sums[:, 0] / sums[:, 1])
    return values


def _corpus_columns(metric: Any, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """What a corpus score is computed from, by segment, [N, K]."""
    # Not public, but what sacrebleu's own bootstrap does: a corpus score is a function of sums over the segments.
    streams = list(zip_longest(*references))  # the first references of all, the second, …
    return np.array(metric._extract_corpus_statistics(list(texts), streams), dtype=np.float64)


def _corpus_scores(metric: Any, sums: Floats) -> Floats:
    """Corpus scores of sums [R, K] of such columns, [R], in 0..100."""
    rows = sums.round().astype(int).tolist()  # sums of counts; not public either
    return np.array([metric._compute_score_from_stats(row).score for row in rows])

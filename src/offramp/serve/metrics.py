"""What the server has done, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

if TYPE_CHECKING:
    from offramp.serve.answer import Answer, Finished

__all__ = ["CONTENT_TYPE", "Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server, in a registry of its own.

    FLOPs spent are all that the batch did, comparisons and answers that nobody waited for included; those of the full
    model are for the same prompts, without what was kept of them, and as many tokens, comparisons left out. What is
    saved is their difference, and may be less than nothing.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "offramp_requests", "Requests by path and status.", ("path", "status"), registry=registry
        )
        self.refused = Counter("offramp_refused", "Requests refused because too many wait.", registry=registry)
        self.cancelled = Counter("offramp_cancelled", "Answers whose clients left.", registry=registry)
        self.failed = Counter("offramp_failed", "Answers that ended with an error.", registry=registry)
        self._answers = Counter("offramp_answers", "Answers by why they ended.", ("reason",), registry=registry)
        self._prompt = Counter("offramp_prompt_tokens", "Tokens of prompts that were answered.", registry=registry)
        self._cached = Counter(
            "offramp_cached_prompt_tokens", "Of these, tokens that were not computed: their keys and values were kept.",
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter(
            "offramp_tokens", "Generated tokens by exit layer; 0: drafted before the first block, and right.",
            ("exit_layer",), registry=registry,
        )  # fmt: skip
        self._first = Histogram(
            "offramp_time_to_first_token_seconds", "From a request's arrival on.", buckets=_SECONDS, registry=registry
        )
        self._whole = Histogram(
            "offramp_answer_seconds", "From a request's arrival to an answer's end.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._step = Histogram("offramp_step_seconds", "Of one step of the batch.", buckets=_SECONDS, registry=registry)
        self._rows = Histogram(
            "offramp_step_rows", "Rows at work in a step.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self._flops = Counter(
            "offramp_flops", "FLOPs: spent; full: the full model's for the same answers; checks: spent on comparisons.",
            ("kind",), registry=registry,
        )  # fmt: skip
        self._spent, self._full = self._flops.labels("spent"), self._flops.labels("full")
        self._checks = self._flops.labels("checks")
        saved = Gauge("offramp_flops_saved", "FLOPs full less spent, comparisons left out.", registry=registry)
        saved.set_function(lambda: self._sum(self._full) + self._sum(self._checks) - self._sum(self._spent))
        self._compared = Counter(
            "offramp_compared_tokens", "Tokens compared with full depth's at their place.", ("agree",),
            registry=registry,
        )  # fmt: skip
        self._same = Counter(
            "offramp_compared_answers", "Answers compared with full depth's.", ("same",), registry=registry
        )
        self.checks_skipped = Counter(
            "offramp_checks_skipped", "Answers drawn for comparison while too many waited for it.", registry=registry
        )
        self.limit = Gauge(
            "offramp_loss_lower_limit", "What the mean loss is above, at all times, at the promise's confidence.",
            registry=registry,
        )  # fmt: skip
        self.broken = Gauge("offramp_promise_broken", "1: the promise is refuted.", registry=registry)

    def follow(self, active: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Ask these for how many are at work and in line."""
        Gauge("offramp_active", "Rows at work.", registry=self.registry).set_function(active)
        Gauge("offramp_waiting", "Answers waiting for a row.", registry=self.registry).set_function(waiting)

    def text(self) -> bytes:
        """All of it, in the format that Prometheus reads."""
        return generate_latest(self.registry)

    @staticmethod
    def _sum(counter: Counter) -> float:
        return sum(
            sample.value for metric in counter.collect() for sample in metric.samples if sample.name.endswith("_total")
        )

    # ------------------------------------------------------------ from the thread of the batch

    def step(self, flops: int, seconds: float, rows: int) -> None:
        """One step of the batch."""
        self._spent.inc(flops)
        self._step.observe(seconds)
        self._rows.observe(rows)

    def token(self, layer: int) -> None:
        """One token for a client."""
        self._tokens.labels(layer).inc()

    def first_token(self, seconds: float) -> None:
        """How long a client waited for something to read."""
        self._first.observe(seconds)

    def left(self, full_flops: int) -> None:
        """What an answer that its client left behind would have cost at full depth."""
        self._full.inc(full_flops)

    def checked(self, flops: float) -> None:
        """What a comparison cost."""
        self._checks.inc(flops)

    def answered(self, answer: Answer, end: Finished) -> None:
        """One answer for a client, whole."""
        self._answers.labels(end.reason).inc()
        self._prompt.inc(len(answer.asked.ids))
        self._cached.inc(answer.cached)
        self._full.inc(end.full_flops)
        self._whole.observe(end.seconds)

    def compared(self, early: Sequence[int], full: Sequence[int]) -> None:
        """One answer, and full depth's."""
        agree = sum(a == b for a, b in zip(early, full, strict=False))
        self._compared.labels("yes").inc(agree)
        self._compared.labels("no").inc(max(len(early), len(full)) - agree)
        self._same.labels("yes" if list(early) == list(full) else "no").inc()

"""What is served: a model, its policy and promise, and the engine that answers, without any HTTP."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offramp.core.plan import resolve
from offramp.core.running import RunningBatch
from offramp.core.sampling import ends_of
from offramp.serve.answer import FullDepth
from offramp.serve.engine import Engine
from offramp.serve.metrics import Metrics
from offramp.serve.preparing import Preparing
from offramp.serve.promise import Standing, Watch

if TYPE_CHECKING:
    from offramp.calibration.certificate import Certificate
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy

_USUAL = 256
"""Most new tokens where neither a request nor a certificate says so."""


@dataclass(frozen=True)
class Limits:
    """What the server allows.

    Attributes:
        rows: Answers at work at once.
        longest: Most tokens of a prompt and its answer.
        kept: Most tokens of earlier prompts and answers whose keys and values are kept for prompts that begin alike;
            None: a quarter of what the rows may hold where that changes no bit of an answer (the native engine), else
            none.
        waiting: Answers that may wait for a row.
        body: Most bytes of a request.
        timeout: Seconds until an answer must be finished, the wait for a row included.
        reading: Seconds within which a request's body must have come.
        key: What requests must bring; None: nothing.
        local: Whether only the machine itself is listened to, and other names for it are refused.
    """

    rows: int = 8
    longest: int = 2048
    kept: int | None = None
    waiting: int = 64
    body: int = 2**20
    timeout: float = 600.0
    reading: float = 30.0
    key: str | None = None
    local: bool = True


class Serving:
    """A model being served.

    Args:
        lm: The model; decoder-only, with a tokenizer.
        policy: The exit policy of requests that say nothing else; None: full depth.
        certificate: Of the policy's file.
        name: What clients call the model; None: as it calls itself.
        limits: What is allowed.
        check: Share of greedy answers that are compared with full depth's, in [0, 1].
        to_full: Go to full depth for good when they break the promise.
        batch: Makes the running batch; None: one of `limits.rows` rows.
        seed: Of the draw of answers that are compared.
    """

    def __init__(
        self,
        lm: LanguageModel,
        policy: ExitPolicy | None = None,
        certificate: Certificate | None = None,
        *,
        name: str | None = None,
        limits: Limits | None = None,
        check: float = 0.0,
        to_full: bool = False,
        batch: Callable[[], RunningBatch] | None = None,
        seed: int | None = None,
    ) -> None:
        self.lm, self.policy, self.limits = lm, policy, limits or Limits()
        self.name = lm.name if name is None else name
        self.promised, self.metrics = Standing(lm, policy, certificate), Metrics()
        share = 0.0 if policy is None else check
        self.watch = Watch(self.promised, self.metrics, share=share, to_full=to_full, draw=random.Random(seed))
        longest = self.limits.longest
        self.usual = min(self.promised.most_new_tokens or _USUAL, longest - 1)
        self.prepare = Preparing(lm, policy, name=self.name, longest=longest, usual=self.usual)
        self.engine = Engine(
            batch or self._batch, FullDepth(lm.split.shape, longest), self.metrics, self.watch,
            most_waiting=self.limits.waiting, timeout=self.limits.timeout,
        )  # fmt: skip
        self.metrics.follow(lambda: self.engine.active, lambda: self.engine.waiting)
        self.began = int(time.time())

    @property
    def kept(self) -> int:
        """Most tokens of earlier prompts and answers that are kept."""
        limits = self.limits
        if limits.kept is not None:
            return limits.kept
        return limits.rows * limits.longest // 4 if self.lm.decoder.exact else 0

    def _batch(self) -> RunningBatch:
        limits, ends = self.limits, ends_of(self.lm.model.generation_config)
        return RunningBatch(
            self.lm.decoder, self.policy, rows=limits.rows, longest=limits.longest, eos=ends, keep=self.kept
        )

    @property
    def exit_layers(self) -> list[int]:
        """After which the policy tests."""
        if self.policy is None:
            return []
        lm = self.lm
        return sorted(resolve(self.policy, lm.num_layers, lm.vocabulary, lm.split.exit_layers).thresholds)

    def notes(self) -> list[str]:
        """What whoever starts the server should know, in lines."""
        lines = [self.promised.statement]
        if self.promised.certificate is not None:
            lines += [f"certificate does not apply: {reason}" for reason in self.promised.against_all]
            if not self.promised.testable:
                lines.append(f"the promise cannot be tested here: {self.promised.untestable}")
        return lines

    def text_of(self, ids: list[int]) -> str:
        """Tokens as text, special ones left out."""
        return self.lm.decode([ids])[0]

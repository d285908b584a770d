"""What is served: a model, its policy and promise, what it makes of requests, and the engine; without any HTTP."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from offramp.core.plan import resolve
from offramp.core.running import OWN, Asked, RunningBatch
from offramp.core.sampling import ends_of
from offramp.serve.answer import FullDepth
from offramp.serve.engine import Engine
from offramp.serve.metrics import Metrics
from offramp.serve.promise import Standing, Watch
from offramp.serve.requests import ApiError

if TYPE_CHECKING:
    from offramp.calibration.certificate import Certificate
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy
    from offramp.serve.requests import Wanted


# ---------------------------------------------------------------- from a request to what the batch is asked for


@dataclass(frozen=True)
class Ready:
    """What the batch is asked for by one request.

    Attributes:
        asked: One for each answer, prompt by prompt.
        prompt_tokens: Of all prompts, each counted once.
        settings: Options in effect that change answers, for a certificate.
    """

    asked: list[Asked]
    prompt_tokens: int
    settings: dict[str, Any]


class Preparing:
    """Prepares requests. Not for several threads at once: tokenizers and `transformers`' `generate` are not.

    Args:
        lm: The model.
        policy: The policy; None: the full model.
        name: What the model is called.
        longest: Most tokens of a prompt and its answer.
        usual: Most new tokens where a request does not say.
    """

    def __init__(self, lm: LanguageModel, policy: ExitPolicy | None, *, name: str, longest: int, usual: int) -> None:
        self._lm, self._policy, self._name = lm, policy, name
        self._longest, self._usual = longest, usual

    def __call__(self, wanted: Wanted) -> Ready:
        """Prepare a request.

        Returns:
            What the batch is asked for.

        Raises:
            ApiError: The model is another, the prompt is empty or too long, or an option does not fit the model.
        """
        if wanted.model not in (None, self._name):
            raise ApiError(
                404, f"the model {wanted.model!r:.80} does not exist; there is {self._name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip
        self._check_threshold(wanted)
        try:
            return self._prepare(wanted)
        except ValueError as error:
            raise ApiError(400, " ".join(str(error).split()), code="invalid_value") from None

    def _check_threshold(self, wanted: Wanted) -> None:
        """Refuse a threshold of the request's own where none is tested."""
        if wanted.threshold in (OWN, None):
            return
        if self._policy is None or self._policy.threshold is None or self._policy.confidence == "static":
            raise ApiError(
                400, "the server's policy tests no threshold; leave it out", param="offramp.threshold",
                code="invalid_value",
            )  # fmt: skip

    def _prepare(self, wanted: Wanted) -> Ready:
        prompts = [self._ids(wanted, prompt) for prompt in wanted.prompts]
        news = [self._room(wanted, len(ids)) for ids in prompts]
        rows = [(ids, new) for ids, new in zip(prompts, news, strict=True) for _ in range(wanted.n)]
        asked = [self._asked(wanted, ids, new, index) for index, (ids, new) in enumerate(rows)]
        return Ready(asked, sum(map(len, prompts)), self._settings(wanted, max(news)))

    def _ids(self, wanted: Wanted, prompt: Any) -> list[int]:
        """Tokens of one prompt; messages go through the chat template."""
        if wanted.chat and not self._lm.has_chat_template:
            raise ApiError(
                400, "the model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
            )
        from jinja2 import TemplateError

        try:
            ids: list[int] = self._lm.encode([prompt])["input_ids"][0].tolist()
        except TemplateError as error:
            raise ApiError(
                400, f"the model's chat template refuses these messages: {' '.join(str(error).split()):.200}",
                param="messages", code="invalid_value",
            ) from None  # fmt: skip
        return ids

    def _room(self, wanted: Wanted, prompt: int) -> int:
        """Most new tokens behind a prompt of so many."""
        room = self._longest - prompt
        new = min(self._usual, room) if wanted.max_tokens is None else wanted.max_tokens
        if new < 1 or new > room:
            more = "" if wanted.max_tokens is None else f" and max_tokens is {wanted.max_tokens}"
            raise ApiError(
                400,
                f"the prompt has {prompt} tokens{more}, but prompt and answer may have {self._longest} together; "
                f"{'shorten the prompt' if room < 1 else 'shorten it, or lower max_tokens'}",
                param="messages" if wanted.chat else "prompt", code="context_length_exceeded",
            )  # fmt: skip
        return new

    def _asked(self, wanted: Wanted, ids: list[int], new: int, index: int) -> Asked:
        options: dict[str, Any] = {**wanted.sampling, "max_new_tokens": new}
        seed = options.pop("seed", None)
        options["seed"] = (seed + index) % 2**63 if seed is not None else secrets.randbits(62)
        if wanted.bias:
            if strange := [token for token in wanted.bias if token >= self._lm.vocabulary]:
                raise ApiError(
                    400, f"logit_bias has the token id {strange[0]}; the model's are 0..{self._lm.vocabulary - 1}",
                    param="logit_bias", code="invalid_value",
                )  # fmt: skip
            options["sequence_bias"] = [[[token], value] for token, value in wanted.bias.items()]
        if wanted.presence or wanted.frequency:
            options["logits_processor"] = [Penalties(len(ids), wanted.presence, wanted.frequency)]
        return Asked(ids, new, self._lm.sampler(ids, **options), wanted.threshold, wanted.top, wanted.recall)

    @staticmethod
    def _settings(wanted: Wanted, new: int) -> dict[str, Any]:
        """In effect, greedy ones left out, as certificates have them."""
        sampling = {name: value for name, value in wanted.sampling.items() if name not in ("do_sample", "seed")}
        more: dict[str, Any] = {
            "stop_strings": list(wanted.stop), "sequence_bias": wanted.bias, "presence_penalty": wanted.presence,
            "frequency_penalty": wanted.frequency,
        }  # fmt: skip
        return {"max_new_tokens": new, **sampling, **{name: value for name, value in more.items() if value}}


@dataclass(frozen=True)
class Penalties:
    """A logits processor: score - frequency · times - presence · [times > 0], by the answer's tokens so far.

    Attributes:
        prompt: Tokens of the prompt, which do not count.
        presence: Taken once.
        frequency: Taken for each time.
    """

    prompt: int
    presence: float
    frequency: float

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] of the next token, less the penalties for those behind the prompt in ids [B, T]."""
        answer = ids[:, self.prompt :]
        times = scores.new_zeros(scores.shape).scatter_add_(1, answer, scores.new_ones(answer.shape))
        return scores - self.frequency * times - self.presence * (times > 0)


# ---------------------------------------------------------------- all of it together

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

"""From what a request wants to what the batch is asked for: tokens, samplers, lengths."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from offramp.core.running import OWN, Asked
from offramp.serve.errors import ApiError

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy
    from offramp.serve.requests import Wanted


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

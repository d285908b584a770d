"""Requests by OpenAI's interface: bodies checked field by field, since they come from anywhere, and its errors."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from offramp.core.running import OWN
from offramp.values import nearest, plain

# ---------------------------------------------------------------- what goes wrong with them


class ApiError(Exception):
    """A request that gets an error for an answer.

    Args:
        status: Of HTTP.
        message: One line: what was given, what is allowed, what to do.
        kind: "invalid_request_error", "rate_limit_error", "server_error", …: OpenAI's `type`.
        param: The field of the request that is meant.
        code: A word for programs.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The answer's body, as JSON values that can be written as UTF-8, whatever a request had in it."""
        param = None if self.param is None else _writable(self.param)
        return {"error": {"message": _writable(self.message), "type": self.kind, "param": param, "code": self.code}}


def _writable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def stopping() -> ApiError:
    """For requests that come, or have not ended, while the server stops."""
    return ApiError(
        503,
        "the server is stopping; ask again later",
        kind="server_error",
        code="stopping",
        headers={"Retry-After": "5"},
    )


def failed() -> ApiError:
    """For requests whose step of the batch failed; what exactly is in the server's log, and nobody else's business."""
    return ApiError(500, "the model failed on this batch; ask again", kind="server_error", code="internal_error")


def late(seconds: float) -> ApiError:
    """For answers that were not finished in time."""
    return ApiError(
        504,
        f"the answer was not finished within {seconds:g} s; ask for fewer tokens, or later",
        kind="server_error",
        code="timeout",
    )


# ---------------------------------------------------------------- bodies

MOST_STOPS, LONGEST_STOP = 4, 200
MOST_TOP = 5
"""Alternatives to a token whose log-probabilities may be asked for."""
_ROLES = ("system", "developer", "user", "assistant")
_COMMON = (
    "model", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream", "stream_options", "logprobs",
    "presence_penalty", "frequency_penalty", "logit_bias", "user", "offramp",
)  # fmt: skip
_COMPLETION = (*_COMMON, "prompt", "echo")
_CHAT = (*_COMMON, "messages", "max_completion_tokens", "top_logprobs")


@dataclass(frozen=True)
class Wanted:
    """A request, as far as it can be understood without the model.

    Attributes:
        chat: Whether it is about a chat.
        model: The model's name; None: not said.
        prompts: Texts, or token ids; or one chat, a list of messages.
        max_tokens: Most new tokens; None: the server's default.
        sampling: Options of `LanguageModel.sampler`: temperature, top_p, do_sample, seed.
        bias: What is added to scores, by token.
        presence: Taken from the scores of tokens that the answer has.
        frequency: Taken from them once for each time.
        stop: Texts before which an answer ends.
        n: Answers for each prompt.
        stream: Whether answers are wanted as they come.
        usage: Whether a stream ends with numbers of tokens.
        logprobs: Whether log-probabilities are wanted.
        top: Of so many alternatives, too.
        threshold: Which overrides the policy's; None: full depth; OWN: the policy's own.
        recall: Whether what is kept of the prompt's beginning may be used.
    """

    chat: bool
    model: str | None
    prompts: list[Any]
    max_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    bias: dict[int, float] = field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0
    stop: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False
    usage: bool = False
    logprobs: bool = False
    top: int = 0
    threshold: Any = OWN
    recall: bool = True

    @property
    def full(self) -> bool:
        """Whether full depth is asked for."""
        return self.threshold is None


def parse(body: bytes, *, chat: bool, most: int) -> Wanted:
    """Read the body of a request.

    Args:
        body: As it came.
        chat: Of `/v1/chat/completions`; else of `/v1/completions`.
        most: Most answers that one request may ask for.

    Returns:
        What is wanted.

    Raises:
        ApiError: It is no JSON object, or a field is unknown, of the wrong type or outside what is allowed.
    """
    values = {name: value for name, value in _read(body).items() if value is not None}
    known = _CHAT if chat else _COMPLETION
    for name in values:
        if name not in known:
            near = nearest(name, known) if len(name) < 40 else ""
            _refuse(name[:80], f"unknown field {_shown(name)}{near}", code="unknown_parameter")
    if values.get("echo", False) is not False:
        _refuse("echo", "echo is not supported here; put the prompt before the answer yourself")
    _string(values, "user")
    prompts = [_messages(values)] if chat else _prompts(values)
    n = _whole(values, "n", 1, most) or 1
    if n * len(prompts) > most:
        _refuse("prompt", f"{len(prompts)} prompts with n={n} are asked for; allowed are {most} answers at once")
    stream = _flag(values, "stream")
    return Wanted(
        chat, _string(values, "model"), prompts, _length(values), _sampling(values), _bias(values),
        _number(values, "presence_penalty", -2, 2) or 0.0, _number(values, "frequency_penalty", -2, 2) or 0.0,
        _stops(values), n, stream, _usage(values, stream), *_logprobs(values, chat), _threshold(values),
        _recall(values),
    )  # fmt: skip


def _refuse(param: str | None, message: str, *, code: str | None = "invalid_value") -> NoReturn:
    raise ApiError(400, message, param=param, code=code)


def _shown(value: object) -> str:
    return reprlib.repr(value)[:80]  # which does not write all of a long one first


# ---------------------------------------------------------------- JSON


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _read(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        _refuse(None, f"the body is not UTF-8 (byte {error.start})", code="invalid_json")
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        _refuse(None, f"the body is not JSON: {what:.200}", code="invalid_json")
    if not isinstance(values, dict):
        _refuse(None, f"the body is {_shown(values)}; it must be a JSON object", code="invalid_json")
    return values


def _text(param: str, value: object) -> str:
    """A text that can be written as UTF-8: JSON also knows halves of characters."""
    if not isinstance(value, str):
        _refuse(param, f"{param} is {_shown(value)}; it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        _refuse(param, f"{param} has half of a character (a lone surrogate); send whole ones")
    return value


def _string(values: Mapping[str, Any], name: str) -> str | None:
    return None if name not in values else _text(name, values[name])


def _flag(values: Mapping[str, Any], name: str, of: str = "") -> bool:
    value = values.get(name, False)
    if not isinstance(value, bool):
        _refuse(of + name, f"{of}{name} is {_shown(value)}; allowed are true and false")
    return value


def _number(values: Mapping[str, Any], name: str, low: float, high: float, of: str = "") -> float | None:
    if name not in values:
        return None
    value = plain(values[name])
    if value is None or not low <= value <= high:
        interval = f"numbers in [{low:g}, {high:g}]" if math.isfinite(high) else "finite numbers"
        _refuse(of + name, f"{of}{name} is {_shown(values[name])}; allowed are {interval}")
    return value


def _whole(values: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    if name not in values:
        return None
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _refuse(name, f"{name} is {_shown(value)}; allowed are whole numbers in {low}..{high}")
    return value


# ---------------------------------------------------------------- prompts


def _prompts(values: Mapping[str, Any]) -> list[Any]:
    """Texts, or lists of token ids."""
    given = values.get("prompt")
    if isinstance(given, str):
        return [_text("prompt", given)]
    if isinstance(given, list) and given:
        if all(isinstance(one, str) for one in given):
            return [_text("prompt", one) for one in given]
        rows = given if all(isinstance(row, list) for row in given) else [given]
        if all(row and all(type(token) is int for token in row) for row in rows):
            return rows
    missing = "prompt is missing" if given is None else f"prompt is {_shown(given)}"
    _refuse("prompt", f"{missing}; give a text, token ids, or a list of either")


def _messages(values: Mapping[str, Any]) -> list[dict[str, str]]:
    given = values.get("messages")
    if not isinstance(given, list) or not given:
        missing = "messages is missing" if given is None else f"messages is {_shown(given)}"
        _refuse("messages", f"{missing}; give a list of messages, each with role and content")
    return [_message(f"messages[{index}]", message) for index, message in enumerate(given)]


def _message(param: str, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        _refuse(param, f"{param} is {_shown(message)}; give an object with role and content")
    values = {name: value for name, value in message.items() if value not in (None, [])}
    if unknown := [name for name in values if name not in ("role", "content")]:
        name = unknown[0][:80]
        _refuse(f"{param}.{name}", f"unknown field {_shown(name)} of a message; allowed: role, content")
    if (role := values.get("role")) not in _ROLES:
        _refuse(f"{param}.role", f"{param}.role is {_shown(role)}; allowed are {', '.join(_ROLES)}")
    content = values.get("content")
    if isinstance(content, list):
        content = "".join(_part(f"{param}.content[{index}]", part) for index, part in enumerate(content))
    return {"role": "system" if role == "developer" else str(role), "content": _text(f"{param}.content", content)}


def _part(param: str, part: object) -> str:
    if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
        _refuse(param, f"{param} is {_shown(part)}; only texts are understood: {{type: text, text: …}}")
    return _text(f"{param}.text", part["text"])


# ---------------------------------------------------------------- options


def _length(values: Mapping[str, Any]) -> int | None:
    old, new = (_whole(values, name, 1, 2**31 - 1) for name in ("max_tokens", "max_completion_tokens"))
    if old is not None and new is not None and old != new:
        _refuse("max_tokens", f"max_tokens is {old} and max_completion_tokens is {new}; give one of them")
    return new if old is None else old


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """For `LanguageModel.sampler`; a temperature of 0 is the best token."""
    temperature = _number(values, "temperature", 0, 2)
    top_p = _number(values, "top_p", 0, 1)
    seed = _whole(values, "seed", -(2**63), 2**63 - 1)
    seeded = {} if seed is None else {"seed": seed}
    if temperature == 0 or top_p == 0:
        return {"do_sample": False, **seeded}
    given = {"temperature": temperature, "top_p": top_p}
    return {name: float(value) for name, value in given.items() if value is not None} | seeded


def _bias(values: Mapping[str, Any]) -> dict[int, float]:
    given = values.get("logit_bias", {})
    if not isinstance(given, dict) or len(given) > 1024:
        _refuse("logit_bias", f"logit_bias is {_shown(given)}; give an object of at most 1024 tokens' biases")
    bias = {}
    for token in given:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            _refuse("logit_bias", f"logit_bias has the key {_shown(token)}; keys are token ids")
        bias[int(token)] = float(_number(given, token, -100, 100, of="logit_bias.") or 0.0)
    return bias


def _stops(values: Mapping[str, Any]) -> tuple[str, ...]:
    given = values.get("stop", [])
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list):
        _refuse("stop", f"stop is {_shown(given)}; give a text or a list of texts")
    if len(given) > MOST_STOPS:
        _refuse("stop", f"stop has {len(given)} texts; allowed are {MOST_STOPS}")
    for text in given:
        if not _text("stop", text) or len(text) > LONGEST_STOP:
            _refuse("stop", f"a stop text has {len(text)} characters; allowed are 1..{LONGEST_STOP}")
    return tuple(given)


def _usage(values: Mapping[str, Any], stream: bool) -> bool:
    if "stream_options" not in values:
        return False
    given = values["stream_options"]
    if not stream or not isinstance(given, dict) or set(given) - {"include_usage"}:
        _refuse(
            "stream_options", f"stream_options is {_shown(given)}; with stream=true, {{include_usage: true}} is allowed"
        )
    return _flag(given, "include_usage", "stream_options.")


def _logprobs(values: Mapping[str, Any], chat: bool) -> tuple[bool, int]:
    if not chat:
        top = _whole(values, "logprobs", 0, MOST_TOP)
        return top is not None, top or 0
    wanted, top = _flag(values, "logprobs"), _whole(values, "top_logprobs", 0, MOST_TOP)
    if top is not None and not wanted:
        _refuse("top_logprobs", f"top_logprobs is {top}, which needs logprobs=true")
    return wanted, top or 0


def _threshold(values: Mapping[str, Any]) -> Any:
    """The request's own exit threshold, or that it wants full depth."""
    given = values.get("offramp", {})
    if not isinstance(given, dict):
        _refuse("offramp", f"offramp is {_shown(given)}; give an object with threshold, policy or prompt_cache")
    for name in given:
        if name not in ("threshold", "policy", "prompt_cache"):
            _refuse(f"offramp.{name[:80]}", f"unknown field {_shown(name)}; allowed: threshold, policy, prompt_cache")
    policy = given.get("policy")
    if policy not in (None, "full", "default"):
        _refuse("offramp.policy", f"offramp.policy is {_shown(policy)}; allowed are 'default' and 'full'")
    if policy == "full" and given.get("threshold") is not None:
        _refuse("offramp.threshold", "offramp.policy is 'full', which tests nothing; leave the threshold out")
    if policy == "full" or ("threshold" in given and given["threshold"] is None and policy is None):
        return None
    if given.get("threshold") is None:
        return OWN
    return float(_number(given, "threshold", -1e9, 1e9, of="offramp.") or 0.0)


def _recall(values: Mapping[str, Any]) -> bool:
    """Whether the prompt may begin with what is kept."""
    given: Mapping[str, Any] = {"prompt_cache": True, **values.get("offramp", {})}
    return _flag(given, "prompt_cache", of="offramp.")

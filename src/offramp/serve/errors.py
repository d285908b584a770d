"""What goes wrong with a request, as OpenAI's interface says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
        param = None if self.param is None else _whole(self.param)
        return {"error": {"message": _whole(self.message), "type": self.kind, "param": param, "code": self.code}}


def _whole(text: str) -> str:
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

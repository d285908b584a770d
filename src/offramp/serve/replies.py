"""Answers as OpenAI's interface words them, with what is known of their exits beside."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from offramp.serve.text import Piece

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.serve.answer import Answer, Finished
    from offramp.serve.requests import Wanted


class Reply:
    """Words the answers to one request.

    Args:
        lm: The model.
        name: What it is called.
        wanted: The request.
        prompt_tokens: Of its prompts.
    """

    def __init__(self, lm: LanguageModel, name: str, wanted: Wanted, prompt_tokens: int) -> None:
        self._lm, self._wanted, self._prompt_tokens = lm, wanted, prompt_tokens
        kind = "chat.completion" if wanted.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if wanted.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if wanted.chat and wanted.stream else kind,
            "created": int(time.time()), "model": name,
        }  # fmt: skip
        self._offsets: dict[int, int] = {}

    # ------------------------------------------------------------ whole

    def whole(
        self, answers: Sequence[Answer], pieces: Sequence[list[Piece]], ends: Sequence[Finished], about: dict[str, Any]
    ) -> dict[str, Any]:
        """The body of an answer that is not streamed, as JSON values.

        Args:
            answers: Of the request.
            pieces: Of each, all tokens.
            ends: Of each.
            about: What `offramp` holds besides tokens and costs.

        Returns:
            The body.
        """
        choices = [
            self._choice(index, answer.text, some, end.reason)
            for index, (answer, some, end) in enumerate(zip(answers, pieces, ends, strict=True))
        ]
        tokens = [self._tokens(some) for some in pieces]
        lists = {name: [one[name] for one in tokens] for name in ("exit_layers", "confidences")}
        told = {"num_layers": self._lm.num_layers, **lists, **about, "cost": self._cost(answers, ends)}
        return {**self._head, "choices": choices, "usage": self._usage(answers), "offramp": told}

    def _choice(self, index: int, text: str, pieces: list[Piece], reason: str | None) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text}
        if self._wanted.chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **content, "logprobs": self._logprobs(index, pieces), "finish_reason": reason}

    # ------------------------------------------------------------ in chunks

    def chunk(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        """Some tokens of an answer; none: its beginning."""
        text = "".join(piece.text for piece in pieces)
        delta = {"content": text} if pieces else {"role": "assistant", "content": ""}
        choice = self._delta(index, delta, None)
        choice["logprobs"] = self._logprobs(index, pieces) if pieces else None
        return self._chunk([choice], self._tokens(pieces) | {"num_layers": self._lm.num_layers} if pieces else None)

    def last(self, index: int, answer: Answer, end: Finished, about: dict[str, Any]) -> dict[str, Any]:
        """An answer's end."""
        told = {"num_layers": self._lm.num_layers, **about, "cost": self._cost([answer], [end])}
        return self._chunk([self._delta(index, {}, end.reason)], told)

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk behind all others, if it is wanted."""
        return {**self._head, "choices": [], "usage": self._usage(answers)}

    def _delta(self, index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        content = {"delta": delta} if self._wanted.chat else {"text": delta.get("content", "")}
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]], told: dict[str, Any] | None) -> dict[str, Any]:
        chunk = {**self._head, "choices": choices}
        if self._wanted.usage:
            chunk["usage"] = None
        return chunk if told is None else {**chunk, "offramp": told}

    # ------------------------------------------------------------ parts

    def _tokens(self, pieces: list[Piece]) -> dict[str, list[Any]]:
        return {
            "exit_layers": [token.exit_layer for token, _ in pieces],
            "confidences": [_finite(token.confidence) for token, _ in pieces],
            "tokens": [text for _, text in pieces],
        }

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        count = self._wanted.n
        cached = sum(min(a.cached for a in answers[i : i + count]) for i in range(0, len(answers), count))
        new = sum(len(answer.tokens) for answer in answers)
        return {
            "prompt_tokens": self._prompt_tokens, "completion_tokens": new, "total_tokens": self._prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def _cost(self, answers: Sequence[Answer], ends: Sequence[Finished]) -> dict[str, Any]:
        layers = [token.exit_layer for answer in answers for token in answer.tokens]
        seconds = max(end.seconds for end in ends)
        return {
            "mean_depth": sum(layers) / max(len(layers), 1) / self._lm.num_layers,
            "flops": round(sum(end.flops for end in ends)),
            "full_flops": sum(end.full_flops for end in ends),
            "seconds": seconds,
            "tokens_per_second": len(layers) / max(seconds, 1e-9),
        }

    def _logprobs(self, index: int, pieces: list[Piece]) -> dict[str, Any] | None:
        """Of the tokens that have a part in the text."""
        if not self._wanted.logprobs:
            return None
        shown = [piece for piece in pieces if piece.text or not piece.token.ended]
        if self._wanted.chat:
            return {"content": [self._of_chat(piece) for piece in shown], "refusal": None}
        offsets, at = [], self._offsets.get(index, 0)
        for piece in shown:
            offsets.append(at)
            at += len(piece.text)
        self._offsets[index] = at
        return {
            "tokens": [self._word(piece.token.token) for piece in shown],
            "token_logprobs": [_finite(piece.token.logprob) for piece in shown],
            "top_logprobs": [{self._word(token): _finite(log) for token, log in piece.token.top} for piece in shown],
            "text_offset": offsets,
        }

    def _of_chat(self, piece: Piece) -> dict[str, Any]:
        token = piece.token
        top = [self._log(other, log) for other, log in token.top]
        return {**self._log(token.token, token.logprob), "top_logprobs": top}

    def _log(self, token: int, log: float) -> dict[str, Any]:
        word = self._word(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in word  # else a part of a character, whose bytes are not known here
        return {"token": word, "logprob": _finite(log), "bytes": list(word.encode()) if whole else None}

    def _word(self, token: int) -> str:
        return "" if self._lm.tokenizer is None or token < 0 else str(self._lm.tokenizer.decode([token]))


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None

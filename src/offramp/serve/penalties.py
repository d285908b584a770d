"""OpenAI's penalties on tokens that an answer has already."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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

"""How scores become tokens, and when a row ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig


class NoProbabilitiesError(ValueError):
    """Scores that hold NaN or infinity, or nothing that is possible, are no distribution to draw from."""


_STATEFUL = (
    "SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor", "WhisperNoSpeechDetection",
)  # fmt: skip
"""Processors of transformers that remember earlier calls, or run a model of their own."""


def ends_of(config: GenerationConfig) -> tuple[int, ...]:
    """The tokens that end a text by a model's generation config; none if nothing does."""
    eos = config.eos_token_id
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)


@dataclass
class Sampler:
    """How scores become tokens, and when to stop.

    Attributes:
        processors: (ids [B, T], scores float32 [B, V]) -> scores; a `LogitsProcessorList`, warpers included.
        stopping: (ids [B, T]) -> bool [B], besides EOS and the length; only asked about tokens that stand.
        sample: Draw from the processed scores instead of taking the largest.
        generator: Source of the draws; None: torch's global one.
        eos: End-of-sequence ids; never pruned.
        pad: What finished rows are filled with.
    """

    processors: Callable[[Tensor, Tensor], Tensor] | None = None
    stopping: Callable[[Tensor], Tensor] | None = None
    sample: bool = False
    generator: torch.Generator | None = None
    eos: tuple[int, ...] = ()
    pad: int = 0

    def require_repeatable(self) -> None:
        """See that scores of the same text are processed alike a second time: whoever checks drafts does so twice.

        Processors that are not of transformers are believed to be functions of the ids and scores they are given.

        Raises:
            ValueError: One remembers earlier calls, or runs a model of its own.
        """
        processors = self.processors if isinstance(self.processors, list) else [self.processors]
        if stateful := [type(p).__name__ for p in processors if type(p).__name__ in _STATEFUL]:
            raise ValueError(
                f"skipped='verify' checks a token against scores processed anew, but {stateful[0]} remembers earlier "
                "calls (such as a watermark's); leave it out, or use skipped='propagate' or 'defer'"
            )

    def process(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Processed scores [B, V]."""
        return scores if self.processors is None else self.processors(ids, scores)

    def pick(self, processed: Tensor) -> Tensor:
        """One token per row, [B]."""
        if not self.sample:
            return processed.argmax(-1)
        return self.draw(processed.softmax(-1))

    def draw(self, p: Tensor) -> Tensor:
        """One draw per row of probabilities.

        Args:
            p: Probabilities, [B, V].

        Returns:
            Token ids, [B].

        Raises:
            NoProbabilitiesError: A row is the softmax of such scores.
        """
        if bool(p[:, 0].isnan().any()):  # then all of the row is; on a GPU the draw would bring the process down
            raise NoProbabilitiesError(
                "there is no token to draw: the logits processors forbid all of them; allow some"
            )
        return torch.multinomial(p, 1, generator=self.generator)[:, 0]

    def accept_drafts(self, token: Tensor, processed: Tensor, target: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """Judge one position's drafts so that what is emitted is what the full model's scores would have given.

        Greedy drafts must be its choice; sampled ones are accepted with probability min(1, p/q), else drawn from what
        is left of p, norm(max(0, p - q)) (Leviathan et al., arXiv 2211.17192).

        Args:
            token: Drafts, [B].
            processed: The processed scores they were chosen by, [B, V]; empty if no row was drafted.
            target: The full model's processed scores, [B, V].
            drafted: Rows that were drafted, bool [B]; one that went to full depth itself agrees by definition.

        Returns:
            The tokens to emit, [B], and whether each agrees with its draft, bool [B].
        """
        if not self.sample:
            chosen = target.argmax(-1)
            return chosen, (chosen == token) | ~drafted
        if not len(processed):
            return self.pick(target), ~drafted
        p, q = target.softmax(-1), processed.softmax(-1)
        chance = (p.gather(1, token[:, None]) / q.gather(1, token[:, None]))[:, 0]
        accepted = torch.rand(len(p), generator=self.generator, device=p.device) < chance
        rest = torch.where(drafted[:, None], (p - q).clamp(min=0), p)
        # A residual of zero mass means p = q, where every draft is accepted; any distribution does for the unused draw.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
        return torch.where(accepted & drafted, token, self.draw(rest)), accepted | ~drafted

    def is_end(self, token: int) -> bool:
        """Whether a token ends its row."""
        return token in self.eos

    def sound(self, scores: Tensor, token: Tensor) -> Tensor:
        """Rows whose token has a number for a score, bool [B].

        Args:
            scores: As the model gave them, [B, V]; where they hold NaN or +inf, such a one is the largest.
            token: What was chosen by them, [B].

        Returns:
            False where it was chosen by no number.
        """
        chosen = scores.gather(1, token[:, None])[:, 0]
        if self.processors is None:
            return chosen.isfinite()
        return chosen < torch.inf  # one that they force may have -inf of the model, or of its pruned readout

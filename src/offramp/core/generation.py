"""What a generation gives: texts, where each token left, and what it cost."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offramp.core.batch import Step
from offramp.core.costs import Costs
from offramp.core.token_text import pieces, tinted
from offramp.runs.results import Rows


@dataclass(frozen=True)
class Generation(Rows):
    """What `LanguageModel.generate` returns.

    Attributes:
        sequences: Prompt and continuation, LongTensor [B, T]; left-padded prompts, rows padded behind their end. For an
            encoder-decoder, the decoder's sequence.
        texts: The continuations, special tokens left out.
        exit_layers: One list per row, one layer in 1..L per generated token.
        confidences: Likewise, the confidence of the last test of each token; NaN where none was made.
        tokens: Likewise, the token ids.
        costs: FLOPs, bytes and seconds by part, over the whole batch.
        num_layers: L.
        tokenizer: That `pieces` asks; None: token ids stand for texts there.
    """

    sequences: Tensor
    texts: list[str]
    exit_layers: list[list[int]]
    confidences: list[list[float]]
    tokens: list[list[int]]
    costs: Costs
    num_layers: int
    tokenizer: Any = None

    def __repr__(self) -> str:
        first = f": {textwrap.shorten(self.texts[0], 80, placeholder=' …')!r}" if self.texts else ""
        return (
            f"Generation({self.costs.tokens} tokens in {len(self.texts)} rows, mean exit layer "
            f"{self.costs.mean_exit_layer:.1f} of {self.num_layers}{first})"
        )

    def _repr_html_(self) -> str:
        rows = [
            list(zip(texts, layers, sure, strict=True))
            for texts, layers, sure in zip(self.pieces, self.exit_layers, self.confidences, strict=True)
        ]
        return tinted(rows, self.num_layers)

    @property
    def pieces(self) -> list[list[str]]:
        """What each token adds to its text, perhaps nothing, one list per row; its id where there is no tokenizer."""
        if self.tokenizer is None:
            return [[f"{token} " for token in row] for row in self.tokens]
        return [pieces(self.tokenizer, row) for row in self.tokens]

    def _rows(self) -> Iterable[Any]:
        """One row per token: row, position, token, text, exit_layer, confidence (missing where none was tested)."""
        columns = ("token", "text", "exit_layer", "confidence")
        lists = zip(self.tokens, self.pieces, self.exit_layers, self.confidences, strict=True)
        return (
            {"row": row, "position": position, **dict(zip(columns, values, strict=True))}
            for row, each in enumerate(lists)
            for position, values in enumerate(zip(*each, strict=True))
        )


def by_row(steps: Iterable[Step], rows: int) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """Tokens, exit layers and confidences, one list per row; positions behind a row's end have no part in them."""
    tokens: list[list[int]] = [[] for _ in range(rows)]
    layers: list[list[int]] = [[] for _ in range(rows)]
    confidences: list[list[float]] = [[] for _ in range(rows)]
    for step in steps:
        columns = (step.active.tolist(), step.token.tolist(), step.exit_layer.tolist(), step.confidence.tolist())
        for row, (active, token, layer, confidence) in enumerate(zip(*columns, strict=True)):
            if active:
                tokens[row].append(token)
                layers[row].append(layer)
                confidences[row].append(confidence)
    return tokens, layers, confidences

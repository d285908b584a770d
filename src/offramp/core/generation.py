"""What a generation gives: texts, where each token left, and what it cost; in notebooks in the layers' colours."""

from __future__ import annotations

import html
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offramp.core.batch import Step
from offramp.core.costs import Costs, Ledger
from offramp.core.custom_generate import Prepared
from offramp.runs.results import Rows

DEPTH = """\
.depth {
  --hue: calc(264 - 174 * var(--at, 0));
  background: light-dark(oklch(calc(.79 + .15 * var(--at, 0)) calc(.115 - .02 * var(--at, 0)) var(--hue)),
                         oklch(calc(.5 - .14 * var(--at, 0)) calc(.125 - .06 * var(--at, 0)) var(--hue)));
}
.depth.full { background: none; }
"""
"""The scale of depth of notebooks, reports and the server's page, as CSS; --at is a place as of `places`.

Hue and lightness go together in equal steps of Oklch, so that the order is also seen by the colour-blind and in grey;
the earlier, the stronger. What went to full depth stays plain.
"""
_NOTEBOOK = f".offramp-depth {{\n{DEPTH}.depth:not(.full) {{ color: light-dark(#1b1f24, #e6e9ed); }}\n}}"
"""The same for one output alone; with a colour of text that fits, whatever a notebook says of light and dark."""
_TEXT = 'style="white-space:pre-wrap;line-height:1.8"'


class Stream(Iterator[Step]):
    """The steps of a prepared generation as they become certain, and what they cost so far: the ledger's bill."""

    def __init__(self, prepared: Prepared, steps: Iterator[Step], ledger: Ledger) -> None:
        self._prepared, self._steps, self._ledger = prepared, steps, ledger

    def __next__(self) -> Step:
        with self._prepared.model.at_work():
            return next(self._steps)

    @property
    def costs(self) -> Costs:
        """The bill so far."""
        return self._ledger.settle()

    def full_flops(self, tokens: int) -> int:
        """FLOPs the full model spends on the same prompts and `tokens` new tokens in each row."""
        batch, prompt = self._prepared.ids.shape
        memory = 0 if self._prepared.memory is None else self._prepared.memory.shape[1]
        return batch * self._prepared.model.shape.generation_flops(prompt, tokens, memory)


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


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token of `ids` adds to the text, half a character with its other half; nothing without a tokenizer."""
    if tokenizer is None:
        return []
    texts = [tokenizer.decode(list(ids[:end]), skip_special_tokens=True) for end in range(1, len(ids) + 1)]
    ends = [len(text.rstrip("\N{REPLACEMENT CHARACTER}")) for text in texts[:-1]] + [len(text) for text in texts[-1:]]
    ends = list(itertools.accumulate(reversed(ends), min))[::-1]  # what a later token took back, it says itself
    return [texts[-1][start:end] for start, end in itertools.pairwise([0, *ends])]


def places(layers: Iterable[int], num_layers: int) -> dict[int, float]:
    """Where each layer stands on the scale of depth: from 0, the first that occurs, to 1, the full model."""
    known = sorted(set(layers))
    return {layer: (layer - known[0]) / max(num_layers - known[0], 1) if layer < num_layers else 1.0 for layer in known}


def tinted(rows: Sequence[Sequence[tuple[str, int, float]]], num_layers: int) -> str:
    """Texts as HTML, each token on the colour of its layer, which its title names with the confidence.

    Args:
        rows: By text, (piece, exit layer, confidence) of its tokens; NaN: no test was made.
        num_layers: L.

    Returns:
        A `div` with its style; everything in it is escaped.
    """
    layers = [layer for row in rows for _, layer, _ in row]
    at = places(layers, num_layers)
    legend = " ".join(_span(f"\N{NO-BREAK SPACE}{layer}\N{NO-BREAK SPACE}", at[layer]) for layer in at)
    drafted = " (0: drafted, and right)" if 0 in at else ""
    mean = f"; mean {sum(layers) / len(layers):.1f}" if layers else ""
    spans = [[_span(text, at[layer], _title(layer, sure, num_layers)) for text, layer, sure in row] for row in rows]
    texts = "\n".join(f"<p {_TEXT}>{''.join(row)}</p>" for row in spans)
    return (
        f'<div class="offramp-depth">\n<style>\n{_NOTEBOOK}\n</style>\n'
        f"<p><small>{len(layers)} tokens left after layer {legend}{drafted} of {num_layers}{mean}</small></p>\n"
        f"{texts}\n</div>"
    )


def _title(layer: int, confidence: float, num_layers: int) -> str:
    sure = "not tested" if confidence != confidence else f"confidence {confidence:.3f}"
    return f' title="layer {layer} of {num_layers}, {sure}"'


def _span(text: str, at: float, title: str = "") -> str:
    kind = "depth full" if at == 1 else "depth"
    return f'<span class="{kind}" style="--at:{at:.3f}"{title}>{html.escape(text)}</span>' if text else ""

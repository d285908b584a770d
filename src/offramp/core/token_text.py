"""Tokens as text: what each one adds, and in notebooks in the colour of the layer it left after."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

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


_TEXT = 'style="white-space:pre-wrap;line-height:1.8"'


def _title(layer: int, confidence: float, num_layers: int) -> str:
    sure = "not tested" if confidence != confidence else f"confidence {confidence:.3f}"
    return f' title="layer {layer} of {num_layers}, {sure}"'


def _span(text: str, at: float, title: str = "") -> str:
    kind = "depth full" if at == 1 else "depth"
    return f'<span class="{kind}" style="--at:{at:.3f}"{title}>{html.escape(text)}</span>' if text else ""

"""Tokens as text: what each one adds, and in notebooks in the colour of the layer it left after."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import Any

_SCALE = ((0, 114, 178), (0, 158, 115), (213, 94, 0))
"""Red, green and blue of layers 0, L/2 and L (Okabe and Ito), told apart by the colour-blind."""
_OPACITY = 0.4
"""Of the tint, so that text stays legible in its own colour, on dark pages as on light ones."""


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token of `ids` adds to the text, half a character with its other half; nothing without a tokenizer."""
    if tokenizer is None:
        return []
    texts = [tokenizer.decode(list(ids[:end]), skip_special_tokens=True) for end in range(1, len(ids) + 1)]
    ends = [len(text.rstrip("\N{REPLACEMENT CHARACTER}")) for text in texts[:-1]] + [len(text) for text in texts[-1:]]
    ends = list(itertools.accumulate(reversed(ends), min))[::-1]  # what a later token took back, it says itself
    return [texts[-1][start:end] for start, end in itertools.pairwise([0, *ends])]


def tinted(rows: Sequence[Sequence[tuple[str, int, float]]], num_layers: int) -> str:
    """Texts as HTML, each token on the colour of its layer, which its title names with the confidence.

    Args:
        rows: By text, (piece, exit layer, confidence) of its tokens; NaN: no test was made.
        num_layers: L. The colours of a layer are the same in all texts of a model.

    Returns:
        A `div`; everything in it is escaped.
    """
    layers = [layer for row in rows for _, layer, _ in row]
    seen = sorted(set(layers))
    legend = " ".join(f'<span style="{_tint(layer, num_layers)}">&nbsp;{layer}&nbsp;</span>' for layer in seen)
    drafted = " (0: drafted, and right)" if 0 in seen else ""
    mean = f"; mean {sum(layers) / len(layers):.1f}" if layers else ""
    texts = "\n".join(f"<p {_TEXT}>{''.join(_span(*token, num_layers) for token in row)}</p>" for row in rows)
    return (
        f"<div>\n<p><small>{len(layers)} tokens left after layer {legend}{drafted} of {num_layers}{mean}</small></p>\n"
        f"{texts}\n</div>"
    )


_TEXT = 'style="white-space:pre-wrap;line-height:1.8"'


def _span(text: str, layer: int, confidence: float, num_layers: int) -> str:
    sure = "not tested" if confidence != confidence else f"confidence {confidence:.3f}"
    title = f"layer {layer} of {num_layers}, {sure}"
    return f'<span style="{_tint(layer, num_layers)}" title="{title}">{html.escape(text)}</span>' if text else ""


def _tint(layer: int, num_layers: int) -> str:
    place = 2 * layer / num_layers
    low, high = _SCALE[int(place >= 1)], _SCALE[1 + int(place >= 1)]
    mixed = (round(a + (b - a) * (place - int(place >= 1))) for a, b in zip(low, high, strict=True))
    return f"background-color:rgba({','.join(map(str, mixed))},{_OPACITY})"

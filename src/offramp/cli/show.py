"""Streaming text, with each token in the colour of the layer it left at."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

COLOURS = ("bright_green", "green", "cyan", "yellow", "bright_red", "red")
"""From the earliest exits to the full model."""


class Painter:
    """Writes a text token by token; `show_exits`: coloured by layer from `first` to L, or as `token/layer`."""

    def __init__(self, console: Console, tokenizer: Any, num_layers: int, first: int, *, show_exits: bool) -> None:
        self.console, self.tokenizer = console, tokenizer
        self.num_layers, self.first, self.show_exits = num_layers, first, show_exits
        self.plain = console.color_system is None
        self.ids: list[int] = []
        self.layer = num_layers
        self.written = ""

    def colour(self, layer: int) -> str:
        """Colour of an exit layer."""
        if layer >= self.num_layers:
            return COLOURS[-1]
        share = (layer - self.first) / max(self.num_layers - self.first, 1)
        return COLOURS[min(int(max(share, 0) * (len(COLOURS) - 1)), len(COLOURS) - 2)]

    def legend(self) -> None:
        """Say what the marks mean."""
        if self.plain:
            drafted = "" if self.first else "; 0: drafted, and right"
            self._write(f"[token/layer: the layer each token left at, of {self.num_layers}{drafted}]\n")
            return
        by_colour: dict[str, list[int]] = {}
        for layer in range(self.first, self.num_layers + 1):
            by_colour.setdefault(self.colour(layer), []).append(layer)
        self._write("exit layer: ")
        for colour, layers in by_colour.items():
            span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
            if layers[-1] == self.num_layers:
                span += " (full)"
            self._write(f"■ {span}  ", colour)
        self._write("\n\n")

    def put(self, token: int, layer: int) -> None:
        """Write what one more token adds to the text; half a character waits for its other half."""
        self.ids.append(token)
        self.layer = layer
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("�"):
            self._add(text)

    def end(self) -> None:
        """End the text; half a character whose other half never came is written as the tokenizer has it."""
        self._add(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        self._write("\n")

    def _add(self, text: str) -> None:
        """Write what a text has beyond what is written."""
        new, self.written = text[len(self.written) :], text
        if self.show_exits and self.plain and new:
            new = f"{new}/{self.layer}"
        self._write(new, self.colour(self.layer) if self.show_exits and not self.plain else None)

    def _write(self, text: str, colour: str | None = None) -> None:
        """As segments: a `Text` of rich has blanks for tabs, and no carriage returns."""
        style = None if colour is None else Style.parse(colour)
        self.console.print(Segments([Segment(text, style)]), end="", soft_wrap=True)
        self.console.file.flush()

"""What is streamed to a terminal or a file is the text, letter by letter, and the same as in JSON."""

import io
import re

import pytest
from rich.console import Console

from offramp.cli.generate import Painter


class Bytes:
    """A tokenizer whose tokens are bytes; 0 is a special one."""

    def decode(self, ids, skip_special_tokens=False):
        return bytes(id for id in ids if id or not skip_special_tokens).decode("utf-8", errors="replace")


def shown(data, *, show_exits=False, terminal=False):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system="standard" if terminal else None, width=20)
    painter = Painter(console, Bytes(), 4, 2, show_exits=show_exits)
    for place, byte in enumerate(data):
        painter.put(byte, 2 + place % 3)
    painter.end()
    return file.getvalue(), painter.written


TEXTS = [
    "a\tb\n\tc  d",
    "a\r\nb\rc",
    "bell\x07 and\x0c feed",
    "a word that is far longer than the line of twenty letters " * 3,
    "[bold]no markup[/bold] :smile:",
    "😀 ä 中\u2028x",
    "  indented",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("terminal", [False, True])
def test_every_letter_is_written(text, terminal):
    assert shown(text.encode(), terminal=terminal) == (f"{text}\n", text)
    coloured, written = shown(text.encode(), show_exits=True, terminal=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == f"{text}\n"
    assert written == text


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_half_a_character_at_the_end_is_written_and_kept(cut):
    data = "so 😀".encode()
    text, written = shown(data[:-cut])
    assert text == f"{written}\n"
    assert written == data[:-cut].decode(errors="replace")
    assert written.startswith("so �")
    assert shown(data) == ("so 😀\n", "so 😀")


def test_special_tokens_are_neither_written_nor_kept():
    assert shown(b"a\0b\0") == ("ab\n", "ab")


def test_marks_name_the_layer_of_the_token_that_completes_a_text():
    assert shown("aä".encode(), show_exits=True)[0] == "a/2ä/4\n"
    assert shown("aä".encode()[:-1], show_exits=True)[0] == "a/2�/3\n"

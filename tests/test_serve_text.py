"""Text of tokens that come one by one, against the tokenizer's text of all of them."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from offramp.core.running import Emitted
from offramp.serve.answer import Detokenizer, Writer


@functools.cache
def byte_level():
    """One token per byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@functools.cache
def sentence_pieces():
    """Pieces with blanks before words, of which the text's first is dropped, and bytes for what is in no piece."""
    words = ["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁the", "▁sky", "s", "▁", "é", ".", "▁▁"]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def emitted(id, ended=False):
    return Emitted(0, id, 1, 0.5, -1.0, [], ended, False)


def written(tokenizer, ids, stop=()):
    """Pieces as they come, and whether a stop string was met."""
    writer = Writer(functools.partial(text_of, tokenizer), stop)
    pieces = []
    for index, id in enumerate(ids):
        pieces += writer.add(emitted(id, index == len(ids) - 1))
        if writer.stopped:
            return pieces, True
    return pieces + writer.end(), writer.stopped


def spelt(text):
    """Tokens of bytes."""
    return [2 + byte for byte in text.encode()]


ANY_BYTES = st.lists(st.integers(0, 255), max_size=24)
ANY_PIECES = st.lists(
    st.integers(258, 264).map(lambda id: [id]) | st.text(max_size=3).map(spelt), max_size=8
).map(lambda groups: sum(groups, []))  # fmt: skip
"""Bytes that are no characters make such tokenizers take back what they wrote for those before: left out."""


@pytest.mark.parametrize(
    ("make", "some"), [(byte_level, ANY_BYTES), (sentence_pieces, ANY_PIECES)], ids=["bytes", "pieces"]
)
@given(data=st.data())
def test_the_pieces_together_are_the_text_of_all_tokens(make, some, data):
    tokenizer, ids = make(), data.draw(some)
    detokenizer = Detokenizer(functools.partial(text_of, tokenizer))
    pieces = [detokenizer.add(id) for id in ids]
    assert "".join(pieces) + detokenizer.end() == text_of(tokenizer, ids)


@given(text=st.text(max_size=12))
def test_a_character_is_never_cut(text):
    ids = list(map(byte_level().convert_tokens_to_ids, byte_level().tokenize(text)))
    detokenizer = Detokenizer(functools.partial(text_of, byte_level()))
    so_far = ""
    for id in ids:
        so_far += detokenizer.add(id)
        assert text.startswith(so_far)
    assert so_far + detokenizer.end() == text


@given(
    ids=st.lists(st.sampled_from(list(b"abac")), max_size=14),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_an_answer_ends_before_its_first_stop_string_and_nothing_of_it_shows(ids, stops):
    letters = byte_level()
    tokens = [letters.convert_tokens_to_ids(chr(byte)) for byte in ids]
    pieces, stopped = written(letters, tokens, stops)
    text = bytes(ids).decode()
    # as soon as one is complete, at the first place where any begins
    end = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    met = None if end is None else min(text[:end].find(stop) for stop in stops if stop in text[:end])
    assert "".join(piece.text for piece in pieces) == (text if end is None else text[:met])
    assert stopped == (end is not None)
    assert len(pieces) == (len(tokens) if end is None else end)


def test_what_may_be_the_beginning_of_a_stop_string_waits():
    letters = byte_level()
    writer = Writer(functools.partial(text_of, letters), ["bcd"])
    came = [
        "".join(piece.text for piece in writer.add(emitted(letters.convert_tokens_to_ids(letter))))
        for letter in "abcxbc"
    ]
    assert came == ["a", "", "", "bcx", "", ""]
    assert "".join(piece.text for piece in writer.end()) == "bc"

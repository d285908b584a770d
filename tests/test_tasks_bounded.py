"""Files that nobody has looked at: too much, too deep, too long or no text is one line that names the place."""

import gzip
import json
import random

import pytest

from offramp.runs import bounded
from offramp.runs.bounded import content, decoded, parsed
from offramp.tasks import TASKS, read_examples
from offramp.tasks.images import read_idx
from offramp.tasks.labelled_text import SST2, TextLayout, read_labelled_text
from offramp.tasks.rows import csv_rows, json_rows, read_text, table_rows, text_rows, written
from offramp.training.data import read_texts


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


# ---------------------------------------------------------------- too much


@pytest.fixture
def bomb(tmp_path):
    """80 MB of zeros in 80 kB."""
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(80 << 20), 6))
    assert path.stat().st_size < 100_000
    return path


@pytest.mark.parametrize(
    "read",
    [
        content, read_texts, lambda path: list(json_rows(path)), lambda path: read_labelled_text(path, TextLayout()),
        lambda path: read_examples(TASKS["summarisation"], path),
    ],
)  # fmt: skip
def test_what_unpacks_to_far_more_than_it_is_is_refused(bomb, read, monkeypatch):
    taken = []
    whole = bounded.whole
    monkeypatch.setattr(bounded, "whole", lambda *a, **k: taken.append(whole(*a, **k)) or taken[-1])
    with pytest.raises(ValueError, match=r"bomb.jsonl.gz unpacks to more than 200 times its size") as error:
        read(bomb)
    assert "gunzip" in one_line(error)
    assert not taken  # nothing was read to its end


def test_so_is_one_in_the_place_of_images(bomb, tmp_path):
    bomb.rename(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz unpacks to more than 200 times"):
        read_idx(tmp_path)


def test_what_packs_well_is_read(tmp_path):
    path = tmp_path / "a.txt.gz"
    data = b"the same again and again\n" * 4_000_000  # 100 MB
    path.write_bytes(gzip.compress(data, 1))
    assert len(data) / path.stat().st_size < 250
    assert content(path) == data
    small = tmp_path / "b.txt.gz"
    small.write_bytes(gzip.compress(b"a" * (8 << 20)))  # a thousand times, but small
    assert len(read_text(small)) == 8 << 20


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_file_may_hold_so_many_bytes(tmp_path, name, monkeypatch):
    monkeypatch.setattr(bounded, "MOST_BYTES", 1000)
    data = random.Random(0).randbytes(1000)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert content(path) == data
    path.write_bytes(gzip.compress(data + b"x") if name.endswith(".gz") else data + b"x")
    with pytest.raises(ValueError, match=r"a.txt.* holds more than 1,000 bytes.*divide it") as error:
        content(path)
    one_line(error)


def test_long_lines_and_long_fields(tmp_path, monkeypatch):
    monkeypatch.setattr("offramp.tasks.rows.LONGEST_LINE", 200_000)
    long = "x" * 200_001
    for name, text in (("a.tsv", f"good\t1\n{long}\t0\n"), ("a.jsonl", '{"a": 1}\n' + json.dumps({"a": long}))):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}, line 2 has 200,0\d\d characters; at most 200,000 are read"):
            text_rows(tmp_path / name)
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\n{long[:-1]},1\n")  # longer than what Python's csv takes of itself
    assert [len(value) for value in csv_rows(path)[1].value] == [200_000, 1]
    path.write_text(f"text,label\n{long},1\n")
    with pytest.raises(ValueError, match=r"a.csv, line 2 is not CSV \(field larger than field limit \(200000\)"):
        csv_rows(path)


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 101 + "]" * 101, "nested more than 100 times"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested more than 100 times"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 100 times"),
        ('{"n": ' + "9" * 5000 + "}", "holds a number of more than 4,300 digits"),
        ('{"a": 1, "b": 2, "a": 3}', "has the key 'a' twice in one object"),
        ('{"x": [{"a": 1, "a": 1}]}', "has the key 'a' twice in one object"),
        (r'{"text": "cut \ud83d"}', "holds half of a character"),
        (r'{"text": "cut \uDe00"}', "holds half of a character"),
        ('{"a": 1', "is not JSON"),
        ('{"a": "\x01"}', "is not JSON"),
    ],
)
def test_json_that_is_no_data(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + text + "\n")
    rows = json_rows(path)
    assert next(rows).value == {"a": 1}
    with pytest.raises(ValueError, match=f"a.jsonl, line 2 .*{message}") as error:
        next(rows)
    one_line(error)


@pytest.mark.parametrize(
    "text", ["[" * 100 + "]" * 100, '{"n": ' + "9" * 4300 + "}", r'{"text": "\ud83d\ude00 \u00e4"}', "1e999"]
)
def test_json_that_is(text):
    assert parsed(text, "a") == json.loads(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [("a", "a"), (" a", " a"), (1, "1"), (1.0, "1"), (-0.0, "0"), (10**30, "1" + "0" * 30), (1.5, None), (True, None),
     (None, None), (float("nan"), None), (float("inf"), None), (1e300, None), ([1], None), ({}, None)],
)  # fmt: skip
def test_values_as_they_are_written(value, text):
    assert written(value) == text


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfa\nb", "a\nb"),
        (b"a\r\nb\r\n", "a\nb\n"),
        (b"a\rb\r", "a\nb\n"),
        (b"a\rb\nc", "a\rb\nc"),
        ("ä\u2028ö\n".encode(), "ä\u2028ö\n"),
        (b"", ""),
    ],
)
def test_marks_and_line_ends(data, text):
    assert decoded(data, "a") == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("good\t1\nnaïve\t0\n".encode("latin-1"), "line 2 is not UTF-8; convert the file"),
        ("good\t1\n".encode("utf-16"), "line 1 is not UTF-8"),
        ("good\t1\n".encode("utf-16-le"), "line 1 holds a NUL.*if the file is UTF-16, convert it"),
        (b"good\t1\nb\0d\t0\n", "line 2 holds a NUL"),
        (b"good\t1\n" + "bäd\t0\n".encode("cp1252"), "line 2 is not UTF-8"),
        (b"good\t1\ncut \xf0\x9f\x98\t0\n", "line 2 is not UTF-8"),
    ],
)
@pytest.mark.parametrize("read", [lambda path: read_labelled_text(path, SST2), read_text, text_rows])
def test_what_is_no_utf8_is_named_with_its_line(tmp_path, data, message, read):
    path = tmp_path / "a.tsv"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"a.tsv, {message}"):
        read(path)


# ---------------------------------------------------------------- tables


def test_a_column_that_is_there_twice(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label,text,more,more\na,1,b,,\n")
    message = "a.csv, line 1, the header, names 'text' 2 times; rename all but one of 'text', 'label', 'text'"
    with pytest.raises(ValueError, match=message):
        list(table_rows(path, ("text", "label"), what="a table"))
    with pytest.raises(ValueError, match=message):
        read_labelled_text(path, TextLayout())
    assert [row.value["label"] for row in table_rows(path, ("label",), what="a table")] == ["1"]  # others may be

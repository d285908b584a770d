"""Files of every layout become the same examples, and what is wrong with them is said with its place."""

import gzip
import json
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.tasks import TASKS, Example, read_examples, split_groups, take

ANSWERING, SUMMARISING, TRANSLATING, PROMPTS = TASKS.values()
BRIDGE = {
    "title": "Bridges",
    "paragraphs": [
        {
            "context": "The bridge is red.",
            "qas": [
                {
                    "id": "b1",
                    "question": "What colour?",
                    "answers": [{"text": "red"}, {"text": "red"}, {"text": "Red"}],
                },
                {"id": "b2", "question": "What is red?", "answers": [{"text": "bridge", "answer_start": 4}]},
            ],
        },
        {"context": "It is long.", "qas": [{"id": "b3", "question": "How?", "answers": [{"text": "long"}]}]},
    ],
}


def write(path, value):
    """A value as JSON, rows as JSON Lines, text as it is; gzipped if the name says so."""
    if path.name.removesuffix(".gz").endswith(".jsonl") and not isinstance(value, str):
        value = "\n".join(map(json.dumps, value)) + "\n"
    data = (value if isinstance(value, str) else json.dumps(value)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_squad(tmp_path, name):
    one, two, three = read_examples(ANSWERING, write(tmp_path / name, {"version": "1.1", "data": [BRIDGE]}))
    assert one == Example("b1", "The bridge is red.", ("red", "Red"), "Bridges", "What colour?")
    assert (two.id, two.references, two.group) == ("b2", ("bridge",), "Bridges")
    assert (three.source, three.question) == ("It is long.", "How?")


def test_questions_without_an_answer_are_left_out_with_a_count(tmp_path):
    impossible = [{"id": f"x{n}", "question": "Why?", "answers": [], "is_impossible": True} for n in range(3)]
    article = {"title": "A", "paragraphs": [{"context": "x", "qas": impossible}]}
    path = write(tmp_path / "a.json", {"data": [BRIDGE, article]})
    with pytest.warns(UserWarning, match="left out, 3 without an answer in the text"):
        assert [e.id for e in read_examples(ANSWERING, path)] == ["b1", "b2", "b3"]
    with pytest.raises(ValueError, match="no example for question-answering \\(3 without an answer"):
        read_examples(ANSWERING, write(path, {"data": [article]}))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
def test_rows_of_questions(tmp_path, name):
    rows = [
        {"id": 7, "context": "c", "question": " q", "answers": {"text": ["x", "y", "x"], "answer_start": [0, 1, 0]}},
        {"id": "8", "title": "T", "context": "c", "question": "r", "answers": [{"text": "z"}]},
        {"context": "d", "question": "r", "answers": {"text": ["z"], "answer_start": [0]}},
    ]
    one, two, three = read_examples(ANSWERING, write(tmp_path / name, rows))
    assert (one.id, one.references, one.question) == ("7", ("x", "y"), "q")
    assert two.group == "T"
    assert three.id == "3"
    assert len({one.group, two.group, three.group}) == 3


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz"])
def test_summaries(tmp_path, name):
    rows = [
        {"instruction": "-", "dialogue": "A: hi\nB: ho", "summary": "Greetings."},
        {"dialogue": "A: hi\nB: ho", "summary": "They greet."},
        {"fname": "dev_2", "dialogue": "A: bye", "summary1": "x", "summary2": "y", "summary10": "z", "topic": "t"},
    ]
    one, two, three = read_examples(SUMMARISING, write(tmp_path / name, rows))
    assert one == replace(two, id="1", references=("Greetings.",))  # the same dialogue: the same group
    assert three.id == "dev_2"
    assert three.references == ("x", "y", "z")
    assert three.group != one.group
    assert three.question is None


def test_rows_of_one_dialogue_become_references(tmp_path):
    rows = [{"id": f"test_{d}_{s}", "dialogue": f"d{d}", "summary": f"s{d}{s}"} for d in range(2) for s in (1, 2, 3)]
    rows += [{"id": "test_2", "dialogue": "e", "summary": s} for s in ("x", "y", "x")]
    rows += [{"id": "train_1", "dialogue": "f", "summary": "x"}, {"id": "train_2", "dialogue": "f", "summary": "y"}]
    rows += [{"id": "test_9_1", "dialogue": "g", "summary": "x"}]
    examples = read_examples(SUMMARISING, write(tmp_path / "a.jsonl", rows))
    assert [(e.id, e.references) for e in examples] == [
        ("test_0", ("s01", "s02", "s03")),
        ("test_1", ("s11", "s12", "s13")),
        ("test_2", ("x", "y")),
        ("train_1", ("x",)),
        ("train_2", ("y",)),
        ("test_9_1", ("x",)),
    ]


def test_parallel_text_in_every_layout(tmp_path):
    english, german = ["a cat", "two  dogs", "so\u2028what"], ["eine Katze", "zwei Hunde", "na und"]
    left, right = write(tmp_path / "x.en", "\n".join(english)), write(tmp_path / "x.de.gz", "\r\n".join(german) + "\n")
    both = list(zip(english, german, strict=True))
    tsv = write(tmp_path / "x.tsv.gz", "\ufeff" + "".join(f"{a}\t{b}\n" for a, b in both))
    nested = write(tmp_path / "x.jsonl", [{"translation": {"de": b, "en": a}} for a, b in both])
    flat = write(tmp_path / "x.json", [{"de": b, "en": a, "more": 1} for a, b in both])
    expected = read_examples(TRANSLATING, left, right)
    assert [(e.id, e.source, e.references) for e in expected] == [
        (str(n), a, (b,)) for n, (a, b) in enumerate(both, 1)
    ]  # fmt: skip
    assert expected == read_examples(TRANSLATING, str(tsv))
    assert expected == read_examples(TRANSLATING, nested) == read_examples(TRANSLATING, flat)
    back = read_examples(replace(TRANSLATING, languages=("German", "English")), nested)
    assert (back[0].source, back[0].references) == ("eine Katze", ("a cat",))
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1 has no text under 'fr'; it has 'de', 'en'"):
        read_examples(replace(TRANSLATING, languages=("English", "French")), nested)


def test_prompts_have_no_references(tmp_path):
    lines = read_examples(PROMPTS, write(tmp_path / "a.txt", "why is the sky blue ?\nname a river\n"))
    found = [(e.id, e.source, e.references) for e in lines]
    assert found == [("1", "why is the sky blue ?", ()), ("2", "name a river", ())]
    rows = read_examples(PROMPTS, write(tmp_path / "a.jsonl", [{"prompt": "name a river"}]))
    assert [e.source for e in rows] == ["name a river"]
    assert rows[0].group == lines[1].group != lines[0].group
    assert PROMPTS.prompt(rows[0], instruct=True) == PROMPTS.prompt(rows[0], instruct=False) == "name a river"
    with pytest.raises(ValueError, match="no reference to train on"):
        PROMPTS.target(rows[0])


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path / "x.tsv", "\ufeffa\tb\n")
    assert read_examples(TRANSLATING, path)[0].source == "a"


def test_entries_without_a_source_are_left_out_with_a_count(tmp_path):
    rows = [{"dialogue": None, "summary": "x"}, {"dialogue": "d", "summary": "y"}, {"dialogue": " ", "summary": "x"}]
    with pytest.warns(UserWarning, match="2 without a source"):
        examples = read_examples(SUMMARISING, write(tmp_path / "a.json", rows))
    assert [e.id for e in examples] == ["2"]


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets`: what it is asked for, and what it has."""
    calls, module = [], ModuleType("datasets")
    rows = [{"id": "1", "dialogue": "d", "summary": "s"}]

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        both = {"train": rows, "test": rows}
        return rows if split else both if name == "o/both" else {"train": rows}

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("hub:o/n", ("o/n", None, None)),
        ("hub:o/n:validation", ("o/n", None, "validation")),
        ("hub:o/n:train[:100]", ("o/n", None, "train[:100]")),
        ("hub:o/n:xquad.en", ("o/n", "xquad.en", None)),
        ("hub:o/n:de-en:test", ("o/n", "de-en", "test")),
        ("hub:o/n:de-en:odd", ("o/n", "de-en", "odd")),
    ],
)
def test_hub_names(hub, name, call):
    assert read_examples(SUMMARISING, name)[0].references == ("s",)
    assert hub == [call]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub:", "is not of the form hub:OWNER/NAME"),
        ("hub:o/n:", "is not of the form"),
        ("hub:o/n:a:b:c", "is not of the form"),
        ("hub:o/n:train:test", "two splits, train and test"),
        ("hub:o/both", "has the splits train, test; name one, as in hub:o/both:train"),
    ],
)
def test_wrong_hub_names(hub, name, message):
    with pytest.raises(ValueError, match=message):
        read_examples(SUMMARISING, name)


def test_without_datasets_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'offramp\[hub\]'"):
        read_examples(SUMMARISING, "hub:o/n:train")


# ---------------------------------------------------------------- bad input


def question(**change):
    return {"data": [{"title": "T", "paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", **change}]}]}]}


@pytest.mark.parametrize(
    ("task", "name", "value", "message"),
    [
        (SUMMARISING, "a.json", " ", "a.json is empty"),
        (SUMMARISING, "a.json", "[]", "holds no example for summarisation; give"),
        (SUMMARISING, "a.json", "{", "is not JSON"),
        (SUMMARISING, "a.json", '{"a": 1}', "holds a JSON dict, but a list of objects"),
        (SUMMARISING, "a.json", "[1]", "entry 1: int 1 stands where an object must"),
        (SUMMARISING, "a.jsonl", '{"dialogue": "d", "summary": "s"}\n\n{', "line 3 is not JSON"),
        (SUMMARISING, "a.jsonl", [{"dialogue": "d"}], "line 1 has no text under 'summary'; it has 'dialogue'"),
        (SUMMARISING, "a.jsonl", [{"summary": "d"}], "line 1 has no text under 'dialogue'"),
        (SUMMARISING, "a.jsonl", [{"dialogue": "d", "summary": 3}], "line 1 has no text under 'summary'"),
        (SUMMARISING, "a.jsonl", [{"dialogue": "d", "summary": ""}], "line 1 has an empty summary"),
        (
            SUMMARISING,
            "a.json",
            {"data": [BRIDGE]},
            "entry 1 has no text under 'summary'; it has 'title', 'paragraphs'",
        ),
        (
            SUMMARISING,
            "a.json",
            [{"id": 1, "dialogue": "d", "summary": "s"}, {"id": 1, "dialogue": "e", "summary": "s"}],
            "several entries of the id '1'",
        ),
        (SUMMARISING, "a.txt", "text", "a.txt is no file with examples for summarisation; give .json, .jsonl, also"),
        (ANSWERING, "a.json", [{"dialogue": "d", "summary": "s"}], "entry 1 has no text under 'paragraphs'"),
        (ANSWERING, "a.json", question(), "entry 1, paragraphs 1, qas 1 has no list of objects under 'answers'"),
        (ANSWERING, "a.json", question(answers=[]), "entry 1, paragraphs 1, qas 1 has no answer"),
        (ANSWERING, "a.json", question(answers=[{"start": 1}]), "answers 1 has no text under 'text'"),
        (ANSWERING, "a.json", question(answers=[{"text": " "}]), "has an empty answer"),
        (ANSWERING, "a.json", question(answers=[{"text": "a"}], question=""), "has an empty question"),
        (
            ANSWERING,
            "a.json",
            [{"title": "T", "paragraphs": [{"qas": []}]}],
            "paragraphs 1 has no text under 'context'",
        ),
        (ANSWERING, "a.json", [{"title": "T", "paragraphs": 1}], "entry 1 has no list of objects under 'paragraphs'"),
        (ANSWERING, "a.jsonl", [{"context": "c", "question": "q"}], "line 1 has no list of objects under 'answers'"),
        (TRANSLATING, "a.tsv", "a\tb\nc\n", "line 2 has 1 columns"),
        (TRANSLATING, "a.tsv", "a\tb\n\n", "line 2 has 1 columns"),
        (TRANSLATING, "a.tsv", "a\tb\nc\t\n", "line 2 has an empty translation"),
        (TRANSLATING, "a.jsonl", [{"translation": "x"}], "line 1: an object must stand under 'translation'"),
        (TRANSLATING, "a.en", "x\n", "a.en is no file with examples for translation; give .json, .jsonl, .tsv, or two"),
    ],
)
def test_wrong_files_say_where(tmp_path, task, name, value, message):
    with pytest.raises(ValueError, match=message):
        read_examples(task, write(tmp_path / name, value))


def test_lines_must_belong_together(tmp_path):
    one, two = write(tmp_path / "a", "x\ny\n"), write(tmp_path / "b", "x\n")
    with pytest.raises(ValueError, match="a has 2 lines and .*b has 1"):
        read_examples(TRANSLATING, one, two)
    with pytest.raises(ValueError, match="a second file, .*b, belongs to two text files of a translation"):
        read_examples(SUMMARISING, one, two)


def test_other_encodings_and_damaged_archives_are_refused(tmp_path):
    latin, damaged, plain = tmp_path / "a.tsv", tmp_path / "b.tsv.gz", tmp_path / "c.tsv.gz"
    latin.write_bytes(b"a\tb\n" + "ä\tb\n".encode("latin-1"))
    damaged.write_bytes(gzip.compress(b"a\tb\n" * 100)[:-9])
    plain.write_bytes(b"a\tb\n")
    with pytest.raises(ValueError, match=r"a\.tsv, line 2 is not UTF-8"):
        read_examples(TRANSLATING, latin)
    for path in (damaged, plain):
        with pytest.raises(ValueError, match="is not a whole gzip file"):
            read_examples(TRANSLATING, path)
    with pytest.raises(FileNotFoundError):
        read_examples(TRANSLATING, tmp_path / "none.tsv")


# ---------------------------------------------------------------- parts

grouped = st.lists(st.integers(0, 9), min_size=4, max_size=60).map(
    lambda groups: [Example(str(i), f"s{i}", ("r",), str(group)) for i, group in enumerate(groups)]
)


@given(grouped, st.sampled_from([(1.0,), (0.5, 0.5), (0.2, 0.8), (0.1, 0.3, 0.6), (0.97, 0.03)]), st.integers(0, 5))
def test_no_group_is_divided(examples, shares, seed):
    if len({e.group for e in examples}) < len(shares):
        with pytest.raises(ValueError, match="cannot make"):
            split_groups(examples, shares, seed)
        return
    parts = split_groups(examples, shares, seed)
    assert parts == split_groups(examples, shares, seed)
    assert all(parts)
    assert Counter(e for part in parts for e in part) == Counter(examples)
    assert all(part == [e for e in examples if e in part] for part in parts)
    groups = [{e.group for e in part} for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups))
    largest = max(Counter(e.group for e in examples).values())
    if min(shares) * len(examples) > 2 * largest:  # then no part had to be given a group to have one
        for part, share in zip(parts, shares, strict=True):
            assert abs(len(part) - share * len(examples)) <= largest


def test_shares_are_exact_where_groups_are_single_and_seeds_matter():
    examples = [Example(str(i), "s", ("r",), str(i)) for i in range(100)]
    parts = split_groups(examples, (0.6, 0.3, 0.1), seed=0)
    assert [len(part) for part in parts] == [60, 30, 10]
    assert parts != split_groups(examples, (0.6, 0.3, 0.1), seed=1)
    assert parts[0] != examples[:60]


@pytest.mark.parametrize("shares", [(), (0.5, 0.4), (1.2, -0.2), (0.0, 1.0)])
def test_shares_out_of_range(shares):
    with pytest.raises(ValueError, match="above 0 that add up to 1"):
        split_groups([Example("1", "s", ("r",), "1")], shares, 0)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 3))
def test_smaller_subsets_are_part_of_larger_ones(small, large, seed):
    examples = [Example(str(i), "s", ("r",), "g") for i in range(20)]
    small, large = sorted((small, large))
    few, many = take(examples, small, seed), take(examples, large, seed)
    assert len(few) == min(small, 20)
    assert set(few) <= set(many)
    assert many == sorted(many, key=examples.index)


def test_all_or_none_are_taken():
    examples = [Example(str(i), "s", ("r",), "g") for i in range(20)]
    assert take(examples, None, 0) == examples
    assert take(examples, 5, 0) != take(examples, 5, 1)
    with pytest.raises(ValueError, match="limit is 0"):
        take(examples, 0, 0)


# ---------------------------------------------------------------- the real ones


@pytest.mark.skipif("OFFRAMP_DATA" not in os.environ, reason="OFFRAMP_DATA does not name a folder of data sets")
def test_real_files_are_read_whole():
    data = Path(os.environ.get("OFFRAMP_DATA", ""))
    questions = read_examples(ANSWERING, data / "xquad_en/dev_a.json")
    assert (len(questions), len({e.group for e in questions}), len({e.source for e in questions})) == (632, 24, 120)
    assert all(e.references[0] in e.source for e in questions)
    assert len(read_examples(SUMMARISING, data / "samsum/validation.json")) == 818
    assert len(read_examples(SUMMARISING, data / "dialogsum/dev.jsonl")) == 500
    assert len(read_examples(SUMMARISING, data / "dialogsum/train.jsonl.gz")) == 12460
    pairs = read_examples(TRANSLATING, data / "multi30k/val.en.gz", data / "multi30k/val.de.gz")
    assert len(pairs) == 1014


@pytest.mark.parametrize("header", ["en\tde", "source\ttarget", "English\tGerman"])
def test_a_header_of_parallel_text_is_said(tmp_path, header):
    path = write(tmp_path / "a.tsv", f"{header}\na cat\teine Katze\n")
    with pytest.warns(UserWarning, match="a.tsv, line 1 is taken for a header"):
        (example,) = read_examples(TRANSLATING, path)
    assert (example.id, example.source, example.references) == ("2", "a cat", ("eine Katze",))


def test_ids_are_what_they_are(tmp_path):
    rows = [{"id": id, "dialogue": f"d{id}", "summary": "s"} for id in (0, 1.0, "x", None)]
    assert [e.id for e in read_examples(SUMMARISING, write(tmp_path / "a.jsonl", rows))] == ["0", "1", "x", "4"]
    rows = [{"id": id, "context": "c", "question": "q", "answers": {"text": ["a"]}} for id in (0, 1)]
    assert [e.id for e in read_examples(ANSWERING, write(tmp_path / "a.jsonl", rows))] == ["0", "1"]
    rows = [{"id": id, "dialogue": f"d{n}", "summary": "s"} for n, id in enumerate((1, "1"))]
    with pytest.raises(ValueError, match="several entries of the id '1'"):
        read_examples(SUMMARISING, write(tmp_path / "a.jsonl", rows))


def test_a_table_holds_no_prompts(tmp_path):
    with pytest.raises(ValueError, match=r"a.csv is a table, and prompts stand one on a line; give .txt"):
        read_examples(PROMPTS, write(tmp_path / "a.csv", "id,prompt\n1,hello\n"))

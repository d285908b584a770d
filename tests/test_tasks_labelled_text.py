"""Labelled texts in tables and JSON Lines; what is wrong is named with its line."""

import gzip
import json
import warnings

import pytest

from offramp.tasks.labelled import split
from offramp.tasks.labelled_text import SNLI, SNLI_PUBLISHED, SST2, TextLayout, read_labelled_text


def write(folder, name, text):
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_sst2(tmp_path, end):
    path = write(tmp_path, "dev.tsv", end.join(['a "fine" film\t1', "dull , it 's\t0", "fine again\t1", ""]))
    data = read_labelled_text(path, SST2)
    assert data.inputs == ('a "fine" film', "dull , it 's", "fine again")
    assert data.labels.tolist() == [1, 0, 1]
    assert data.classes == ("negative", "positive")
    assert data.ids == ("dev.tsv/1", "dev.tsv/2", "dev.tsv/3")
    assert data.clusters == ()


def test_snli_keeps_premises_together(tmp_path):
    lines = [f"premise {i // 3}\thypothesis {i}\t{i % 3}" for i in range(60)]
    path = write(tmp_path, "val.tsv.gz", "\n".join(["premise\thypothesis\tlabel", *lines]) + "\n")
    data = read_labelled_text(path, SNLI)
    assert data.inputs[4] == ("premise 1", "hypothesis 4")
    assert data.classes == ("entailment", "neutral", "contradiction")
    assert (data.labels[4], data.ids[4], data.clusters[4]) == (1, "val.tsv.gz/5", "premise 1")
    parts = split(data)
    assert sum(len(set(part.clusters)) for part in parts.values()) == 20
    assert [part.counts for part in parts.values()] == [[12] * 3, [2] * 3, [2] * 3, [2] * 3, [2] * 3]


def test_published_snli_has_rows_without_a_label(tmp_path):
    rows = [{"sentence1": "p", "sentence2": f"h{i}", "gold_label": label, "pairID": f"x{i}", "other": [1]}
            for i, label in enumerate(["neutral", "-", "entailment"])]  # fmt: skip
    path = write(tmp_path, "snli_1.0_dev.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="1 rows without a label were left out"):
        data = read_labelled_text(path, SNLI_PUBLISHED)
    assert data.ids == ("x0", "x2")
    assert data.labels.tolist() == [1, 0]
    assert data.inputs[1] == ("p", "h2")


def test_columns_by_name(tmp_path):
    layout = TextLayout("body", "stars", group="country", id="key")
    text = 'key,stars,body,country\nk1,10,"one, ""two""\nthree",0\nk2,9,four\u2028five,3\n'
    data = read_labelled_text(write(tmp_path, "reviews.csv", text), layout)
    assert data.inputs == ('one, "two"\nthree', "four\u2028five")
    assert data.classes == ("9", "10")  # numbers by size
    assert (data.labels.tolist(), data.groups.tolist(), data.ids) == ([1, 0], [0, 3], ("k1", "k2"))
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    path = write(tmp_path, "rows.jsonl.gz", "\n".join(map(json.dumps, rows)))
    assert read_labelled_text(path, TextLayout()).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "text", "layout", "message"),
    [
        ("a.tsv", "good\t1\nbad\t2\n", SST2, "a.tsv, line 2 has the label '2'; allowed are '0', '1'"),
        ("a.tsv", "good\t1\nbad\n", SST2, "a.tsv, line 2 has 1 columns where 2 are needed"),
        ("a.tsv", "good\n", SST2, "a.tsv, line 1 has 1 columns where 2 are needed"),
        ("a.tsv", "good\t1\n\t0\n", SST2, "a.tsv, line 2 has an empty text in column 0"),
        ("a.tsv", "\n", SST2, "a.tsv is empty"),
        ("a.tsv", "premise\thypo\tlabel\n", SNLI, "lacks the column 'hypothesis'; as a header .* 'hypo'"),
        ("a.tsv", "premise\thypothesis\tlabel\n", SNLI, "a.tsv holds no labelled row"),
        ("a.tsv", "text\tlabel\nx\t1\n", TextLayout(), "has the label '1' only"),
        ("a.csv", 'text,label\nx,1\n"y,0\n', TextLayout(), "a.csv, line 3 is not CSV"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', TextLayout(), "line 2 has no text .* under 'label'"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n[1]\n',
            TextLayout(),
            r"line 2: list \[1\] stands where an object with 'text', 'label' must",
        ),
        ("a.jsonl", '{"text": "a"\n', TextLayout(), "a.jsonl, line 1 is not JSON"),
        ("a.jsonl", "{}", SST2, "has keys, no places"),
        ("a.txt", "x\t1\n", SST2, "ends in .txt; give .tsv, .csv or .jsonl"),
        ("a.csv", "text,label,g\nx,1,-1\ny,0,0\n", TextLayout(group="g"), "line 2 has the group '-1'"),
        ("a.csv", "text,label,g\nx,1,0\ny,0,1000000\n", TextLayout(group="g"), "line 3 has the group '1000000'"),
        ("a.csv", f"text,label,g\nx,1,{'9' * 5000}\ny,0,1\n", TextLayout(group="g"), "line 2 has the group '9999"),
        ("a.tsv", "good\t1\nbad\t\n", SST2, "line 2 has an empty label in column 1; fill it, or remove the row"),
        ("a.tsv", "good\t1\nbad\t \n", SST2, "line 2 has an empty label in column 1"),
        ("a.csv", "text,label\nx,1.0\ny,nan\n", TextLayout(), "line 3 has nan as label, a missing number"),
        ("a.csv", "text,label\nx,1\ny,True\n", TextLayout(), "has both True and 1 as labels; write all .* one way"),
        ("a.csv", "text,label\nx,1\ny,0\n", TextLayout("a b"), "lacks the column 'a b'; as a header it names 'text'"),
        ("a.jsonl", '{"text": "a", "label": null}', TextLayout(), "no text or whole number under 'label', but None"),
        ("a.jsonl", '{"text": "a", "label": NaN}', TextLayout(), "no text or whole number under 'label', but nan"),
        ("a.jsonl", '{"text": "a", "label": 0.5}', TextLayout(), "no text or whole number under 'label', but 0.5"),
        ("a.jsonl", '{"text": " ", "label": 1}', TextLayout(), "line 1 has an empty text in column 'text'"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": true}', TextLayout(), "has both true and 1"),
        ("a.csv", "text,label,id\nx,1,k\ny,0,k\n", TextLayout(id="id"), "several rows with the id 'k'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, text, layout, message):
    with pytest.raises(ValueError, match=message):
        read_labelled_text(write(tmp_path, name, text), layout)


def test_a_missing_file_and_mixed_columns(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.tsv is missing; give a file"):
        read_labelled_text(tmp_path / "none.tsv", SST2)
    with pytest.raises(ValueError, match="give all by name or all by place"):
        TextLayout(text=0, label="label")


def read(path, layout):
    """The rows, and what was said of them."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        data = read_labelled_text(path, layout)
    return data, [str(warning.message) for warning in found]


@pytest.mark.parametrize(
    ("name", "text", "layout", "labels", "classes", "said"),
    [
        # blanks around a label are no part of it
        ("a.csv", "text,label\na, pos\nb,pos\nc,neg \n", TextLayout(), [1, 1, 0], ("neg", "pos"),
         "2 labels were read without blanks and .0, ' pos' as 'pos' (1), 'neg ' as 'neg' (1)"),
        # as a table with a missing label somewhere writes whole numbers
        ("a.csv", "text,label\na,1.0\nb,10.0\nc,2\n", TextLayout(), [0, 2, 1], ("1", "2", "10"),
         "2 labels were read without blanks and .0, '1.0' as '1' (1), '10.0' as '10' (1)"),
        ("a.tsv", "a\t1.0\nb\t0.0\n", SST2, [1, 0], ("negative", "positive"), "2 labels were read without blanks"),
        ("a.csv", "text,label\na,1.0\nb,2.0\n", TextLayout(classes=("1.0", "2.0")), [0, 1], ("1.0", "2.0"), None),
        # the same number in JSON, however it is written
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "1"}\n{"text": "c", "label": 1.0}\n'
         '{"text": "d", "label": 0}', TextLayout(), [1, 1, 1, 0], ("0", "1"), None),
        ("a.jsonl", '{"text": "a", "label": true}\n{"text": "b", "label": false}', TextLayout(), [1, 0],
         ("false", "true"), None),
        ("a.csv", "text,label\na,Pos\nb,pos\n", TextLayout(), [0, 1], ("Pos", "pos"),
         "the labels 'Pos', 'pos' differ in capitals only and stay different classes"),
        ("a.csv", "text,label\n" + "".join(f"{i},name {i:02}\n" for i in range(30)), TextLayout(), list(range(30)),
         tuple(f"name {i:02}" for i in range(30)), "30 rows have 30 different labels; is 'label' the column"),
        # headers where none should be
        ("a.tsv", "sentence\tlabel\nfine\t1\ndull\t0\n", SST2, [1, 0], ("negative", "positive"),
         "a.tsv, line 1 is taken for a header, 'sentence', 'label', not for a row"),
        ("a.csv", "x,Sentiment\nfine,pos\ndull,neg\n", TextLayout(0, 1), [1, 0], ("neg", "pos"),
         "a.csv, line 1 is taken for a header"),
        ("a.csv", "x,worth\nfine,1\ndull,0\n", TextLayout(0, 1), [1, 0], ("0", "1"), "line 1 is taken for a header"),
        ("a.csv", "x,worth\nfine,good\ndull,bad\n", TextLayout(0, 1), [2, 1, 0], ("bad", "good", "worth"), None),
        ("a.csv", "x,class\nfine,other\n", TextLayout(0, 1, classes=("class", "other")), [0, 1], ("class", "other"),
         None),
        # quotes are letters in .tsv
        ("a.tsv", '"a ""fine"" film"\t1\n"dull"\t0\n', SST2, [1, 0], ("negative", "positive"),
         "1 fields look like quoted ones"),
        ("a.tsv", '" a \' film\' "\t1\n"" x\t0\n', SST2, [1, 0], ("negative", "positive"), None),
    ],
)  # fmt: skip
def test_labels_that_are_not_taken_as_they_stand_are_said(tmp_path, name, text, layout, labels, classes, said):
    data, warned = read(write(tmp_path, name, text), layout)
    assert (data.labels.tolist(), data.classes) == (labels, classes)
    assert len(warned) == (said is not None)
    assert said is None or said in warned[0]


def test_rows_behind_a_header_are_counted_as_without(tmp_path):
    data, _ = read(write(tmp_path, "a.tsv", "sentence\tlabel\nfine\t1\ndull\t0\n"), SST2)
    assert data.ids == ("a.tsv/1", "a.tsv/2")
    assert data.inputs == ("fine", "dull")


def test_line_ends_and_marks_are_no_text(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        path = tmp_path / "a.csv"
        path.write_bytes(b"\xef\xbb\xbf" + f'text,label{end}"one{end}two",1{end}three,0{end}'.encode())
        data, warned = read(path, TextLayout())
        assert data.inputs == ("one\ntwo", "three")
        assert not warned

"""The division of a user's data: the same again later, and nothing else passes for it."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from classifier_data import write_idx, write_texts
from offramp.classifiers import splits
from offramp.classifiers.splits import IMAGES, SCHEMA, TEXTS, DataConfig, divide, located, read_again, record
from offramp.tasks.labelled import SHARES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_idx(tmp_path_factory.mktemp("data") / "idx")


def again(config, splits, task, *files):
    """Read by a record that went through a file."""
    return read_again(json.loads(json.dumps(record(config, splits))), task, *files)


def test_a_published_test_split_stays_whole_and_the_rest_is_divided(folder):
    splits = divide(DataConfig(IMAGES), folder)
    assert list(splits) == list(SHARES)
    assert set(splits["test"].ids) == {f"test/{i}" for i in range(60)}
    others = [rows for name, rows in splits.items() if name != "test"]
    assert sorted(i for rows in others for i in rows.ids) == sorted(f"train/{i}" for i in range(240))
    assert len(splits["train"]) == 240 * 6 // 9
    for name, rows in splits.items():  # each with every class
        assert min(rows.counts) > 0, name


def test_the_same_division_again_and_another_with_another_seed(folder):
    config = DataConfig(IMAGES, classes=("a", "b", "c"), seed=3, count=120)
    splits = divide(config, folder)
    read, found = again(config, splits, IMAGES, folder)
    assert read == config
    for name, rows in splits.items():
        assert found[name].ids == rows.ids
        assert found[name].classes == ("a", "b", "c")
        assert np.array_equal(found[name].inputs, rows.inputs)
    assert sum(len(rows) for name, rows in splits.items() if name != "test") == 120
    assert divide(DataConfig(IMAGES, seed=4, count=120), folder)["train"].ids != splits["train"].ids


@settings(max_examples=20, deadline=None)
@given(change=st.sampled_from(["label", "word", "row", "order", "name"]), place=st.integers(0, 99))
def test_any_other_row_is_refused(tmp_path_factory, change, place):
    path = write_texts(tmp_path_factory.mktemp("texts") / "rows.tsv", 100)
    config = DataConfig(TEXTS, layout="sst2")
    splits = divide(config, path)
    lines = path.read_text().splitlines()
    text, label = lines[place].split("\t")
    if change == "label":
        lines[place] = f"{text}\t{1 - int(label)}"
    elif change == "word":
        lines[place] = f"{text} film\t{label}"
    elif change == "row":
        del lines[place]
    elif change == "order":
        if lines[place] == lines[place - 1]:
            return
        lines[place], lines[place - 1] = lines[place - 1], lines[place]
    other = path.with_name("other.tsv") if change == "name" else path
    other.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="is not what the model was trained and divided with"):
        again(config, splits, TEXTS, other)


def test_a_test_file_of_its_own(tmp_path):
    path = write_texts(tmp_path / "train.tsv")
    test = write_texts(tmp_path / "dev.tsv", 50, seed=1, apart=path)
    config = DataConfig(TEXTS, layout="sst2")
    splits = divide(config, path, test)
    assert len(splits["test"]) == 50
    assert sum(map(len, splits.values())) == 290
    assert again(config, splits, TEXTS, path, test)[1]["test"].digest() == splits["test"].digest()
    with pytest.raises(ValueError, match="its train split has"):  # which the test file had no share in
        again(config, splits, TEXTS, path)
    with pytest.raises(ValueError, match=r"240 rows of .*train.tsv are in .*train.tsv too"):
        divide(config, path, path)


def test_rows_are_the_same_by_their_texts_not_by_the_names_of_their_files(tmp_path):
    for name in ("train", "dev"):
        (tmp_path / name).mkdir()
    path = write_texts(tmp_path / "train" / "data.tsv")
    test = write_texts(tmp_path / "dev" / "data.tsv", 50, seed=1, apart=path)
    config = DataConfig(TEXTS, layout="sst2")
    splits = divide(config, path, test)
    assert len({id for rows in splits.values() for id in rows.ids}) == 290
    assert again(config, splits, TEXTS, path, test)[1]["test"].ids == splits["test"].ids
    copy = tmp_path / "copy.tsv"
    copy.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:14]))
    with pytest.raises(ValueError, match=r"14 rows of .*copy\.tsv are in .*data\.tsv too, such as 'copy.tsv/1'"):
        divide(config, path, copy)
    path.write_text(path.read_text() + copy.read_text())  # copies in the file itself
    parts = list(divide(config, path).values())
    for place, part in enumerate(parts):
        assert not set(part.inputs) & {text for other in parts[place + 1 :] for text in other.inputs}


def test_images_of_a_published_test_split_are_left_out_of_the_rest(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "idx")
    images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    train = bytearray(gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes()))
    train[16 : 16 + 64] = images[16 : 16 + 64]  # the first image of 8 x 8
    (tmp_path / "idx" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(train)))
    with pytest.warns(UserWarning, match="1 rows that its test split has too were left out"):
        splits = divide(DataConfig(IMAGES), tmp_path / "idx")
    assert {id for rows in splits.values() for id in rows.ids} == {
        *(f"train/{i}" for i in range(1, 240)), *(f"test/{i}" for i in range(60)),
    }  # fmt: skip


def test_texts_by_columns_of_any_name_or_place(tmp_path):
    named = write_texts(tmp_path / "named.tsv", 60, header=True)
    placed = write_texts(tmp_path / "placed.tsv", 60)
    by_name = divide(DataConfig(TEXTS), named)
    by_place = divide(DataConfig(TEXTS, text=0, label=1, classes=("0", "1")), placed)
    assert [sorted(s.inputs) for s in by_name.values()] == [sorted(s.inputs) for s in by_place.values()]
    assert by_name["train"].classes == ("0", "1")


def test_the_layout_of_images_is_seen_by_their_files(tmp_path):
    pixels, labels = np.random.default_rng(0).integers(0, 256, (50, 3072)), np.arange(50) % 10
    content = np.concatenate([labels[:, None], pixels], axis=1).astype(np.uint8)
    for place, name in enumerate((*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")):
        content[:, 1] = place
        (tmp_path / name).write_bytes(content.tobytes())
    splits = divide(DataConfig(IMAGES), tmp_path)
    assert splits["test"].inputs.shape == (50, 32, 32, 3)
    assert len(splits["test"].classes) == 10


def test_bad_input_is_said_in_a_line(folder, tmp_path):
    with pytest.raises(ValueError, match="allowed are 'image-classification', 'text-classification'"):
        DataConfig("images")
    with pytest.raises(ValueError, match="layout for text-classification is .*; allowed are None, 'sst2'"):
        DataConfig(TEXTS, layout="idx")
    with pytest.raises(ValueError, match="count is 0"):
        DataConfig(IMAGES, count=0)
    with pytest.raises(ValueError, match="the only class named is 'a'"):
        DataConfig(IMAGES, classes=("a",))
    with pytest.raises(ValueError, match=r"label 2; allowed are 0\.\.1"):
        divide(DataConfig(IMAGES, classes=("a", "b")), folder)
    with pytest.raises(ValueError, match="has a test split of its own"):
        divide(DataConfig(IMAGES), folder, folder)
    with pytest.raises(ValueError, match="too few"):
        divide(DataConfig(IMAGES, count=5), folder)
    with pytest.raises(FileNotFoundError, match="is missing"):
        divide(DataConfig(TEXTS), tmp_path / "none.tsv")
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        read_again({}, IMAGES, folder)
    with pytest.raises(ValueError, match="was trained for image-classification, not for text-classification"):
        read_again({**record(DataConfig(IMAGES), {}), "schema": SCHEMA}, TEXTS, folder)


def test_drawing_rows_leaves_the_outer_draws_alone(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    divide(DataConfig(IMAGES, count=50), folder)
    assert torch.equal(before, torch.get_rng_state())


def test_a_name_stands_for_a_set_that_is_installed(folder, tmp_path, monkeypatch):
    name = Path("fashion-mnist")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(splits, "INSTALLED", tmp_path / "installed")
    monkeypatch.delenv("OFFRAMP_FASHION_MNIST", raising=False)
    with pytest.raises(
        FileNotFoundError, match="no fashion-mnist here.*sudo apt install dataset-fashion-mnist"
    ) as raised:
        divide(DataConfig(IMAGES), name)
    assert "\n" not in str(raised.value)
    shutil.copytree(folder, tmp_path / "installed" / "fashion-mnist")
    assert located(name) == tmp_path / "installed" / "fashion-mnist"
    monkeypatch.setenv("OFFRAMP_FASHION_MNIST", str(folder))
    assert located(name) == folder
    found, expected = divide(DataConfig(IMAGES), name), divide(DataConfig(IMAGES), folder)
    assert {part: rows.digest() for part, rows in found.items()} == {n: rows.digest() for n, rows in expected.items()}
    shutil.copytree(folder, tmp_path / "fashion-mnist")  # what is here comes first
    assert located(name) == name
    assert located(tmp_path / "other") == tmp_path / "other"

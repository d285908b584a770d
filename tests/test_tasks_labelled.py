"""Labelled rows: what may be one, and splits that keep proportions and never tear a cluster or share a row."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from offramp.tasks import labelled
from offramp.tasks.image_files import ImageFiles
from offramp.tasks.labelled import SHARES, Labelled, Part, contents, require_apart, split, without


def texts(labels, *, groups=None, clusters=(), classes=3, prefix="r"):
    ids = tuple(f"{prefix}{i}" for i in range(len(labels)))
    groups = None if groups is None else torch.tensor(groups)
    names = tuple(f"class {c}" for c in range(classes))
    return Labelled(ids, tuple(f"text of {id}" for id in ids), torch.tensor(labels), names, groups, tuple(clusters))


SHARE_LISTS = st.lists(st.integers(1, 10), min_size=1, max_size=5).map(
    lambda parts: {f"part {i}": part / sum(parts) for i, part in enumerate(parts)}
)
ROWS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=60, max_size=200)


@given(ROWS, SHARE_LISTS, st.integers(0, 5), st.booleans())
def test_every_split_has_its_share_of_every_label_and_group(rows, shares, seed, grouped):
    labels, groups = map(list, zip(*rows, strict=True))
    data = texts(labels, groups=groups if grouped else None)
    strata = list(zip(labels, groups, strict=True)) if grouped else labels
    of = dict(zip(data.ids, strata, strict=True))
    assume(min(shares.values()) * len(rows) >= len(set(strata)))  # else rounding may leave a split empty
    parts = split(data, shares, seed)
    assert list(parts) == list(shares)
    assert sorted(id for part in parts.values() for id in part.ids) == sorted(data.ids)
    totals = Counter(strata)
    for name, part in parts.items():
        have = Counter(of[id] for id in part.ids)
        for stratum, total in totals.items():
            assert abs(have[stratum] - shares[name] * total) < 1 + 1e-9
        for id, text, label in zip(part.ids, part.inputs, part.labels.tolist(), strict=True):
            assert text == f"text of {id}"
            assert label == labels[int(id[1:])]
        assert list(part.ids) == sorted(part.ids, key=lambda id: int(id[1:]))


@given(st.lists(st.integers(0, 40), min_size=80, max_size=200), st.integers(0, 5), st.randoms(use_true_random=False))
def test_clusters_stay_whole_and_shares_nearly(clusters, seed, chance):
    assume(len(set(clusters)) >= 10)
    labels = [chance.randrange(3) for _ in clusters]
    data = texts(labels, clusters=[f"c{c}" for c in clusters])
    shares = {"train": 0.5, "tune": 0.25, "test": 0.25}
    parts = split(data, shares, seed)
    homes = [set(part.clusters) for part in parts.values()]
    assert sum(map(len, homes)) == len(set(clusters))
    assert sum(len(part) for part in parts.values()) == len(labels)
    biggest = max(Counter(clusters).values())
    for name, part in parts.items():
        assert abs(len(part) - shares[name] * len(labels)) <= 2 * biggest + 3


def test_clusters_of_mixed_labels_keep_the_labels_in_proportion():
    labels = [0, 1, 2] * 400
    data = texts(labels, clusters=[f"c{i // 4}" for i in range(1200)])
    for name, part in split(data, SHARES, seed=3).items():
        for count in part.counts:
            assert abs(count - SHARES[name] * 400) <= 4


def test_the_seed_decides():
    data = texts([0, 1, 2] * 100)
    one, same, other = (split(data, seed=seed) for seed in (1, 1, 2))
    assert {name: part.ids for name, part in one.items()} == {name: part.ids for name, part in same.items()}
    assert one["train"].ids != other["train"].ids
    assert [len(part) for part in one.values()] == [180, 30, 30, 30, 30]


def test_a_published_test_split_stays_as_it_is():
    data, test = texts([0, 1, 2] * 90), texts([0, 1, 2] * 10, prefix="t")
    parts = split(data, test=test)
    assert parts["test"] is test
    assert [len(part) for part in parts.values()] == [180, 30, 30, 30, 30]
    with pytest.raises(ValueError, match="27 rows of the test split are in the data too, such as 'r0', there 'r0'"):
        split(data, test=texts([0, 1, 2] * 9))


# ---------------------------------------------------------------- equal rows


def test_a_test_split_is_compared_by_what_its_rows_hold_not_by_where_they_stand():
    data, test = texts([0, 1, 2] * 90), texts([0, 1, 2] * 10)
    fresh = replace(test, inputs=tuple(f"new {text}" for text in test.inputs))  # the same ids
    found = split(data, test=fresh)
    assert found["test"].inputs == fresh.inputs
    assert found["test"].ids == tuple(f"test/r{i}" for i in range(30))
    assert len({id for part in found.values() for id in part.ids}) == 300
    copied = replace(test, ids=tuple(f"s{i}" for i in range(30)), inputs=(*fresh.inputs[1:], data.inputs[7]))
    with pytest.raises(ValueError, match="1 rows of the test split are in the data too, such as 's29', there 'r7'"):
        split(data, test=copied)


@given(st.integers(100, 200), st.integers(0, 500), st.booleans())
def test_equal_rows_stay_in_one_split(count, seed, clustered):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count).tolist()  # copies may have other labels
    clusters = [f"c{c}" for c in random.integers(0, count, count)] if clustered else ()
    data = replace(texts(labels, clusters=clusters), inputs=tuple(map(str, random.integers(0, 3 * count, count))))
    parts = split(data, {"a": 0.6, "b": 0.4}, seed)
    assert not set(parts["a"].inputs) & set(parts["b"].inputs)
    assert not set(parts["a"].clusters) & set(parts["b"].clusters)
    assert sorted(parts["a"].ids + parts["b"].ids) == sorted(data.ids)


def test_rows_without_copies_are_divided_as_if_there_were_none():
    data = texts([0, 1, 2] * 100)
    copies = replace(data, inputs=(data.inputs[17], *data.inputs[1:17], data.inputs[17], *data.inputs[18:]))
    for clusters in ((), tuple(f"c{i % 60}" for i in range(300))):
        before, after = (split(replace(rows, clusters=clusters), seed=4) for rows in (data, copies))
        of = [{id: name for name, part in parts.items() for id in part.ids} for parts in (before, after)]
        if not clusters:
            assert {id for id in data.ids if of[0][id] != of[1][id]} <= {"r17"}
        assert of[1]["r0"] == of[1]["r17"]
    assert {part.digest() for part in before.values()} == {
        part.digest() for part in split(replace(data, clusters=clusters), seed=4).values()
    }


def test_images_in_memory_are_equal_by_their_values():
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 3, 1), dtype=np.uint8)
    images[31] = images[4]
    labels = torch.arange(40) % 2
    data = Labelled(tuple(f"i{row}" for row in range(40)), images, labels, ("a", "b"))
    for seed in range(6):
        homes = {id: name for name, part in split(data, {"x": 0.5, "y": 0.5}, seed).items() for id in part.ids}
        assert homes["i4"] == homes["i31"]
    test = data.take([0, 4])
    assert without(data, test).ids == tuple(f"i{row}" for row in range(40) if row not in (0, 4, 31))
    assert without(data.take([1, 2]), test).ids == ("i1", "i2")


def test_files_are_compared_by_their_bytes_and_read_if_another_is_as_long(tmp_path, monkeypatch):
    for name, content in (("a", b"123"), ("b", b"124"), ("c", b"12345"), ("d", b"123")):
        (tmp_path / name).write_bytes(content)
    files = ImageFiles(tuple(tmp_path / name for name in "abcd"))
    read, digest = [], labelled.of_file
    monkeypatch.setattr(labelled, "of_file", lambda path: read.append(path.name) or digest(path))
    ((a, b, c, d),) = contents(files)
    assert a == d
    assert len({a, b, c}) == 3
    assert read == ["a", "b", "d"]
    part = Part(Part(files, np.array([3, 2, 1])), np.array([0, 1]))
    (one, two) = contents(files, part)
    assert [key in one for key in two] == [True, True]
    assert two[0] == one[0] == one[3]


def test_rows_and_clusters_may_be_in_one_split_only():
    one, other = texts([0, 1], clusters=["a", "b"]), texts([0, 1], clusters=["c", "b"], prefix="s")
    with pytest.raises(ValueError, match="splits x and y share 1 clusters, such as 'b'"):
        require_apart(x=one, y=other)
    require_apart(x=one.take([0]), y=other)
    with pytest.raises(ValueError, match="share 2 rows"):
        require_apart(x=one, y=one, z=other)


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}])
def test_shares_must_add_up(shares):
    with pytest.raises(ValueError, match="above 0 that add up to 1"):
        split(texts([0, 1, 2]), shares)


def test_too_few_rows_say_so():
    with pytest.raises(ValueError, match="has 3 rows, too few"):
        split(texts([0, 1, 2]))
    with pytest.raises(ValueError, match="60 rows, 2 of them distinct, too few"):
        split(replace(texts([0, 1, 2] * 20), inputs=("a", "b") * 30))
    with pytest.raises(ValueError, match="6 rows in 1 clusters, too few"):
        split(texts([0, 1, 2] * 2, clusters=["same"] * 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ("a", "b", "a")}, "several rows with the id 'a'"),
        ({"labels": torch.tensor([0, 1])}, "3 ids but 2 labels"),
        ({"labels": torch.tensor([0, 2, 1])}, r"row b has the label 2; allowed are 0\.\.1"),
        ({"labels": torch.tensor([0, 0, -1])}, "row c has the label -1"),
        ({"groups": torch.tensor([0])}, "1 groups"),
        ({"clusters": ("x",)}, "1 clusters"),
    ],
)
def test_bad_rows_are_refused(change, message):
    fine = {"ids": ("a", "b", "c"), "inputs": ("x", "y", "z"), "labels": torch.tensor([0, 1, 0]), "classes": ("n", "p")}
    Labelled(**fine)
    with pytest.raises(ValueError, match=message):
        Labelled(**{**fine, **change})


def test_the_digest_sees_every_change():
    images = np.zeros((2, 3, 3, 1), np.uint8)
    data = Labelled(("a", "b"), images, torch.tensor([0, 1]), ("n", "p"))
    changed = images.copy()
    changed[1, 2, 2, 0] = 1
    others = [
        Labelled(("a", "b"), changed, torch.tensor([0, 1]), ("n", "p")),
        Labelled(("a", "b"), images, torch.tensor([1, 1]), ("n", "p")),
        Labelled(("a", "c"), images, torch.tensor([0, 1]), ("n", "p")),
        Labelled(("a", "b"), images, torch.tensor([0, 1]), ("n", "p"), torch.tensor([0, 1])),
    ]
    digests = {other.digest() for other in others}
    assert len(digests) == 4
    assert data.digest() not in digests
    assert data.digest() == data.take([0, 1]).digest() != data.take([1, 0]).digest()


def test_a_digest_changes_with_the_sizes_of_files(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    data = Labelled(("1", "2"), ImageFiles((tmp_path / "a", tmp_path / "b")), torch.tensor([0, 1]), ("n", "p"))
    before, part = data.digest(), data.take([1]).digest()
    (tmp_path / "a").write_bytes(b"another picture")
    assert data.digest() != before
    assert data.take([1]).digest() == part

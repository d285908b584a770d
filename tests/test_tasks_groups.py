"""Sets with groups from published layouts in miniature, and what is wrong with them said with file and row."""

import csv
import json
import random

import numpy as np
import pytest
import torch

from offramp.metrics.groups import Groups
from offramp.tasks.group_files import GroupLayout, SquareImages, load_celeba, load_grouped, load_waterbirds
from offramp.tasks.group_sets import Grouped, GroupedSet
from offramp.tasks.group_texts import (
    EXTENDED,
    FILE,
    IDENTITIES,
    METADATA,
    MULTINLI,
    PUBLISHED,
    SNLI_FILES,
    has_negation,
    load_civilcomments,
    load_multinli,
    load_snli,
)
from offramp.tasks.labelled import Labelled

Image = pytest.importorskip("PIL.Image")


def table(path, head, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def edit(path, old, new):
    """Change a file that has the text once."""
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def image(path, size=(40, 30), colour=(10, 200, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


# ---------------------------------------------------------------- Waterbirds

BIRDS = [  # y, split, place
    (0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (1, 0, 1), (0, 1, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1), (0, 2, 1),
    (1, 2, 0), (0, 2, 0), (1, 2, 1),
]  # fmt: skip


@pytest.fixture
def waterbirds(tmp_path):
    folder = tmp_path / "waterbird_complete95_forest2water2"
    rows = []
    for n, (y, split, place) in enumerate(BIRDS, 1):
        name = f"{n:03d}.Bird/Bird_{n:04d}.jpg"
        image(folder / name)
        rows.append([n, name, y, split, place, f"/f/forest/{n}.jpg"])
    table(folder / "metadata.csv", ["img_id", "img_filename", "y", "split", "place", "place_filename"], rows)
    return folder


def test_waterbirds(waterbirds):
    data = load_waterbirds(waterbirds, size=16)
    assert load_waterbirds(waterbirds.parent, size=16).counts() == data.counts()
    names = ["landbird, land", "landbird, water", "waterbird, land", "waterbird, water"]
    assert data.counts()["train"] == dict(zip(names, [1, 1, 1, 2], strict=True))
    for number, (name, split) in enumerate(data.splits.items()):
        wanted = [(y, 2 * y + place) for y, s, place in BIRDS if s == number]
        assert list(zip(split.rows.labels.tolist(), split.rows.groups.tolist(), strict=True)) == wanted, name
    pixels = data.train.rows.inputs[np.array([0, 2])]
    assert pixels.shape == (2, 16, 16, 3)
    assert abs(pixels.reshape(-1, 3).mean(0) - (10, 200, 30)).max() < 5
    assert data.source == "published split"
    data.require_groups("train", "val", "test")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "img_id,img_filename,y,split,place,",
            "img_id,img_filename,y,split,background,",
            "line 1 lacks the column 'pla",
        ),
        ("2,002.Bird/Bird_0002.jpg,0,0,1,", "2,002.Bird/Bird_0002.jpg,2,0,1,", "line 3 has '2' as y; allowed are 0, 1"),
        ("2,002.Bird/Bird_0002.jpg,0,0,1,", "2,002.Bird/Bird_0002.jpg,0,3,1,", "line 3 has '3' as split"),
        (
            "2,002.Bird/Bird_0002.jpg,0,0,1,",
            "2,002.Bird/Bird_0002.jpg,0,1,",
            "line 3 has 5 columns, but the header has 6",
        ),
    ],
)
def test_waterbirds_with_a_wrong_row(waterbirds, old, new, said):
    edit(waterbirds / "metadata.csv", old, new)
    with pytest.raises(ValueError, match=said):
        load_waterbirds(waterbirds)


def test_waterbirds_with_something_missing(waterbirds):
    (waterbirds / "002.Bird/Bird_0002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata.csv, line 3 names .*Bird_0002.jpg, which is missing"):
        load_waterbirds(waterbirds)
    (waterbirds / "metadata.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata.csv is missing, the table of Waterbirds; nothing is downl"):
        load_waterbirds(waterbirds)


def test_images_are_cut_as_group_dro_does(tmp_path):
    draw = np.random.default_rng(0)
    face = draw.integers(0, 256, (218, 178, 3), dtype=np.uint8)
    Image.fromarray(face).save(tmp_path / "face.png")
    whole = Image.open(tmp_path / "face.png")
    squeezed = whole.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
    np.testing.assert_array_equal(SquareImages((tmp_path / "face.png",))[np.array([0])][0], np.asarray(squeezed))
    middle = whole.crop((0, 20, 178, 198)).resize((224, 224), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(
        SquareImages((tmp_path / "face.png",), crop=178)[np.array([0])][0], np.asarray(middle)
    )


# ---------------------------------------------------------------- CelebA

FACES = [  # blond, male, partition
    (-1, -1, 0), (-1, 1, 0), (1, -1, 0), (1, 1, 0), (-1, -1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, 1), (1, 1, 2),
    (-1, -1, 2), (-1, 1, 2), (1, -1, 2),
]  # fmt: skip


@pytest.fixture
def celeba(tmp_path):
    names = [f"{n:06d}.jpg" for n in range(1, len(FACES) + 1)]
    head = ["image_id", "5_o_Clock_Shadow", "Blond_Hair", "Male", "Young"]
    rows = [[name, 1, blond, male, -1] for name, (blond, male, _) in zip(names, FACES, strict=True)]
    table(tmp_path / "data" / "list_attr_celeba.csv", head, rows)
    parts = [[name, part] for name, (_, _, part) in zip(names, FACES, strict=True)]
    table(tmp_path / "data" / "list_eval_partition.csv", ["image_id", "partition"], parts)
    for name in names:
        image(tmp_path / "data" / "img_align_celeba" / name, (178, 218))
    return tmp_path


def test_celeba(celeba):
    data = load_celeba(celeba, size=8)  # with data/, as in group_DRO
    assert load_celeba(celeba / "data", size=8).counts() == data.counts()  # and without
    names = ["not blond, female", "not blond, male", "blond, female", "blond, male"]
    assert list(data.counts()["test"]) == names
    wanted = [(blond > 0) * 2 + (male > 0) for blond, male, part in FACES if part == 2]
    assert data.test.rows.groups.tolist() == wanted
    assert data.test.rows.inputs[np.array([0])].shape == (1, 8, 8, 3)
    young = load_celeba(celeba, target="Young", spurious="Blond_Hair")
    assert young.classes == ("not Young", "Young")


def test_celeba_with_something_wrong(celeba):
    partition = celeba / "data" / "list_eval_partition.csv"
    text = partition.read_text()
    edit(partition, "000003.jpg,0", "000004.jpg,0")
    with pytest.raises(
        ValueError, match=r"partition.csv, line 4 is about '000004.jpg', but .*line 4 about '000003.jpg'"
    ):
        load_celeba(celeba)
    partition.write_text(text[: text.rindex("000012")])
    with pytest.raises(ValueError, match="has 11 rows, .* 12; fetch again"):
        load_celeba(celeba)
    partition.write_text(text)
    edit(celeba / "data" / "list_attr_celeba.csv", "000002.jpg,1,-1,1,-1", "000002.jpg,1,0,1,-1")
    with pytest.raises(ValueError, match="line 3 has '0' as Blond_Hair; allowed are -1, 1"):
        load_celeba(celeba)
    with pytest.raises(ValueError, match="line 1 lacks the column 'Hat'"):
        load_celeba(celeba, spurious="Hat")
    partition.unlink()
    with pytest.raises(FileNotFoundError, match="list_eval_partition.csv is missing"):
        load_celeba(celeba)


# ---------------------------------------------------------------- MultiNLI

LABELS = ("contradiction", "entailment", "neutral", "-")


def sentences(count, seed):
    draw = random.Random(seed)
    rows = []
    for n in range(count):
        hypothesis = f"Somebody did {'Nothing!' if draw.random() < 0.3 else 'something'} {n}"
        rows.append({"gold_label": draw.choice(LABELS), "sentence1": f"Premise {n // 3}.", "sentence2": hypothesis})
    return rows


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def multinli(tmp_path):
    pool = sentences(200, seed=0)
    for name, rows in zip(MULTINLI, (pool[:160], pool[160:180], pool[180:]), strict=True):
        jsonl(tmp_path / name, rows)
    return tmp_path, pool


def published(pool, draw):
    """metadata_random.csv as the script of group_DRO writes it: undisputed rows under their place in the pool."""
    rows = []
    for at, row in enumerate(pool):
        if row["gold_label"] != "-":
            negation = int("nothing" in row["sentence2"].lower())
            rows.append([at, LABELS.index(row["gold_label"]), negation, draw.randrange(3)])
    return rows


def test_multinli_in_the_published_split(multinli):
    folder, pool = multinli
    rows = published(pool, random.Random(1))
    table(folder / METADATA, ["", "gold_label", "sentence2_has_negation", "split"], rows)
    data = load_multinli(folder)
    assert "published split" in data.source
    for number, split in enumerate(data.splits.values()):
        wanted = [row for row in rows if row[3] == number]
        assert split.rows.ids == tuple(f"row {row[0]}" for row in wanted)
        assert split.rows.labels.tolist() == [row[1] for row in wanted]
        assert split.rows.groups.tolist() == [2 * row[1] + row[2] for row in wanted]
        assert split.rows.inputs == tuple((pool[r[0]]["sentence1"], pool[r[0]]["sentence2"]) for r in wanted)
    assert list(data.counts()["train"])[1] == "contradiction, negation"


def test_multinli_in_a_split_of_our_own(multinli):
    folder, pool = multinli
    data = load_multinli(folder, seed=3)
    assert "own split, seed 3" in data.source
    ids = sorted(int(id.split()[1]) for split in data.splits.values() for id in split.rows.ids)
    assert ids == [at for at, row in enumerate(pool) if row["gold_label"] != "-"]
    assert data.train.rows.ids == load_multinli(folder, seed=3).train.rows.ids
    assert data.train.rows.ids != load_multinli(folder, seed=4).train.rows.ids


def test_multinli_with_metadata_of_other_files(multinli):
    folder, pool = multinli
    rows = published(pool, random.Random(1))
    head = ["", "gold_label", "sentence2_has_negation", "split"]
    flipped = [*rows[:4], [*rows[4][:2], 1 - rows[4][2], rows[4][3]], *rows[5:]]
    table(folder / METADATA, head, flipped)
    with pytest.raises(ValueError, match=r"metadata_random.csv, line 6 says .* do not belong together"):
        load_multinli(folder)
    table(folder / METADATA, head, rows[:-1])
    with pytest.raises(ValueError, match=rf"says nothing of row {rows[-1][0]}"):
        load_multinli(folder)
    table(folder / METADATA, head, [[9999, 0, 0, 0], *rows])
    with pytest.raises(ValueError, match="line 2 is about row '9999'"):
        load_multinli(folder)
    table(folder / METADATA, ["", "gold_label", "negation", "split"], rows)
    with pytest.raises(ValueError, match="lacks the column 'sentence2_has_negation'"):
        load_multinli(folder)


def test_multinli_with_something_wrong(multinli):
    folder, pool = multinli
    jsonl(folder / MULTINLI[1], [{**pool[160], "gold_label": "hidden"}])
    with pytest.raises(ValueError, match=r"dev_matched.jsonl, line 1 has the label 'hidden'"):
        load_multinli(folder)
    jsonl(folder / MULTINLI[1], [pool[160], {"gold_label": "neutral", "sentence1": "a"}])
    with pytest.raises(ValueError, match=r"line 2 has no text under 'sentence2'"):
        load_multinli(folder)
    jsonl(folder / MULTINLI[1], [pool[160], ["neutral", "a", "b"]])
    with pytest.raises(
        ValueError, match=r"line 2: list .* stands where an object with 'gold_label', 'sentence1', .* must"
    ):
        load_multinli(folder)
    (folder / MULTINLI[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"dev_matched.jsonl is missing; nothing is downloaded"):
        load_multinli(folder)


@pytest.mark.parametrize(
    ("text", "published_rule", "extended_rule"),
    [
        ("He said: NOTHING.", True, True),
        ("They don't know", False, False),  # one word, dont
        ("It is not here", False, True),
        ("know nobody's name", False, False),  # nobodys
        ("a notable nope", False, False),
        ("did n't", False, True),
    ],
)
def test_negation(text, published_rule, extended_rule):
    assert has_negation(text, PUBLISHED) == published_rule
    assert has_negation(text, EXTENDED) == extended_rule


def test_unknown_negation_rule():
    with pytest.raises(ValueError, match="the negation rule is 'five words'; allowed are 'four words', 'twelve words'"):
        has_negation("no", "five words")


# ---------------------------------------------------------------- SNLI


def test_snli_is_divided_by_premise_with_a_share_of_each_group(tmp_path):
    pool = [{**row, "pairID": f"p{n}"} for n, row in enumerate(sentences(1200, seed=5))]
    for name, part in zip(SNLI_FILES, (pool[:1000], pool[1000:1100], pool[1100:]), strict=True):
        jsonl(tmp_path / name, part)
    data = load_snli(tmp_path, seed=1)
    kept = {row["pairID"] for row in pool if row["gold_label"] != "-"}
    assert {id for split in data.splits.values() for id in split.rows.ids} == kept
    premises = [{premise for premise, _ in split.rows.inputs} for split in data.splits.values()]
    assert not premises[0] & premises[1]
    assert not premises[0] & premises[2]
    assert not premises[1] & premises[2]
    total = {group: sum(counts[group] for counts in data.counts().values()) for group in data.counts()["train"]}
    for name, share in (("train", 0.5), ("val", 0.2), ("test", 0.3)):
        for group, count in data.counts()[name].items():
            assert abs(count - share * total[group]) <= 4, (name, group)
    assert data.train.rows.ids == load_snli(tmp_path, seed=1).train.rows.ids
    (tmp_path / SNLI_FILES[2]).unlink()
    with pytest.raises(FileNotFoundError, match="snli_1.0_test.jsonl is missing"):
        load_snli(tmp_path)


def test_snli_from_one_table(tmp_path):
    lines = ["premise\thypothesis\tlabel"]
    lines += [f"Premise {n // 3}.\tIt is {'not ' if n % 5 == 0 else ''}{n}\t{n % 3}" for n in range(300)]
    (tmp_path / "dev.tsv").write_text("\n".join(lines) + "\n")
    data = load_snli(tmp_path / "dev.tsv")
    assert data.classes == ("contradiction", "entailment", "neutral")
    seen = {}
    for split in data.splits.values():
        for (_, hypothesis), label, group in zip(split.rows.inputs, split.rows.labels, split.rows.groups, strict=True):
            seen[hypothesis] = (int(label), int(group))
    assert seen["It is not 0"] == (1, 3)  # 0 is entailment there, the second class here
    assert seen["It is 2"] == (0, 0)
    assert len(seen) == 300


# ---------------------------------------------------------------- CivilComments


def comments(folder, rows, head=("comment_text", "split", "toxicity", *IDENTITIES, "identity_any", "rating")):
    table(folder / FILE, ["", *head], [[n, *row] for n, row in enumerate(rows)])


def comment(split, toxicity, *mentioned):
    values = [0.6 if identity in mentioned else 0.0 for identity in IDENTITIES]
    return ["Text, with a comma\nand two lines", split, toxicity, *values, 1.0 if mentioned else 0.0, "approved"]


def test_civilcomments(tmp_path):
    rows = [
        comment("train", 0.5, "male", "black"), comment("train", 0.49, "black"), comment("train", 1.0),
        comment("val", 0.0, "white"), comment("test", 0.9, "muslim"),
    ]  # fmt: skip
    comments(tmp_path, rows)
    data = load_civilcomments(tmp_path)
    assert len(data.train.groups.names) == 16
    assert data.train.rows.labels.tolist() == [1, 0, 1]
    named = {name: m.tolist() for name, m in zip(data.train.groups.names, data.train.groups.members.T, strict=True)}
    assert named["male, toxic"] == [True, False, False]
    assert named["black, toxic"] == [True, False, False]
    assert named["black, non-toxic"] == [False, True, False]
    assert data.train.groups.overlap
    assert data.train.rows.groups is None  # no one number says it
    assert data.train.rows.inputs[0] == "Text, with a comma\nand two lines"
    four = load_civilcomments(tmp_path, grouping="any")
    assert four.train.rows.groups.tolist() == [3, 1, 2]
    with pytest.raises(ValueError, match="group 'male, non-toxic' has no row in split 'train of civilcomments'"):
        data.require_groups("train")


def test_civilcomments_with_something_wrong(tmp_path):
    comments(tmp_path, [comment("train", 0.5), comment("train", "high")])
    with pytest.raises(ValueError, match="has 'high' as toxicity; a number in"):
        load_civilcomments(tmp_path)
    comments(tmp_path, [comment("dev", 0.5)])
    with pytest.raises(ValueError, match="has 'dev' as split; allowed are train, val, test"):
        load_civilcomments(tmp_path)
    comments(tmp_path, [], head=("comment_text", "split", "toxicity"))
    with pytest.raises(ValueError, match="line 1 lacks the column 'male' of CivilComments"):
        load_civilcomments(tmp_path)
    with pytest.raises(ValueError, match="grouping is 'all'; allowed are 'identities', 'any'"):
        load_civilcomments(tmp_path, grouping="all")


# ---------------------------------------------------------------- any file


def test_csv_with_images_and_attributes_missing_in_one_split(tmp_path):
    for name in "pqrs":
        image(tmp_path / f"{name}.png", (20, 20))
    rows = [["i1", "p.png", "train", "cat", ""], ["i2", "q.png", "train", "dog", "?"]]
    rows += [["i3", "r.png", "val", "dog", "sofa"], ["i4", "s.png", "val", "cat", "lawn"]]
    table(tmp_path / "pets.csv", ["id", "filename", "split", "y", "a"], rows)
    data = load_grouped(tmp_path / "pets.csv", GroupLayout(size=8))
    assert data.classes == ("cat", "dog")
    assert data.train.groups is None
    assert data.train.attributes["a"].tolist() == [-1, -1]
    assert data.val.rows.groups.tolist() == [3, 0]  # 2 x dog + sofa
    assert data.val.groups.names[3] == "dog, a sofa"
    assert data.val.rows.inputs[np.array([1])].shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match="pets has no groups in split 'train'"):
        data.require_groups("train")


def test_jsonl_with_groups_that_overlap(tmp_path):
    rows = [
        {"text": "a", "split": 0, "y": 1, "old": 1, "rich": 1},
        {"text": "b", "split": 0, "y": 0, "old": None, "rich": 1},
        {"text": "c", "split": 2, "y": 0, "old": 0, "rich": 0},
    ]
    jsonl(tmp_path / "rows.jsonl", rows)
    layout = GroupLayout(text="text", id=None, attributes=("old", "rich"), overlapping=True)
    data = load_grouped(tmp_path / "rows.jsonl", layout)
    assert data.train.groups.names == ("old, 0", "old, 1", "rich, 0", "rich, 1")
    assert data.train.groups.members.int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]
    assert data.train.rows.ids == ("line 1", "line 2")
    assert data.test.groups.counts.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("rows", "layout", "said"),
    [
        ([["a", "t", "dev", "0", "0"]], {}, "line 2 has the split 'dev'; allowed are train, val, test, 0, 1, 2"),
        ([["a", "t", "0", "2", "0"]], {"classes": ("0", "1")}, "line 2 has '2' as y; allowed are 0, 1"),
        ([["a", "t", "0", "0", "7"]], {"overlapping": True}, "line 2 has '7' as a; allowed are 0, 1"),
        ([["a", "t", "0", "0", "0"]], {"attributes": ("colour",)}, "line 1 lacks the column 'colour'"),
        ([["a", "t", "0", "0", "0"], ["a", "u", "1", "0", "0"]], {}, "share 1 rows, such as 'a'"),
        ([], {}, "holds no row"),
        ([["a", " ", "0", "0", "0"]], {}, "line 2 has an empty text in column 'text'"),
        ([["a", "t", "0", "", "0"], ["b", "t", "0", "1", "0"]], {}, "line 2 has '' as y; allowed are 1"),
    ],
)
def test_csv_with_something_wrong(tmp_path, rows, layout, said):
    table(tmp_path / "rows.csv", ["id", "text", "split", "y", "a"], rows)
    with pytest.raises(ValueError, match=said):
        load_grouped(tmp_path / "rows.csv", GroupLayout(text="text", **layout))


def test_blanks_around_labels_and_attributes_are_no_part_of_them(tmp_path):
    rows = [["a", "t", "train ", " cat", "x"], ["b", "u", "train", "cat", "x "], ["c", "v", "train", "dog", "x"]]
    table(tmp_path / "rows.csv", ["id", "text", "split", "y", "a"], rows)
    with pytest.warns(UserWarning, match="3 labels, attributes or splits were read without blanks around them"):
        data = load_grouped(tmp_path / "rows.csv", GroupLayout(text="text"))
    assert data.classes == ("cat", "dog")
    assert data.train.attributes["a"].tolist() == [0, 0, 0]


def test_numbers_in_json_are_one_label_however_they_are_written(tmp_path):
    rows = [{"text": "a", "split": 0, "y": y, "a": 0} for y in (1, 1.0, "1", 0)]
    jsonl(tmp_path / "rows.jsonl", rows)
    data = load_grouped(tmp_path / "rows.jsonl", GroupLayout(text="text", id=None))
    assert data.train.rows.labels.tolist() == [1, 1, 1, 0]
    jsonl(tmp_path / "rows.jsonl", [{"text": "a", "split": 0, "y": 0.5, "a": 0}])
    with pytest.raises(ValueError, match="line 1 has no text or whole number under 'y', but 0.5"):
        load_grouped(tmp_path / "rows.jsonl", GroupLayout(text="text", id=None))


def test_several_attributes_without_overlap_are_refused():
    with pytest.raises(ValueError, match="the attributes are a, b; give one, or say that groups overlap"):
        GroupLayout(attributes=("a", "b"))


# ---------------------------------------------------------------- the types


def labelled(ids, groups=None):
    return Labelled(tuple(ids), tuple(ids), torch.zeros(len(ids), dtype=torch.long), ("a", "b"))


def test_taking_rows_keeps_what_belongs_together():
    groups = Groups.by_number(torch.tensor([0, 1, -1, 1]), ["x", "y"])
    split = Grouped.of(labelled("pqrs"), {"a": torch.tensor([5, 6, 7, 8])}, groups, torch.tensor([1, 1, 2, 2]))
    assert split.rows.groups is None  # one row is in no group
    some = split.take([3, 0])
    assert some.rows.ids == ("s", "p")
    assert some.attributes["a"].tolist() == [8, 5]
    assert some.groups.numbers().tolist() == [1, 0]
    assert some.pairs.tolist() == [2, 1]
    blind = split.without_groups()
    assert blind.groups is None
    assert blind.attributes["a"].tolist() == [-1] * 4
    assert blind.rows.groups is None


def test_sets_whose_parts_do_not_fit_are_refused():
    one = Grouped.of(labelled("pq"), {}, Groups.by_number(torch.tensor([0, 0]), ["x", "y"]))
    other = Grouped.of(labelled("rs"), {}, Groups.by_number(torch.tensor([0, 0]), ["x", "z"]))
    with pytest.raises(ValueError, match="the groups of test are"):
        GroupedSet("set", {"train": one, "test": other}, "")
    with pytest.raises(ValueError, match="share 2 rows"):
        GroupedSet("set", {"train": one, "test": one}, "")
    with pytest.raises(ValueError, match="group 'y' has no row in split 'train of set'"):
        GroupedSet("set", {"train": one}, "").require_groups("train")
    with pytest.raises(ValueError, match="2 rows but 3 numbers of pairs"):
        Grouped(labelled("pq"), pairs=torch.zeros(3))

"""MultiNLI, SNLI and CivilComments with their groups, from local files as they are published. Nothing is downloaded.

Groups of pairs of sentences are label x negation, those of comments identity x label, which overlap.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from offramp.metrics.groups import Groups
from offramp.tasks.group_sets import SPLITS, Grouped, GroupedSet
from offramp.tasks.labelled import Labelled, split
from offramp.tasks.labelled_text import SNLI, SNLI_PUBLISHED, read_labelled_text
from offramp.tasks.rows import Row, json_rows, objects, one_of, share, table_rows
from offramp.values import choice

CLASSES = ("contradiction", "entailment", "neutral")
MULTINLI = ("multinli_1.0_train.jsonl", "multinli_1.0_dev_matched.jsonl", "multinli_1.0_dev_mismatched.jsonl")
METADATA = "metadata_random.csv"
SNLI_FILES = ("snli_1.0_train.jsonl", "snli_1.0_dev.jsonl", "snli_1.0_test.jsonl")
SHARES: Mapping[str, float] = MappingProxyType({"train": 0.5, "val": 0.2, "test": 0.3})

PUBLISHED = "four words"
EXTENDED = "twelve words"
RULES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        PUBLISHED: frozenset({"nobody", "no", "never", "nothing"}),
        EXTENDED: frozenset(
            {"nobody", "no", "never", "nothing", "not", "nt", "none", "without", "nowhere", "neither", "nor", "cannot"}
        ),
    }
)
"""Lists by name. Four words: Gururangan et al. (2018, arXiv 1803.02324), as group_DRO uses them for MultiNLI. The
longer list is ours, for SNLI, where the four are too rare."""
VALUES = ("no negation", "negation")

_FIELDS = ("gold_label", "sentence1", "sentence2")
_DISPUTED = "-"
"""Stands for a label that the annotators did not agree on."""


_DROP = str.maketrans("", "", string.punctuation)


def has_negation(text: str, rule: str = PUBLISHED) -> bool:
    """Whether a hypothesis has one of the words of a rule, a name in `RULES`; a ValueError for any other.

    As group_DRO looks: punctuation removed, so that "don't" is one word "dont"; lower case; divided at single blanks.

    Returns:
        Whether it does.
    """
    choice("the negation rule", rule, tuple(RULES))
    return not RULES[rule].isdisjoint(text.translate(_DROP).lower().split(" "))


def load_multinli(folder: str | Path, *, rule: str = PUBLISHED, seed: int = 0) -> GroupedSet:
    """MultiNLI (Williams et al., 2018) with the groups of group_DRO: 2y + negation in the hypothesis.

    The three files are pooled (412,702 rows), divided 50/20/30, and disputed rows dropped. The published division was
    drawn without a seed: results compare with others' only if metadata_random.csv is there.

    Args:
        folder: Holds `MULTINLI`, and metadata_random.csv if the published split is wanted.
        rule: A name in `RULES`.
        seed: Of our own split, without metadata_random.csv.

    Returns:
        Pairs (premise, hypothesis), with the attribute "negation"; `source` says which split it is.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A row is wrong, or metadata_random.csv belongs to other files.
    """
    folder = Path(folder)
    rows = [row for name in MULTINLI for row in _published(folder / name)]
    if (folder / METADATA).exists():
        where: Mapping[int, str] = _published_split(folder / METADATA, rows)
        source = "published split"
    else:
        where, source = dict(enumerate(_own_split(len(rows), seed))), f"own split, seed {seed}"
    found = {}
    for name in SPLITS:
        at = [i for i in range(len(rows)) if where[i] == name and rows[i].value["gold_label"] != _DISPUTED]
        found[name] = _grouped([rows[i] for i in at], [f"row {i}" for i in at], rule, f"MultiNLI, {name}")
    return GroupedSet("multinli", found, f"{source}, negation by {rule}")


def load_snli(
    path: str | Path, *, rule: str = EXTENDED, seed: int = 0, files: Sequence[str] = SNLI_FILES
) -> GroupedSet:
    """SNLI (Bowman et al., 2015), pooled and divided anew by premise, 50/20/30.

    The official development and test splits cannot measure worst groups: they have 2 and 5 entailed and neutral
    hypotheses with one of the four words. So all is pooled, no premise is in two splits, every split has its share of
    each group, and negation is looked for with the longer list.

    Args:
        path: Folder with the official files, or one file with the header premise, hypothesis, label (0 entailment, 1
            neutral, 2 contradiction), such as `.tsv`, also with `.gz`.
        rule: A name in `RULES`.
        seed: Of the split.
        files: Names in the folder.

    Returns:
        Pairs (premise, hypothesis), with the attribute "negation". Look at `counts`: a report calls no group the worst
        that has fewer than 100 test rows.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A row is wrong, or there are too few rows for three splits.
    """
    path = Path(path)
    if path.is_dir():
        for name in files:
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path / name} is missing; nothing is downloaded, give SNLI as published")
        rows = [row for name in files for row in _published(path / name) if row.value["gold_label"] != _DISPUTED]
        whole = _grouped(rows, [row.value.get("pairID", row.place) for row in rows], rule, str(path))
    else:
        layout = SNLI if path.suffix != ".jsonl" else SNLI_PUBLISHED
        read = read_labelled_text(path, layout)
        renumbered = torch.tensor([CLASSES.index(name) for name in read.classes])[read.labels]
        whole = _with_groups(replace(read, labels=renumbered, classes=CLASSES), rule)
    numbered = replace(whole.rows, clusters=tuple(premise for premise, _ in _pairs(whole.rows)))
    place = {id: i for i, id in enumerate(numbered.ids)}
    parts = split(numbered, SHARES, seed)
    found = {name: whole.take([place[id] for id in part.ids]) for name, part in parts.items()}
    return GroupedSet("snli", found, f"own split by premise, seed {seed}, negation by {rule}")


def _published(path: Path) -> list[Row]:
    """The rows of an official file, their fields checked."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; nothing is downloaded, give the folder with the official files")
    rows = []
    for row in objects(json_rows(path), *_FIELDS):
        for key in _FIELDS:
            if not isinstance(row.value.get(key), str):
                raise ValueError(f"{row.place} has no text under {key!r}; give the file as published")
        if row.value["gold_label"] not in (*CLASSES, _DISPUTED):
            raise ValueError(
                f"{row.place} has the label {row.value['gold_label']!r}; allowed are {', '.join(CLASSES)} and "
                f"{_DISPUTED!r} for none"
            )
        rows.append(row)
    return rows


def _grouped(rows: Sequence[Row], ids: Sequence[str], rule: str, source: str) -> Grouped:
    pairs = tuple((row.value["sentence1"], row.value["sentence2"]) for row in rows)
    labels = torch.tensor([CLASSES.index(row.value["gold_label"]) for row in rows], dtype=torch.long)
    return _with_groups(Labelled(tuple(ids), pairs, labels, CLASSES, source=source), rule)


def _with_groups(rows: Labelled, rule: str) -> Grouped:
    negation = torch.tensor([int(has_negation(hypothesis, rule)) for _, hypothesis in _pairs(rows)], dtype=torch.long)
    return Grouped.crossed(rows, "negation", negation, VALUES)


def _pairs(rows: Labelled) -> tuple[tuple[str, str], ...]:
    return rows.inputs  # type: ignore[return-value]  # of both sets, these are pairs


def _own_split(rows: int, seed: int) -> list[str]:
    """group_DRO's division, but seeded: 20 % and 30 % of all rows, rounded down, and the rest for training."""
    val, test = int(SHARES["val"] * rows), int(SHARES["test"] * rows)
    names = np.repeat(np.array(SPLITS), [rows - val - test, val, test])
    return np.random.default_rng(seed).permutation(names).tolist()  # type: ignore[no-any-return]


def _published_split(path: Path, rows: Sequence[Row]) -> dict[int, str]:
    """The split of each row that metadata_random.csv names, which must be all but the disputed ones."""
    labels = {str(number): number for number in range(len(CLASSES))}
    where: dict[int, str] = {}
    for row in table_rows(path, ("gold_label", "sentence2_has_negation", "split"), what="MultiNLI's groups"):
        number = next(iter(row.value.values()))  # its first column has no name
        if not number.isdecimal() or int(number) >= len(rows):
            raise ValueError(f"{row.place} is about row {number!r}; the three files have rows 0..{len(rows) - 1}")
        at = int(number)
        label, said = CLASSES[one_of(row, "gold_label", labels)], rows[at].value
        negation = one_of(row, "sentence2_has_negation", {"0": False, "1": True})
        if label != said["gold_label"] or negation != has_negation(said["sentence2"]):
            raise ValueError(
                f"{row.place} says {label}, {VALUES[negation]}, but {rows[at].place} says {said['gold_label']}, "
                f"{VALUES[has_negation(said['sentence2'])]}: these files do not belong together"
            )
        if at in where:
            raise ValueError(f"{row.place} names row {at} a second time; give the file as published")
        where[at] = one_of(row, "split", {str(i): name for i, name in enumerate(SPLITS)})
    for at, row in enumerate(rows):
        if at not in where and row.value["gold_label"] != _DISPUTED:
            raise ValueError(f"{path} says nothing of row {at}, {row.place}; give the file as published")
        where.setdefault(at, "")
    return where


# ---------------------------------------------------------------- comments


FILE = "all_data_with_identities.csv"
TOXICITY = ("non-toxic", "toxic")
IDENTITIES = ("male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")
ANY = "identity_any"
GROUPINGS = ("identities", "any")


def load_civilcomments(folder: str | Path, *, grouping: str = "identities") -> GroupedSet:
    """CivilComments (Borkan et al., 2019) in the form of WILDS (Koh et al., 2021); scores of at least .5 count as yes.

    Never compare worst groups across groupings: with ERM they are quoted from 57 to 76 %.

    Args:
        folder: Holds all_data_with_identities.csv: comment_text, split, toxicity, eight identities, identity_any.
        grouping: "identities": 16 groups, identity x label, that overlap, as WILDS reports; "any": four groups, label x
            whether any identity is mentioned, as DEDIER uses.

    Returns:
        Texts, with nine attributes; the published split.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: A column is missing, a row is wrong, or there is no such grouping.
    """
    choice("grouping", grouping, GROUPINGS)
    names = (*IDENTITIES, ANY)
    parts: dict[str, tuple[list[str], list[str], list[int], list[list[int]]]] = {s: ([], [], [], []) for s in SPLITS}
    path = Path(folder) / FILE
    for row in table_rows(path, ("comment_text", "split", "toxicity", *names), what="CivilComments"):
        ids, texts, labels, values = parts[one_of(row, "split", {name: name for name in SPLITS})]
        ids.append(f"row {row.position}")
        texts.append(row.value["comment_text"])
        labels.append(int(share(row, "toxicity") >= 0.5))
        values.append([int(share(row, name) >= 0.5) for name in names])
    found = {}
    for name, (ids, texts, labels, values) in parts.items():
        if not ids:
            continue
        y, mentioned = torch.tensor(labels), torch.tensor(values)
        attributes = {column: mentioned[:, i] for i, column in enumerate(names)}
        rows = Labelled(tuple(ids), tuple(texts), y, TOXICITY, source=f"CivilComments, {name}")
        if grouping == "any":
            groups = Groups.crossed(y, TOXICITY, attributes[ANY], ("no identity", "an identity"))
        else:
            groups = Groups.mentioned(y, TOXICITY, {identity: attributes[identity] for identity in IDENTITIES})
        found[name] = Grouped.of(rows, attributes, groups)
    which = "16 overlapping groups" if grouping == "identities" else "4 groups by identity_any"
    return GroupedSet("civilcomments", found, f"published split, {which}")

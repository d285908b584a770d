"""Labelled rows, what classifiers learn from and are judged by: what they hold, which are equal, and their splits.

Two kinds of groups must not be confused. `groups` is what fairness looks at, such as (label, attribute): every split
gets its share of each. A *cluster* is what must not be torn apart, such as the pairs of SNLI with the same premise: all
of it falls into one split. Rows with equal inputs stay together like that too.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, combinations
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from offramp.runs.digests import of_file

SHARES: Mapping[str, float] = MappingProxyType(
    {"train": 0.6, "tune": 0.1, "threshold": 0.1, "calibrate": 0.1, "test": 0.1}
)
"""What a split is for: the network; temperatures and grids; thresholds for budgets; guarantees; the report."""


class Images(Protocol):
    """N images, in memory or read when they are asked for.

    Those that are read from one file each name the files in `paths`, N of them.
    """

    def __len__(self) -> int:
        """N."""
        ...

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Those at some places, [n, H, W, channels], channels 1 or 3, in 0..255."""
        ...


Inputs = Images | tuple[str, ...] | tuple[tuple[str, str], ...]
"""Images, texts, or pairs of texts."""


@dataclass(frozen=True)
class Part:
    """Some of a collection of images, by their places."""

    whole: Images
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.whole[self.rows[rows]]


def inputs_at(inputs: Inputs, rows: Tensor) -> Inputs:
    """Those at some places, [n]."""
    if isinstance(inputs, tuple):
        return tuple(inputs[i] for i in rows.tolist())
    if isinstance(inputs, np.ndarray):
        images: NDArray[np.uint8] = inputs[rows.numpy()]
        return images
    return Part(inputs, rows.numpy())


# ---------------------------------------------------------------- which are equal


def contents(*collections: Inputs) -> list[list[Hashable]]:
    """Keys of the rows of each collection: two rows are equal if and only if their keys are.

    Texts are equal letter by letter, images value by value, and images in files byte by byte of the file: a picture
    that was saved anew is another one. A file is read only if another one is as long.

    Returns:
        The keys of each collection.
    """
    files = [files_of(inputs) for inputs in collections]
    sizes = [[path.stat().st_size for path in paths or ()] for paths in files]
    count = Counter(size for some in sizes for size in some)
    found: list[list[Hashable]] = []
    for inputs, paths, some in zip(collections, files, sizes, strict=True):
        if paths is not None:
            alone = [(size, "" if count[size] == 1 else of_file(path)) for path, size in zip(paths, some, strict=True)]
            found.append([*alone])
        elif isinstance(inputs, tuple):
            found.append([*inputs])
        else:
            found.append([*_values(inputs)])
    return found


def files_of(inputs: Inputs) -> tuple[Path, ...] | None:
    """The file of each row; None: rows are no files."""
    if isinstance(inputs, Part):
        whole = files_of(inputs.whole)
        return None if whole is None else tuple(whole[row] for row in inputs.rows.tolist())
    return getattr(inputs, "paths", None)


def _values(images: Images) -> list[tuple[tuple[int, ...], bytes]]:
    """Shape and digest of each image."""
    found: list[tuple[tuple[int, ...], bytes]] = []
    for start in range(0, len(images), 512):
        some = images[np.arange(start, min(start + 512, len(images)))]
        found += [(image.shape, hashlib.sha256(np.ascontiguousarray(image).data).digest()) for image in some]
    return found


def firsts(keys: Sequence[Hashable]) -> list[int]:
    """For each row the place of the first one with its key."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(key, row) for row, key in enumerate(keys)]


# ---------------------------------------------------------------- known again in other files and runs


def input_hashes(inputs: Inputs) -> Tensor | None:
    """First 64 bits of the SHA-256 of what rows hold, [N], int64; None for images in files, which are not read."""
    if isinstance(inputs, tuple):
        return hashes(repr(text).encode() for text in inputs)
    if isinstance(inputs, np.ndarray):
        return hashes(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes() for image in inputs)
    return None


def hashes(values: Iterable[bytes]) -> Tensor:
    """The first 64 bits of the SHA-256 of each, [N], int64."""
    found = b"".join(hashlib.sha256(value).digest()[:8] for value in values)
    return torch.from_numpy(np.frombuffer(found, "<i8").astype(np.int64))


@dataclass(frozen=True)
class Labelled:
    """N rows with labels.

    Attributes:
        ids: Of the rows, unique and stable: what weights, random draws and checks for overlap go by.
        inputs: Of each row: images (an array [N, H, W, channels] of uint8 is one form), texts, or pairs of texts.
        labels: In 0..C-1, [N], int64.
        classes: Names of the C classes.
        groups: A number per row, at least 0, [N], int64, such as (label, attribute); None: unknown.
        clusters: A name per row; rows of one cluster are never divided between splits; empty: each row for itself.
        source: Where the rows come from, for messages and records.

    Raises:
        ValueError: Numbers of rows that differ, repeated ids, or a label outside the classes.
    """

    ids: tuple[str, ...] = field(repr=False)
    inputs: Inputs = field(repr=False)
    labels: Tensor = field(repr=False)
    classes: tuple[str, ...]
    groups: Tensor | None = field(default=None, repr=False)
    clusters: tuple[str, ...] = field(default=(), repr=False)
    source: str = ""

    def __post_init__(self) -> None:
        rows, where = len(self.ids), self.source or "the data"
        counts = {"inputs": len(self.inputs), "labels": len(self.labels)}
        if self.groups is not None:
            counts["groups"] = len(self.groups)
        if self.clusters:
            counts["clusters"] = len(self.clusters)
        if wrong := [f"{count} {name}" for name, count in counts.items() if count != rows]:
            raise ValueError(f"{where} has {rows} ids but {', '.join(wrong)}; give one of each per row")
        if len(set(self.ids)) < rows:
            seen: set[str] = set()
            repeated = next(id for id in self.ids if id in seen or seen.add(id))  # type: ignore[func-returns-value]
            raise ValueError(f"{where} has several rows with the id {repeated!r}; give each row its own")
        outside = (self.labels < 0) | (self.labels >= len(self.classes))
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"{where}: row {self.ids[row]} has the label {int(self.labels[row])}; allowed are "
                f"0..{len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor | Sequence[int]) -> Labelled:
        """The rows at these places, in this order."""
        chosen = torch.as_tensor(rows, dtype=torch.long)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in chosen.tolist()),
            inputs=inputs_at(self.inputs, chosen),
            labels=self.labels[chosen],
            groups=None if self.groups is None else self.groups[chosen],
            clusters=tuple(self.clusters[i] for i in chosen.tolist()) if self.clusters else (),
        )

    @property
    def counts(self) -> list[int]:
        """Rows of each class, C of them."""
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()

    def digest(self) -> str:
        """SHA-256 of ids, labels, groups and inputs; of images in files their sizes in bytes stand for them."""
        found = hashlib.sha256("\n".join(self.ids).encode())
        found.update(self.labels.numpy().tobytes())
        if self.groups is not None:
            found.update(self.groups.numpy().tobytes())
        if isinstance(self.inputs, np.ndarray):
            found.update(np.ascontiguousarray(self.inputs).data)
        elif isinstance(self.inputs, tuple):
            found.update(repr(self.inputs).encode())
        elif (files := files_of(self.inputs)) is not None:
            found.update(repr([file.stat().st_size for file in files]).encode())
        return found.hexdigest()


def row_hashes(rows: Labelled, name: str) -> Tensor:
    """The first 64 bits of SHA-256, [N], int64, by which rows are known again in other runs and divisions.

    Texts go by what they hold; images by their ids within the set of this name, since one thing may be rendered anew
    for every division.

    Returns:
        One number per row.
    """
    if isinstance(rows.inputs, tuple) and (held := input_hashes(rows.inputs)) is not None:
        return held
    return hashes(f"{name} {id}".encode() for id in rows.ids)


# ---------------------------------------------------------------- splits


def split(
    data: Labelled, shares: Mapping[str, float] = SHARES, seed: int = 0, *, test: Labelled | None = None
) -> dict[str, Labelled]:
    """Divide rows at random, each split with its share of every label (and of every group within it).

    Without clusters, a split's rows of one label and group differ by less than one from its share of them. With
    clusters they come as near as whole clusters allow: the largest go first, each to where it mends most.

    Rows with equal inputs (see `contents`) are never divided, whatever their labels: without clusters each goes where
    the first of them went, and clusters that share one are divided as one. So, for data in which a row occurs more than
    once, the splits are others than those of versions that divided such rows; for all other data they are the same.

    Args:
        data: All rows.
        shares: Of the rows, by name of the split, adding up to 1.
        seed: Of the division.
        test: A published test split: it becomes "test" as it is, and the other shares, in their proportions, divide
            `data`. Its ids may be those of `data`, such as lines of another file: then "test/" is put before them.

    Returns:
        The splits by name, in the order of `shares`, each with its rows in the order of `data`.

    Raises:
        ValueError: Shares out of range, a split that would be empty, or `test` has a row or cluster of `data`.
    """
    if not shares or min(shares.values()) <= 0 or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        given = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise ValueError(f"the shares are {given or 'none'}; give such above 0 that add up to 1")
    own = {name: share for name, share in shares.items() if test is None or name != "test"}
    values = np.array(list(own.values())) / sum(own.values())
    generator = np.random.default_rng(seed)
    keys, *others = contents(data.inputs, *([] if test is None else [test.inputs]))
    if test is not None:
        test = _apart(data, test, keys, others[0])
    strata = _strata(data)
    if data.clusters:
        part = _by_cluster(_merged(data.clusters, keys), strata, values, generator)
    else:
        part = _by_row(strata, values, generator)[firsts(keys)]
    found = {name: data.take(np.flatnonzero(part == at).tolist()) for at, name in enumerate(own)}
    if empty := [name for name, rows in found.items() if not len(rows)]:
        distinct = len(set(keys))
        units = f" in {len(set(data.clusters))} clusters" if data.clusters else ""
        units += f", {distinct} of them distinct" if distinct < len(data) else ""
        raise ValueError(
            f"{data.source or 'the data'} has {len(data)} rows{units}, too few: the split {empty[0]} would be empty; "
            "give more rows or fewer splits"
        )
    if test is not None:
        found["test"] = test
    require_apart(**found)
    return {name: found[name] for name in (*shares, *(["test"] if test is not None else []))}


def _strata(data: Labelled) -> NDArray[np.int64]:
    """A number from 0 on for each pair of label and group, [N]."""
    keys = data.labels if data.groups is None else data.labels * (int(data.groups.max()) + 1) + data.groups
    return np.unique(keys.numpy(), return_inverse=True)[1]


def _by_row(
    strata: NDArray[np.int64], shares: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Which split each row goes to: a stratum is shuffled and cut at its shares, rounded up or down by chance."""
    part = np.empty(len(strata), dtype=np.int64)
    ends = np.array([*list(accumulate(shares))[:-1], 1.0])
    for stratum in range(int(strata.max(initial=-1)) + 1):
        rows = generator.permutation(np.flatnonzero(strata == stratum))
        cuts = np.floor(ends * len(rows) + generator.random()).astype(np.int64)
        part[rows] = np.searchsorted(cuts, np.arange(len(rows)), side="right")
    return part


def _by_cluster(
    clusters: Sequence[str], strata: NDArray[np.int64], shares: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Which split each row goes to, whole clusters each, [N].

    A cluster goes to the split for which Σ over strata of (rows there - rows wanted)² / rows wanted grows least; for
    clusters of one row this is the apportionment of Sainte-Laguë in each stratum.

    Returns:
        Places of splits, [N].
    """
    names, cluster = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    counts = np.zeros((len(names), int(strata.max(initial=-1)) + 1))
    np.add.at(counts, (cluster, strata), 1)
    wanted = shares[:, None] * counts.sum(0)  # [splits, strata]
    have = np.zeros_like(wanted)
    order = generator.permutation(len(names))
    order = order[np.argsort(-counts.sum(1)[order], kind="stable")]
    where = np.empty(len(names), dtype=np.int64)
    for at in order:
        cost = ((2 * (have - wanted) + counts[at]) * counts[at] / wanted).sum(1)
        where[at] = cost.argmin()
        have[where[at]] += counts[at]
    return where[cluster]


def _merged(clusters: Sequence[str], keys: Sequence[Hashable]) -> list[str]:
    """Clusters, those that hold rows with equal keys made one, which has the name of the first; [N]."""
    rows, links = np.arange(len(keys)), np.concatenate([firsts(clusters), firsts(keys)])
    graph = coo_array((np.ones(len(links)), (np.tile(rows, 2), links)), shape=(len(rows), len(rows)))
    return [clusters[row] for row in firsts(connected_components(graph, directed=False)[1].tolist())]


# ---------------------------------------------------------------- rows that are in two places


def without(data: Labelled, test: Labelled) -> Labelled:
    """The rows of `data` whose inputs no row of `test` has."""
    keys, others = contents(data.inputs, test.inputs)
    known = set(others)
    kept = [row for row, key in enumerate(keys) if key not in known]
    return data if len(kept) == len(data) else data.take(kept)


def _apart(data: Labelled, test: Labelled, keys: Sequence[Hashable], others: Sequence[Hashable]) -> Labelled:
    """A test split that shares no row with the data, by their keys of `contents`: ids only say where a row stands.

    Returns:
        The test split with ids that the data does not have.

    Raises:
        ValueError: A row is in both.
    """
    places = {key: row for row, key in enumerate(keys)}
    if shared := [row for row, key in enumerate(others) if key in places]:
        one, other = data.ids[places[others[shared[0]]]], test.ids[shared[0]]
        raise ValueError(
            f"{len(shared)} rows of {test.source or 'the test split'} are in {data.source or 'the data'} too, such as "
            f"{other!r:.80}, there {one!r:.80}; a row may be in one of them only, so remove them from one"
        )
    ids = test.ids
    while set(data.ids) & set(ids):
        ids = tuple(f"test/{id}" for id in ids)
    return test if ids is test.ids else replace(test, ids=ids)


def require_apart(**splits: Labelled) -> None:
    """Raise a ValueError if two splits, by name, share a row's id or a cluster."""
    for (first, one), (second, other) in combinations(splits.items(), 2):
        for what, shared in (
            ("row", set(one.ids) & set(other.ids)),
            ("cluster", set(one.clusters) & set(other.clusters)),
        ):
            if shared:
                raise ValueError(
                    f"splits {first} and {second} share {len(shared)} {what}s, such as {min(shared)!r:.80}; a {what} "
                    "may be in one of them only"
                )

"""What rows hold: texts, pairs of texts, or images in memory or in files; some of them, and which are equal."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.runs.digests import of_file


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


def chosen(inputs: Inputs, rows: Tensor) -> Inputs:
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

"""Labelled images as benchmarks have them: files as they are published, and the corruptions that make them harder.

IDX (MNIST and its kin) and CIFAR's binary files are read. Nothing is downloaded: the user gives the folder. Folders of
images: `offramp.tasks.image_files`.

Noise, blur and loss of contrast come in five severities, to see what confidence does then. In the manner of CIFAR-C
(Hendrycks and Dietterich 2019, arXiv 1903.12261), with formulas and constants of our own: figures are not comparable
with those on its files. For an image x in [0, 1] and severity s = 1..5:

- noise: x + σ·n with n ~ N(0, 1) for each value, σ = .04·s;
- blur: a Gaussian of standard deviation .2·(s + 1) pixels where the shorter side has 32, in proportion otherwise;
- contrast: m + c·(x - m) with m the mean over the image, of each channel, c = .8, .6, .45, .3, .15.

The result is cut to [0, 1] and rounded. Draws are a function of (seed, row id) alone: neither the batch nor the order
matter, and the noise of a higher severity is that of a lower one, scaled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from offramp.runs.bounded import content
from offramp.tasks.labelled import Labelled
from offramp.values import choice

FASHION = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""Classes of Fashion-MNIST (arXiv 1708.07747, table 2)."""

# ---------------------------------------------------------------- IDX
Image = NDArray[np.float32]
SEVERITIES = (1, 2, 3, 4, 5)
_CONTRAST = (0.8, 0.6, 0.45, 0.3, 0.15)


def read_idx(folder: str | Path, classes: Sequence[str] | None = None) -> dict[str, Labelled]:
    """MNIST, Fashion-MNIST and others in their format: four IDX files, each gzipped or not.

    Args:
        folder: Holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the same with t10k, also with .gz.
        classes: Names, such as `FASHION`; None: the numbers 0 to the largest label of the training split.

    Returns:
        "train" and "test" with images [N, H, W, 1]; ids are train/0, train/1, …

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or of another format, or a label is outside the classes.
    """
    found = {}
    for name, prefix in (("train", "train"), ("test", "t10k")):
        images, at = _idx(Path(folder), f"{prefix}-images", 3)
        labels, where = _idx(Path(folder), f"{prefix}-labels", 1)
        if len(images) != len(labels):
            raise ValueError(f"{at} holds {len(images)} images and {where} {len(labels)} labels; fetch both again")
        classes = tuple(classes or map(str, range(int(labels.max(initial=0)) + 1)))
        found[name] = _labelled(images[..., None], labels, classes, where, name)
    return found


def _idx(folder: Path, stem: str, dimensions: int) -> tuple[NDArray[np.uint8], Path]:
    """The array of an IDX file, and the file: two zeros, 8 (bytes), number of dimensions, sizes, values."""
    names = [f"{stem}{dot}idx{dimensions}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    path = _existing(folder, names)
    data = content(path)
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(
            f"{path} begins with {data[:4].hex()}, but an IDX file of bytes in {dimensions} dimensions with "
            f"0000080{dimensions}; give the file as published"
        )
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if not all(sizes):
        raise ValueError(f"{path} is to hold {' x '.join(map(str, sizes))} values, which is none; fetch it again")
    if len(data) - head != math.prod(sizes):
        raise ValueError(
            f"{path} is to hold {' x '.join(map(str, sizes))} values but holds {len(data) - head}; fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(sizes), path


# ---------------------------------------------------------------- CIFAR


def read_cifar10(folder: str | Path) -> dict[str, Labelled]:
    """CIFAR-10 in its binary format: data_batch_1.bin to data_batch_5.bin and test_batch.bin in cifar-10-batches-bin.

    Returns:
        "train" and "test" with images [N, 32, 32, 3]; ids are train/0, train/1, … Names of classes stand in
        batches.meta.txt; without it they are numbers. Errors are those of `read_idx`.
    """
    files = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    return _cifar(Path(folder), files, "batches.meta.txt", 10, bytes_before=1, label_at=0)


def read_cifar100(folder: str | Path) -> dict[str, Labelled]:
    """CIFAR-100 in its binary format, train.bin and test.bin in cifar-100-binary; its fine labels.

    Returns:
        As `read_cifar10`. Names of classes stand in fine_label_names.txt.
    """
    files = {"train": ["train.bin"], "test": ["test.bin"]}
    return _cifar(Path(folder), files, "fine_label_names.txt", 100, bytes_before=2, label_at=1)


def _cifar(
    folder: Path, files: dict[str, list[str]], names: str, count: int, *, bytes_before: int, label_at: int
) -> dict[str, Labelled]:
    """Rows of label bytes and 3 x 32 x 32 values: all red ones row by row, all green, all blue."""
    given = (folder / names).read_text(encoding="utf-8").split() if (folder / names).exists() else None
    if given is not None and len(given) != count:
        raise ValueError(f"{folder / names} has {len(given)} names for {count} classes; give the file as published")
    classes, found = tuple(given or map(str, range(count))), {}
    for name, parts in files.items():
        pieces = []
        for part in parts:
            path, width = _existing(folder, [part]), bytes_before + 3072
            data = content(path)
            if not data or len(data) % width:
                raise ValueError(f"{path} has {len(data)} bytes, no multiple of {width}, a row's; fetch it again")
            rows = np.frombuffer(data, np.uint8).reshape(-1, width)
            _check_labels(rows[:, label_at], classes, path)
            pieces.append(rows)
        rows = np.concatenate(pieces)
        images = np.ascontiguousarray(rows[:, bytes_before:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        found[name] = _labelled(images, rows[:, label_at], classes, folder, name)
    return found


# ---------------------------------------------------------------- files


def _existing(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that is there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    others = f" (nor {', '.join(names[1:])})" if names[1:] else ""
    raise FileNotFoundError(f"{folder / names[0]} is missing{others}; give the folder that holds the published files")


def _labelled(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], classes: tuple[str, ...], path: Path, name: str
) -> Labelled:
    _check_labels(labels, classes, path)
    ids = tuple(f"{name}/{row}" for row in range(len(labels)))
    return Labelled(ids, images, torch.from_numpy(labels.astype(np.int64)), classes, source=f"{path} ({name})")


def _check_labels(labels: NDArray[np.uint8], classes: Sequence[str], path: Path) -> None:
    if len(wrong := np.flatnonzero(labels >= len(classes))):
        row = int(wrong[0])
        raise ValueError(f"{path}, row {row} has the label {int(labels[row])}; allowed are 0..{len(classes) - 1}")


def noise(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Gaussian noise on every value."""
    return image + np.float32(0.04 * severity) * generator.standard_normal(image.shape, dtype=np.float32)


def blur(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """A Gaussian filter over rows and columns, edges mirrored."""
    sigma = 0.2 * (severity + 1) * min(image.shape[:2]) / 32
    return gaussian_filter(image, (sigma, sigma, 0), mode="reflect")  # type: ignore[no-any-return]


def contrast(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Values drawn towards the image's mean."""
    mean = image.mean((0, 1), keepdims=True)
    found: Image = mean + np.float32(_CONTRAST[severity - 1]) * (image - mean)
    return found


CORRUPTIONS: Mapping[str, Callable[[Image, int, np.random.Generator], Image]] = MappingProxyType(
    {"noise": noise, "blur": blur, "contrast": contrast}
)
"""Image [H, W, channels] in [0, 1], severity and draws -> such an image, perhaps outside [0, 1]."""


def corrupt(
    images: NDArray[np.uint8], ids: Sequence[str], kind: str, severity: int, seed: int = 0
) -> NDArray[np.uint8]:
    """Images [N, H, W, channels] corrupted at severity 1 to 5 by draws that go by seed and id; as they are at 0."""
    choice("corruption", kind, CORRUPTIONS)
    if severity not in (0, *SEVERITIES):
        raise ValueError(f"severity is {severity}; give 1 to 5, or 0 for none")
    if not severity:
        return images.copy()
    found = np.empty_like(images)
    for place, (image, id) in enumerate(zip(images, ids, strict=True)):
        key = hashlib.sha256(f"{seed}/{kind}/{id}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(key[:16], "little"))
        changed = CORRUPTIONS[kind](image.astype(np.float32) / 255, severity, generator)
        found[place] = np.rint(np.clip(changed, 0, 1) * 255)
    return found


def corrupted(data: Labelled, kind: str, severity: int, seed: int = 0) -> Labelled:
    """The same rows, images corrupted and in memory, see `corrupt`; a ValueError for texts, kinds there are not."""
    if isinstance(data.inputs, tuple):
        raise ValueError(f"{data.source or 'the data'} holds texts; corruptions are for images")
    images = data.inputs[np.arange(len(data))]
    source = f"{data.source}, {kind} {severity}"
    return replace(data, inputs=corrupt(images, data.ids, kind, severity, seed), source=source)

"""Labelled images from files as they are published: IDX (MNIST and its kin), CIFAR's binary files, folders of classes.

Nothing is downloaded: the user gives the folder.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.tasks.labelled import Labelled

FASHION = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""Classes of Fashion-MNIST (arXiv 1708.07747, table 2)."""
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
"""Of files that are images, in a folder of classes."""

# ---------------------------------------------------------------- IDX


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
    data = _content(path)
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(
            f"{path} begins with {data[:4].hex()}, but an IDX file of bytes in {dimensions} dimensions with "
            f"0000080{dimensions}; give the file as published"
        )
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if len(data) - head != math.prod(sizes):
        raise ValueError(
            f"{path} is to hold {' x '.join(map(str, sizes))} values but holds {len(data) - head}; fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(sizes), path


# ---------------------------------------------------------------- CIFAR


def read_cifar10(folder: str | Path) -> dict[str, Labelled]:
    """CIFAR-10 in its binary format: data_batch_1.bin to data_batch_5.bin and test_batch.bin.

    Args:
        folder: cifar-10-batches-bin. Names of classes stand in batches.meta.txt; without it they are numbers.

    Returns:
        "train" and "test" with images [N, 32, 32, 3]; ids are train/0, train/1, …

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or a label is outside the classes.
    """
    files = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    return _cifar(Path(folder), files, "batches.meta.txt", 10, bytes_before=1, label_at=0)


def read_cifar100(folder: str | Path, *, coarse: bool = False) -> dict[str, Labelled]:
    """CIFAR-100 in its binary format: train.bin and test.bin.

    Args:
        folder: cifar-100-binary. Names of classes stand in fine_label_names.txt and coarse_label_names.txt; without
            them they are numbers.
        coarse: The 20 coarse labels instead of the 100 fine ones.

    Returns:
        "train" and "test" with images [N, 32, 32, 3]; ids are train/0, train/1, …

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or a label is outside the classes.
    """
    files = {"train": ["train.bin"], "test": ["test.bin"]}
    names = "coarse_label_names.txt" if coarse else "fine_label_names.txt"
    return _cifar(Path(folder), files, names, 20 if coarse else 100, bytes_before=2, label_at=0 if coarse else 1)


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
            data = _content(path)
            if not data or len(data) % width:
                raise ValueError(f"{path} has {len(data)} bytes, no multiple of {width}, a row's; fetch it again")
            rows = np.frombuffer(data, np.uint8).reshape(-1, width)
            _check_labels(rows[:, label_at], classes, path)
            pieces.append(rows)
        rows = np.concatenate(pieces)
        images = np.ascontiguousarray(rows[:, bytes_before:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        found[name] = _labelled(images, rows[:, label_at], classes, folder, name)
    return found


# ---------------------------------------------------------------- folders of classes


def read_image_folder(
    folder: str | Path, *, size: int | None = None, classes: Sequence[str] | None = None, grey: bool = False
) -> Labelled:
    """Images in one folder per class: CLASS/NAME.png.

    The images are read when they are used, so there may be more of them than memory holds.

    Args:
        folder: The folder of these folders.
        size: Of the result, square: the shorter side becomes size · 8/7 (256 for 224, as usual for ImageNet; an image
            of this very size stays), then the centre is cut out. None: as they are, all of one size.
        classes: Their folders, in the order of the labels; None: all there are, by name.
        grey: One channel instead of red, green and blue.

    Returns:
        The rows, by class and name; ids are FOLDER/CLASS/NAME.png.

    Raises:
        FileNotFoundError: There is no such folder, or a class has none.
        ValueError: Not one image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give one with a folder of images for each class")
    names = tuple(classes or sorted(path.name for path in folder.iterdir() if path.is_dir()))
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if not (folder / name).is_dir():
            raise FileNotFoundError(
                f"{folder / name} is missing, the folder of class {name!r}; make it, or name others"
            )
        inside = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in ENDINGS)
        paths += inside
        labels += [label] * len(inside)
    if not paths:
        raise ValueError(
            f"{folder} holds no image as CLASS/NAME.png (or {', '.join(ENDINGS[1:])}); give another folder"
        )
    ids = tuple(f"{folder.name}/{path.parent.name}/{path.name}" for path in paths)
    return Labelled(ids, ImageFiles(tuple(paths), size, grey), torch.tensor(labels), names, source=str(folder))


@dataclass(frozen=True)
class ImageFiles:
    """Images that are read, with Pillow, when they are asked for; see `read_image_folder`."""

    paths: tuple[Path, ...]
    size: int | None = None
    grey: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        images = [self._read(self.paths[row]) for row in rows.tolist()]
        for row, image in zip(rows.tolist(), images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"{self.paths[row]} has {image.shape[1]} x {image.shape[0]} pixels and others have "
                    f"{images[0].shape[1]} x {images[0].shape[0]}; give a size, so that all are brought to it"
                )
        return np.stack(images)

    def _read(self, path: Path) -> NDArray[np.uint8]:
        return read_image(path, size=self.size, grey=self.grey)


def read_image(path: str | Path, *, size: int | None = None, grey: bool = False) -> NDArray[np.uint8]:
    """One image [H, W, channels].

    Args:
        path: Any file that Pillow reads.
        size: See `read_image_folder`.
        grey: Likewise.

    Returns:
        The image.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It cannot be read.
        ModuleNotFoundError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("images need Pillow, which is not installed; pip install pillow") from error
    try:
        with Image.open(path) as file:
            image: Any = file.convert("L" if grey else "RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; give an image") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no whole image ({' '.join(str(error).split())}); fetch it again") from None
    if size is not None and image.size != (size, size):
        scale = round(size * 8 / 7) / min(image.size)
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
        left, top = ((side - size) // 2 for side in image.size)
        image = image.crop((left, top, left + size, top + size))
    values = np.asarray(image, dtype=np.uint8)
    return values[..., None] if grey else values


# ---------------------------------------------------------------- files


def _existing(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that is there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    others = f" (nor {', '.join(names[1:])})" if names[1:] else ""
    raise FileNotFoundError(f"{folder / names[0]} is missing{others}; give the folder that holds the published files")


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); fetch it again") from None


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

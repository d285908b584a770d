"""Images of bird and face sets, brought to one size as group_DRO does for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offramp.tasks.image_files import read_image
from offramp.tasks.rows import Row


@dataclass(frozen=True)
class SquareImages:
    """Images that are read, with Pillow, when they are asked for.

    Sagawa et al. (2020), group_DRO: without `crop` (Waterbirds) an image is squeezed to a square of 256/224 of the
    size and its middle cut out; with it (CelebA) the middle is cut out first and then resized. Bilinear, antialiased.

    Attributes:
        paths: N files.
        size: Side of the result in pixels.
        crop: Side of the square that is cut out of the middle first; None: as for Waterbirds.
    """

    paths: tuple[Path, ...]
    size: int = 224
    crop: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.stack([self._read(self.paths[row]) for row in rows.tolist()])

    def _read(self, path: Path) -> NDArray[np.uint8]:
        pixels = read_image(path)
        if self.crop is not None:
            return _resized(_middle(pixels, self.crop), self.size)
        return _middle(_resized(pixels, self.size * 256 // 224), self.size)


def existing_images(rows: Sequence[Row], paths: Sequence[Path]) -> tuple[Path, ...]:
    """The files, if all are there.

    Args:
        rows: Where each is named.
        paths: The files.

    Returns:
        The files.

    Raises:
        FileNotFoundError: One is missing.
    """
    for row, path in zip(rows, paths, strict=True):
        if not path.is_file():
            raise FileNotFoundError(f"{row.place} names {path}, which is missing; unpack the images beside the table")
    return tuple(paths)


def _resized(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))


def _middle(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The square in the middle, smaller than asked for if the image is."""
    top, left = ((length - side) // 2 if length > side else 0 for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]

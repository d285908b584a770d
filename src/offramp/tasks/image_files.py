"""Images in files, and folders of them: one folder per class.

What an image file may say besides three colours of 8 bits is done right, or said with a count: it is turned as its
EXIF says; what is transparent stands on white; 16 bits become 8; of several frames the first is used. Numbers whose
white nobody knows, floats and 32 bits, are refused.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.tasks.labelled import Labelled

ENDINGS = (
    ".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jfif", ".jp2", ".avif",
)  # fmt: skip
"""Of files that are images, in a folder of classes."""
SYSTEM = ("__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
"""Folders that archives and systems make, besides hidden ones."""
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
MOST_PIXELS = 89_478_485
"""Of one image, as it is or on its way to another size: Pillow's own limit, a quarter of a gigabyte."""

ALPHA = "with an alpha channel (shown on white)"
SIXTEEN_BITS = "of 16 bits (divided by 257)"
FRAMES = "with several frames (the first is used)"
COLOURS = "in colour (their grey values are used)"
SIZES = "of another size ({})"

# ---------------------------------------------------------------- one image


def read_image(
    path: str | Path, *, size: int | None = None, grey: bool = False, seen: Counter[str] | None = None
) -> NDArray[np.uint8]:  # fmt: skip
    """One image [H, W, channels].

    Args:
        path: Any file that Pillow reads.
        size: See `read_image_folder`.
        grey: One channel instead of red, green and blue.
        seen: What had to be done is counted there, in words for `tell`.

    Returns:
        The image.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It cannot be read, is larger than `MOST_PIXELS`, or its values have no known white.
        ModuleNotFoundError: Pillow is not installed.
    """
    from PIL import Image, ImageOps

    with _opened(path) as file:
        remarks, kind = _remarks(file), file.format
        image: Any = ImageOps.exif_transpose(file)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):  # older Pillows say "I"
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        what = "floats" if image.mode == "F" else "whole numbers of 32 bits"
        raise ValueError(f"{path} holds {what}, whose black and white are not known; save it with 8 or 16 bits")
    if _has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if grey and image.mode not in ("1", "L"):
        colours = np.asarray(image.convert("RGB"))
        if bool((colours != colours[..., :1]).any()):
            remarks.append(COLOURS)
    try:
        image = image.convert("L" if grey else "RGB")
    except ValueError as error:
        raise ValueError(f"{path} has colours that cannot be read ({error}); save it as RGB") from None
    if size is not None and image.size != (size, size):
        remarks.append(SIZES.format(f"brought to {size} x {size}, what is left and right or above and below cut off"))
        image = _squared(image, size, path)
    if seen is not None:
        seen.update(remarks)
    values = np.asarray(image, dtype=np.uint8)
    return values[..., None] if grey else values


def _squared(image: Any, size: int, path: str | Path) -> Any:
    """The centre, of an image whose shorter side was brought to size · 8/7."""
    from PIL import Image

    scale = round(size * 8 / 7) / min(image.size)
    sides = [max(size, round(side * scale)) for side in image.size]
    if sides[0] * sides[1] > MOST_PIXELS:
        raise ValueError(
            f"{path} has {image.size[0]} x {image.size[1]} pixels, {sides[0]} x {sides[1]} with its shorter side "
            f"brought to {min(sides)}; more than {MOST_PIXELS:,} in all are not made, cut it nearer to a square"
        )
    image = image.resize(sides, Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """An image file; whatever goes wrong with it within becomes one error that names it."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("images need Pillow, which is not installed; pip install pillow") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF, without which the image is still one
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                yield file
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; give an image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(
            f"{path} has more than {MOST_PIXELS:,} pixels, the most that are read; make it smaller"
        ) from None
    except Exception as error:  # noqa: BLE001 - of damaged files decoders raise whatever they stumble over
        raise ValueError(f"{path} is no whole image ({' '.join(str(error).split()):.200}); fetch it again") from None


def _has_alpha(image: Any) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _remarks(file: Any) -> list[str]:
    """What is to be said of an open file, by its head alone."""
    found = [ALPHA] if _has_alpha(file) else []
    if file.mode.startswith("I;16"):
        found.append(SIXTEEN_BITS)
    if file.format != "MPO" and getattr(file, "is_animated", False):  # an MPO's others are previews of the first
        found.append(FRAMES)
    return found


def tell(where: object, seen: Counter[str], total: int) -> None:
    """Warn, in one line, of what had to be done with images: in words, and with how many of them in all."""
    if seen:
        said = ", ".join(f"{count} {words}" for words, count in sorted(seen.items()))
        warnings.warn(f"{where}: of {total} images, {said}", stacklevel=3)


# ---------------------------------------------------------------- folders of classes


def read_image_folder(folder: str | Path, *, size: int | None = None, classes: Sequence[str] | None = None) -> Labelled:
    """Images in one folder per class: CLASS/NAME.png, or deeper, CLASS/ANY/NAME.png.

    The images are read when they are used, so there may be more of them than memory holds; only their heads are looked
    at here. One warning counts what is left out: hidden files and folders, `SYSTEM`, files that are no images, links to
    folders, folders without images. Another counts images that are not taken as they stand.

    Args:
        folder: The folder of these folders.
        size: Of the result, square: the shorter side becomes size · 8/7 (256 for 224, as usual for ImageNet; an image
            of this very size stays), then the centre is cut out. None: as they are, all of one size.
        classes: Their folders, in the order of the labels; None: all that hold an image, by name.

    Returns:
        The rows, by class and name; ids are FOLDER/CLASS/NAME.png.

    Raises:
        FileNotFoundError: There is no such folder, or a class has none.
        ValueError: No two classes with images, images that cannot be read or (without `size`) have different sizes, or
            names that are no classes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give one with a folder of images for each class")
    found: dict[str, list[Path]] = {}
    left = _LeftOut()
    for name in classes or _visible(folder, left):
        if not (folder / name).is_dir():
            raise FileNotFoundError(
                f"{folder / name} is missing, the folder of class {name!r}; make it, or name others"
            )
        if inside := _images_in(folder / name, left):
            found[name] = inside
        elif classes:
            raise ValueError(f"{folder / name} holds no image, the folder of class {name!r}; fill it, or name others")
        else:
            left.empty.append(name)
    if not found:
        raise ValueError(
            f"{folder} holds no image as CLASS/NAME.png (or {', '.join(ENDINGS[1:])}); give another folder"
        )
    _check_names(folder, list(found), named=bool(classes))
    left.tell(folder)
    paths = tuple(path for inside in found.values() for path in inside)
    labels = [label for label, inside in enumerate(found.values()) for _ in inside]
    ids = tuple(f"{folder.name}/{path.relative_to(folder).as_posix()}" for path in paths)
    for path, id in zip(paths, ids, strict=True):
        if not id.isascii() and id.encode(errors="ignore").decode() != id:
            raise ValueError(f"{str(path)!r} has a name that is no UTF-8; rename it")
    tell(folder, look_at(paths, same_size=size is None), len(paths))
    return Labelled(ids, ImageFiles(paths, size), torch.tensor(labels), tuple(found), source=str(folder))


def look_at(paths: Sequence[Path], *, same_size: bool = False) -> Counter[str]:
    """What is to be said of images by their heads, for `tell`; a ValueError if one is none, or not of that size."""
    seen: Counter[str] = Counter()
    first: tuple[int, int] | None = None
    for path in paths:
        with _opened(path) as file:
            seen.update(_remarks(file))
            shown = _size(file)
        first = first or shown
        if same_size and shown != first:
            raise ValueError(
                f"{path} has {shown[0]} x {shown[1]} pixels and others have {first[0]} x {first[1]}; give a size, so "
                "that all are brought to it"
            )
    return seen


def _size(file: Any) -> tuple[int, int]:
    """Width and height as the image is shown."""
    wide, high = file.size
    known = file.format != "PNG" or "exif" in file.info  # to look further a PNG would be decoded
    return (high, wide) if known and file.getexif().get(0x0112, 1) in (5, 6, 7, 8) else (wide, high)


def _visible(folder: Path, left: _LeftOut) -> list[str]:
    """Names of the folders that may be classes."""
    names = []
    for path in sorted(folder.iterdir()):
        if left.is_hidden(path.name):
            continue
        if path.is_dir():
            names.append(path.name)
        else:
            left.beside.append(path.name)
    return names


def _images_in(folder: Path, left: _LeftOut) -> list[Path]:
    """Images in a folder of a class and in those within it."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not left.is_hidden(name)]
        left.links += [name for name in folders if (Path(root) / name).is_symlink()]
        for name in names:
            if left.is_hidden(name):
                continue
            if Path(name).suffix.lower() in ENDINGS:
                found.append(Path(root) / name)
            else:
                left.others.append(Path(name).suffix.lower() or name)
    return sorted(found)


def _check_names(folder: Path, names: Sequence[str], *, named: bool) -> None:
    """Refuse folders that are no classes, and warn of such that hardly are."""
    for name in names:
        if name != name.strip():
            raise ValueError(f"{folder} has a folder {name!r}, with blanks around the name; rename it")
    if not named and all(name.lower() in SPLIT_NAMES for name in names):
        raise ValueError(
            f"{folder} has the folders {', '.join(names)}, which are splits, not classes; give {folder / names[-1]} or "
            "another of them (a test split has an option of its own), or name the classes"
        )
    if len(names) < 2:
        raise ValueError(f"{folder} has images in the folder {names[0]!r} only; two classes are needed")
    folded = Counter(name.casefold() for name in names)
    if alike := [name for name in names if folded[name.casefold()] > 1]:
        warnings.warn(
            f"{folder}: the classes {', '.join(map(repr, alike[:6]))} differ in capitals only and stay different",
            stacklevel=3,
        )


class _LeftOut:
    """What is in a folder of classes and no row, by kind."""

    def __init__(self) -> None:
        self.hidden: list[str] = []
        self.others: list[str] = []
        self.beside: list[str] = []
        self.links: list[str] = []
        self.empty: list[str] = []

    def is_hidden(self, name: str) -> bool:
        """Whether a file or folder is not meant to be looked at; it is counted then."""
        if hidden := name.startswith(".") or name in SYSTEM:
            self.hidden.append(name)
        return hidden

    def tell(self, folder: Path) -> None:
        """Warn of all, in one line."""
        kinds = {
            "hidden files and folders": self.hidden, "files that are no images": self.others,
            "files beside the folders of classes": self.beside, "links to folders": self.links,
            "folders without an image": self.empty,
        }  # fmt: skip
        said = [f"{what} ({len(names)}: {_some(names)})" for what, names in kinds.items() if names]
        if said:
            warnings.warn(f"{folder}: left out {', '.join(said)}", stacklevel=3)


def _some(names: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(names))
    return ", ".join(distinct[:3]) + (", …" if len(distinct) > 3 else "")


@dataclass(frozen=True)
class ImageFiles:
    """Images that are read, with Pillow, when they are asked for; see `read_image_folder`."""

    paths: tuple[Path, ...]
    size: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        paths = [self.paths[row] for row in rows.tolist()]
        return stacked(paths, [read_image(path, size=self.size) for path in paths])


def stacked(paths: Sequence[str | Path], images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Images of one size as an array [N, H, W, channels]; a ValueError names one that has another."""
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"{path} has {image.shape[1]} x {image.shape[0]} pixels and others have "
                f"{images[0].shape[1]} x {images[0].shape[0]}; give a size, so that all are brought to it"
            )
    return np.stack(images)

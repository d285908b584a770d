"""Digits on coloured backgrounds: small stand-ins for Waterbirds that need no download.

A digit below five or not is the label, the colour of its background the attribute; in training they agree in most
rows. Every validation and test digit is rendered on both backgrounds, so that groups are equal but for the colour and
it can be counted how often the colour alone changes an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.tasks.group_sets import Grouped, GroupedSet
from offramp.tasks.labelled import Labelled

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

GREEN, BLUE = (0.15, 0.40, 0.15), (0.15, 0.15, 0.40)
COLOURS = ("green", "blue")
JITTER, NOISE = 0.05, 0.07
"""Standard deviations: of a background's colour from image to image, and of every pixel."""
CLASSES = ("low", "high")
HIGH = (5, 6, 7, 8, 9)
"""Digits of class 1; in Fashion-MNIST sandal, shirt, sneaker, bag and ankle boot."""


def digits_on_colour(
    *, agreement: float = 0.92, seed: int = 0, train: int = 1000, val: int = 300, test: int = 497
) -> GroupedSet:  # fmt: skip
    """The 1797 digits of scikit-learn, 8 x 8 pixels, on green and blue; of validation and test each is rendered twice.

    In training this share of the rows of each class, in (0, 1), is on the class's own colour. The seed is of the
    division into splits, the colours and the noise.

    Returns:
        Images [8, 8, 3].

    Raises:
        ValueError: More digits are asked for than there are, or the agreement leaves a group of training rows empty.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        load_digits = import_module("sklearn.datasets").load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "digits-on-colour needs the digits of scikit-learn; install it with: pip install 'offramp[fair]'"
        ) from error
    digits, labels = load_digits(return_X_y=True)
    images = digits.reshape(-1, 8, 8) / 16
    return _on_colour("digits-on-colour", images, labels, agreement, seed, (train, val, test), HIGH)


def mnist_on_colour(
    images: NDArray[np.uint8],
    digits: NDArray[np.integer],
    *,
    agreement: float = 0.97,
    seed: int = 0,
    train: int = 6000,
    val: int = 800,
    test: int = 2500,
    high: Sequence[int] = HIGH,
) -> GroupedSet:
    """MNIST or Fashion-MNIST, averaged down to 14 x 14 pixels, on green and blue, otherwise as `digits_on_colour`.

    How hard a set is depends on the network and how it is trained (`benchmarks/difficulty.py`); Fashion-MNIST needs
    less agreement than MNIST, about .90.

    Args:
        images: [M, 28, 28], 0 to 255.
        digits: [M], 0 to 9.
        agreement: As there.
        seed: As there.
        train: Images for training.
        val: Images for validation.
        test: Images for testing.
        high: The digits that make class 1.

    Returns:
        Images [14, 14, 3].
    """
    pooled = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)) / 255
    return _on_colour("mnist-on-colour", pooled, digits, agreement, seed, (train, val, test), high)


def _on_colour(
    name: str,
    images: Floats,
    digits: NDArray[np.integer],
    agreement: float,
    seed: int,
    sizes: tuple[int, int, int],
    high: Sequence[int],
) -> GroupedSet:
    draw = np.random.default_rng(seed)
    train, val, test = split_places(name, len(images), sizes, agreement, draw)
    labels = np.isin(digits, list(high)).astype(np.int64)
    attribute = agreeing(labels[train], agreement, draw)
    splits = {"train": _split("train", train, images, labels, attribute, draw)}
    for split, rows in (("val", val), ("test", test)):
        both = np.repeat(rows, 2)
        splits[split] = _split(split, both, images, labels, np.tile([0, 1], len(rows)), draw, paired=True)
    made = GroupedSet(name, splits, f"generated, agreement {agreement:g}, seed {seed}")
    made.require_groups("train")
    return made


def require_agreement(name: str, agreement: float) -> None:
    """Raise a ValueError unless a share of rows is in (0, 1)."""
    if not 0 < agreement < 1:
        raise ValueError(f"{name}: agreement is {agreement}; it must be in (0, 1), such as 0.95")


def split_places(
    name: str, images: int, sizes: tuple[int, int, int], agreement: float, draw: np.random.Generator
) -> list[Integers]:
    """Places of the images for training, validation and test; a ValueError if there are too few, or for the share."""
    require_agreement(name, agreement)
    if sum(sizes) > images:
        asked = " + ".join(map(str, sizes))
        raise ValueError(f"{name}: {asked} images are asked for, but there are {images}; ask for fewer")
    return np.split(draw.permutation(images)[: sum(sizes)], np.cumsum(sizes)[:2])


def agreeing(labels: Integers, agreement: float, draw: np.random.Generator) -> Integers:
    """An attribute of two values that equals the label in a share, not left to chance, of the rows of each class.

    Returns:
        [N], 0 or 1; within a class, agreement x rows, rounded, equal the label.
    """
    attribute = labels.copy()
    for label in (0, 1):
        rows = draw.permutation(np.flatnonzero(labels == label))
        attribute[rows[round(agreement * len(rows)) :]] = 1 - label
    return attribute


def _split(
    name: str,
    rows: Integers,
    images: Floats,
    labels: Integers,
    attribute: Integers,
    draw: np.random.Generator,
    *,
    paired: bool = False,
) -> Grouped:
    y, a = torch.from_numpy(labels[rows]), torch.from_numpy(attribute)
    ids = tuple(f"{row}-{COLOURS[value]}" for row, value in zip(rows.tolist(), attribute.tolist(), strict=True))
    labelled = Labelled(ids, _rendered(images[rows], attribute, draw), y, CLASSES, source=name)
    return Grouped.crossed(labelled, "background", a, COLOURS, torch.from_numpy(rows) if paired else None)


def _rendered(images: Floats, attribute: Integers, draw: np.random.Generator) -> NDArray[np.uint8]:
    """Bright digits on backgrounds of their own shade each, [N, H, W, 3]."""
    shade = np.array([GREEN, BLUE])[attribute] + draw.normal(0, JITTER, (len(images), 3))
    mask = images[..., None]  # [N, H, W, 1]
    pixels = mask + (1 - mask) * shade[:, None, None]
    return as_bytes(pixels + draw.normal(0, NOISE, pixels.shape))


def as_bytes(pixels: Floats) -> NDArray[np.uint8]:
    """Values around 0 to 1 as 0..255."""
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)

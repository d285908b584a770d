"""Digits on coloured backgrounds: small stand-ins for Waterbirds that need no download.

A digit below five or not is the label, the colour of its background the attribute; in training they agree in most
rows. Every validation and test digit is rendered on both backgrounds, so that groups are equal but for the colour and
it can be counted how often the colour alone changes an answer. Or, of MNIST and Fashion-MNIST: several classes,
each with a colour of its own.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.metrics.groups import Groups
from offramp.tasks.group_sets import SPLITS, Grouped, GroupedSet
from offramp.tasks.labelled import Labelled
from offramp.values import choice

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


# ---------------------------------------------------------------- several classes, each with a colour of its own


Render = Callable[[NDArray[np.uint8], Integers, np.random.Generator], NDArray[np.uint8]]
"""Images [n, 28, 28] and the colour of each [n] -> [n, 28, 28, 3]."""

PLACES: dict[str, tuple[int, int] | None] = {
    "magnitude-easy": None,
    "magnitude-medium": (4, 16),
    "magnitude-hard": (2, 4),
    "variance-easy": (7, 49),
    "variance-medium": (14, 49),
    "variance-hard": (28, 49),
}
"""Where the colour stands: side of the top left square and how many of its pixels, drawn for each image; None: all."""


def spuco_mnist(
    images: NDArray[np.uint8],
    digits: NDArray[np.integer],
    *,
    difficulty: str = "magnitude-medium",
    agreement: float = 0.95,
    label_noise: float = 0.0,
    core_noise: float = 0.0,
    seed: int = 0,
    train: int = 48_004,
    val: int = 11_996,
    test: int = 10_000,
) -> GroupedSet:
    """Five classes of two digits, on five background colours (Joshi et al., 2023, SpuCoMNIST).

    The background shows only where a digit's pixel is 0. Training rows that do not agree are spread evenly over the
    other four colours; validation and test rows over all 25 groups. Deviations: our own division into splits and an HSV
    circle instead of the colour map of that name; noisy pixels are cut to
    0..255; label noise hits a row at most once.

    Args:
        images: [M, 28, 28], 0 to 255.
        digits: [M], 0 to 9.
        difficulty: One of `PLACES`.
        agreement: Share of the training rows of each class on the class's own colour, in (0, 1).
        label_noise: Share of the training rows whose label is replaced by another; groups keep the true one.
        core_noise: Share of the training rows with Gaussian noise of standard deviation 1 on every pixel.
        seed: Of everything.
        train: Training rows.
        val: Validation rows.
        test: Test rows.

    Returns:
        Images [28, 28, 3], with the attribute "background".

    Raises:
        ValueError: An unknown difficulty, a share out of range, or fewer images than asked for.
    """
    choice("difficulty", difficulty, PLACES)
    for name, share in (("label_noise", label_noise), ("core_noise", core_noise)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} is {share}; it must be in [0, 1)")
    colours = np.array([colorsys.hsv_to_rgb(k / 5, 1, 1) for k in range(5)])

    def render(chosen: NDArray[np.uint8], colour: Integers, draw: np.random.Generator) -> NDArray[np.uint8]:
        behind = as_bytes(colours[colour])[:, None, None]  # [n, 1, 1, 3]
        shown = _places(PLACES[difficulty], len(chosen), draw) & (chosen == 0)
        return np.where(shown[..., None], behind, chosen[..., None])

    names = tuple(f"{2 * k}{2 * k + 1}" for k in range(5))
    source = f"generated, {difficulty}, agreement {agreement:g}, seed {seed}"
    made, draw = _coloured(
        "spuco-mnist", names, source, images, digits // 2, agreement, render, seed, (train, val, test), "background"
    )
    return _noisy(made, label_noise, core_noise, draw)


def coloured_mnist(
    images: NDArray[np.uint8],
    digits: NDArray[np.integer],
    *,
    agreement: float = 0.99,
    jitter: float = 0.05,
    seed: int = 0,
    train: int = 48_000,
    val: int = 12_000,
    test: int = 10_000,
) -> GroupedSet:
    """Ten digits drawn in ten colours, as in the studies of LfF (Nam et al., 2020) and AGRE-KD; sizes are rows.

    Groups are digit x (its own colour or another); validation and test rows have every colour equally often. Colours
    are ours: ten of equal distance on the HSV circle. In training this share of the rows of each digit (.95, .98, .99
    and .995 in the sources) has the digit's own colour; `jitter` is the standard deviation of the noise on it.

    Returns:
        Images [28, 28, 3], with the attributes "colour" and "conflict" (another colour than the digit's own).
    """
    colours = np.array([colorsys.hsv_to_rgb(k / 10, 1, 1) for k in range(10)])

    def render(chosen: NDArray[np.uint8], colour: Integers, draw: np.random.Generator) -> NDArray[np.uint8]:
        shade = (colours[colour] + draw.normal(0, jitter, (len(chosen), 3))).clip(0, 1)
        return as_bytes(chosen[..., None] / 255 * shade[:, None, None])

    names = tuple(str(k) for k in range(10))
    source = f"generated, agreement {agreement:g}, seed {seed}"
    made, _ = _coloured(
        "coloured-mnist", names, source, images, digits, agreement, render, seed, (train, val, test), "colour"
    )
    splits = {}
    for name, split in made.splits.items():
        conflict = (split.attributes["colour"] != split.rows.labels).long()
        groups = Groups.crossed(split.rows.labels, names, conflict, ("own colour", "other colour"))
        splits[name] = Grouped.of(split.rows, {**split.attributes, "conflict": conflict}, groups)
    return GroupedSet(made.name, splits, source)


def _coloured(
    name: str,
    classes: tuple[str, ...],
    source: str,
    images: NDArray[np.uint8],
    labels: NDArray[np.integer],
    agreement: float,
    render: Render,
    seed: int,
    sizes: tuple[int, int, int],
    attribute: str,
) -> tuple[GroupedSet, np.random.Generator]:
    draw = np.random.default_rng(seed)
    parts = split_places(name, len(images), sizes, agreement, draw)
    splits = {}
    for split, part in zip(SPLITS, parts, strict=True):
        y = labels[part].astype(np.int64)
        colour = _colours(y, len(classes), agreement if split == "train" else 1 / len(classes), draw)
        ids = tuple(map(str, part.tolist()))
        rows = Labelled(ids, render(images[part], colour, draw), torch.from_numpy(y), classes, source=split)
        splits[split] = Grouped.crossed(rows, attribute, torch.from_numpy(colour), [f"colour {c}" for c in classes])
    return GroupedSet(name, splits, source), draw


def _colours(labels: Integers, classes: int, agreement: float, draw: np.random.Generator) -> Integers:
    """A class's own colour for a share of its rows, the others one after the other for the rest."""
    colours = labels.copy()
    for label in range(classes):
        rows = draw.permutation(np.flatnonzero(labels == label))
        rest = rows[round(agreement * len(rows)) :]
        colours[rest] = (label + 1 + np.arange(len(rest)) % (classes - 1)) % classes
    return colours


def _places(square: tuple[int, int] | None, rows: int, draw: np.random.Generator) -> NDArray[np.bool_]:
    """Where the background shows, [rows, 28, 28]."""
    if square is None:
        return np.ones((rows, 28, 28), bool)
    side, count = square
    inside = np.zeros((rows, side * side), bool)
    chosen = draw.random(inside.shape).argpartition(count - 1, axis=1)[:, :count]  # [rows, count] without repeats
    np.put_along_axis(inside, chosen, values=True, axis=1)
    places = np.zeros((rows, 28, 28), bool)
    places[:, :side, :side] = inside.reshape(rows, side, side)
    return places


def _noisy(made: GroupedSet, label_noise: float, core_noise: float, draw: np.random.Generator) -> GroupedSet:
    train, classes = made.train, len(made.classes)
    count = len(train)
    labels, pixels = train.rows.labels.clone(), np.array(train.rows.inputs)
    wrong = torch.from_numpy(draw.permutation(count)[: round(label_noise * count)])
    labels[wrong] = (labels[wrong] + torch.from_numpy(draw.integers(1, classes, len(wrong)))) % classes
    noisy = draw.permutation(count)[: round(core_noise * count)]
    pixels[noisy] = as_bytes(pixels[noisy] / 255 + draw.normal(0, 1, pixels[noisy].shape))
    changed = replace(train, rows=replace(train.rows, labels=labels, inputs=pixels))
    return replace(made, splits={**made.splits, "train": changed})

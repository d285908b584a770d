"""Images made harder: noise, blur and loss of contrast in five severities, to see what confidence does then.

In the manner of CIFAR-C (Hendrycks and Dietterich 2019, arXiv 1903.12261), with formulas and constants of our own:
figures are not comparable with those on its files. For an image x in [0, 1] and severity s = 1..5:

- noise: x + σ·n with n ~ N(0, 1) for each value, σ = .04·s;
- blur: a Gaussian of standard deviation .2·(s + 1) pixels where the shorter side has 32, in proportion otherwise;
- contrast: m + c·(x - m) with m the mean over the image, of each channel, c = .8, .6, .45, .3, .15.

The result is cut to [0, 1] and rounded. Draws are a function of (seed, row id) alone: neither the batch nor the order
matter, and the noise of a higher severity is that of a lower one, scaled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from offramp.tasks.labelled import Labelled
from offramp.values import choice

Image = NDArray[np.float32]
SEVERITIES = (1, 2, 3, 4, 5)
_CONTRAST = (0.8, 0.6, 0.45, 0.3, 0.15)


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

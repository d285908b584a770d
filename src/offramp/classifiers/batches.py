"""Labelled rows as a network takes them: images normalised, texts as tokens, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.families.backbone import Inputs
from offramp.tasks.labelled import Labelled
from offramp.training.data import epoch_batches


@dataclass(frozen=True)
class Batch:
    """B rows.

    Attributes:
        rows: Their places in the data, [B].
        ids: Their ids there, which weights of rows go by.
        labels: [B].
        inputs: For the classifier.
        groups: A number per row, [B]; None: unknown.
        epoch: Epoch of training, counted from 0.
    """

    rows: Tensor
    ids: tuple[str, ...]
    labels: Tensor
    inputs: Inputs
    groups: Tensor | None = None
    epoch: int = 0


class Rows(Protocol):
    """Labelled rows that are made into inputs when they are asked for."""

    @property
    def data(self) -> Labelled:
        """The rows."""
        ...

    @property
    def lengths(self) -> Tensor:
        """What a row costs in a batch, [N]: those of like length go together."""
        ...

    @property
    def lost(self) -> Tensor:
        """How many tokens of each row are cut off, [N]; none of images."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """How inputs are made, as JSON values."""
        ...

    def inputs(self, rows: Tensor, generator: torch.Generator | None = None) -> Inputs:
        """Inputs of the rows at these places; with a generator augmented, if there is any augmentation."""
        ...


def batch(rows: Rows, places: Tensor, generator: torch.Generator | None = None, epoch: int = 0) -> Batch:
    """The rows at these places; augmented with a generator."""
    data = rows.data
    return Batch(
        rows=places,
        ids=tuple(data.ids[i] for i in places.tolist()),
        labels=data.labels[places],
        inputs=rows.inputs(places, generator),
        groups=None if data.groups is None else data.groups[places],
        epoch=epoch,
    )


def in_order(rows: Rows, size: int) -> Iterator[tuple[Inputs, Tensor]]:
    """Inputs and labels of all rows in their order, without augmentation: for `collect`."""
    for places in torch.split(torch.arange(len(rows.data)), size):
        yield rows.inputs(places), rows.data.labels[places]


def by_length(rows: Rows, size: int = 256) -> list[Tensor]:
    """Places of all rows in batches of like length; `torch.cat(places).argsort()` is the rows' own order again."""
    return list(torch.split(rows.lengths.argsort(stable=True), size))


def order(rows: Rows, size: int, seed: int, epoch: int, sampling: Tensor | None = None) -> list[Tensor]:
    """The batches of an epoch, a function of (seed, epoch).

    Args:
        rows: N of them.
        size: Rows of a batch; the last may have fewer, but a single one joins the batch before: batch normalisation
            cannot do with one.
        seed: Seed of the order.
        epoch: Counted from 0.
        sampling: How often each row is drawn, in proportion, [N]; N are drawn with replacement, and stay in the order
            drawn: by length, the copies of a rare row would meet in one batch. None: each row once, see
            `offramp.training.data.epoch_batches`.

    Returns:
        Places, [B] each.
    """
    if sampling is None:
        batches = epoch_batches(rows.lengths, size, seed, epoch)
    else:
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        drawn = torch.multinomial(sampling, len(rows.data), replacement=True, generator=generator)
        batches = list(torch.split(drawn, size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        *batches, almost, rest = batches
        batches = [*batches, torch.cat([almost, rest])]
    return batches


# ---------------------------------------------------------------- images


@dataclass(frozen=True)
class ImagePreprocessing:
    """Values 0..255 to (x / 255 - mean) / std, one mean and std per channel; grey images get as many as there are."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, data: Labelled) -> ImagePreprocessing:
        """Mean and deviation of all values of each channel of training rows; a ValueError for texts, or one colour."""
        images = _images(data)
        count, sums, squares = 0, np.zeros(1), np.zeros(1)
        for start in range(0, len(data), 512):
            part = images[np.arange(start, min(start + 512, len(data)))] / 255.0
            count += part[..., 0].size
            sums = sums + part.sum((0, 1, 2))
            squares = squares + (part**2).sum((0, 1, 2))
        mean = sums / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        if not bool((std > 1e-6).all()):
            raise ValueError(f"{data.source or 'the data'}: a channel has one value everywhere; look at the images")
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    @property
    def settings(self) -> dict[str, Any]:
        """Under the names of transformers' preprocessor_config.json."""
        return {
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(self.mean),
            "image_std": list(self.std),
        }  # fmt: skip

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ImagePreprocessing:
        """Of `settings`, or of a pretrained model's."""
        return cls(tuple(settings["image_mean"]), tuple(settings["image_std"]))

    def __call__(self, images: NDArray[np.uint8]) -> Tensor:
        """Images [B, H, W, channels] as float32 [B, channels, H, W]."""
        values = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        if values.shape[1] not in (1, len(self.mean)):
            raise ValueError(f"images have {values.shape[1]} channels; this preprocessing is for {len(self.mean)}")
        mean, std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (self.mean, self.std))
        return ((values - mean) / std).contiguous()


IMAGENET = ImagePreprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of most pretrained networks."""


@dataclass(frozen=True)
class Augmentation:
    """Random changes of images while training, those of ResNet (arXiv 1512.03385, section 4.2).

    A part of the old size is cut from the image in a black frame; in half of the cases it is mirrored.

    Attributes:
        pad: Width of the frame, in pixels; 0: no cropping.
        flip: Whether left and right may be exchanged; not for digits and letters.
    """

    pad: int = 4
    flip: bool = True

    def __call__(self, images: NDArray[np.uint8], generator: torch.Generator) -> NDArray[np.uint8]:
        """Changed images [B, H, W, channels]."""
        count, high, wide = images.shape[:3]
        corners = torch.randint(2 * self.pad + 1, (count, 2), generator=generator).tolist()
        flips = (torch.rand(count, generator=generator) < 0.5).tolist()
        framed = np.pad(images, ((0, 0), (self.pad, self.pad), (self.pad, self.pad), (0, 0)))
        found = np.empty_like(images)
        for row, ((top, left), flipped) in enumerate(zip(corners, flips, strict=True)):
            part = framed[row, top : top + high, left : left + wide]
            found[row] = part[:, ::-1] if self.flip and flipped else part
        return found


AUGMENTATIONS = {
    "crop-flip": Augmentation(), "crop": Augmentation(flip=False), "flip": Augmentation(pad=0), "none": None
}  # fmt: skip
"""By name."""


@dataclass(frozen=True)
class ImageRows:
    """Rows of images.

    Attributes:
        data: The rows.
        preprocessing: Preprocessing of the values.
        augmentation: Before that, while training.
    """

    data: Labelled
    preprocessing: ImagePreprocessing
    augmentation: Augmentation | None = None

    @property
    def lengths(self) -> Tensor:
        """All the same."""
        return torch.zeros(len(self.data), dtype=torch.long)

    @property
    def lost(self) -> Tensor:
        """Nothing."""
        return torch.zeros(len(self.data), dtype=torch.long)

    @property
    def settings(self) -> dict[str, Any]:
        """How inputs are made, as JSON values."""
        return {**asdict(self.preprocessing), "augmentation": self.augmentation and asdict(self.augmentation)}

    def inputs(self, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images [B, channels, H, W] of the rows at these places."""
        images = _images(self.data)[rows.numpy()]
        if generator is not None and self.augmentation is not None:
            images = self.augmentation(images, generator)
        return self.preprocessing(images)


def _images(data: Labelled) -> Any:
    if isinstance(data.inputs, tuple):
        raise ValueError(f"{data.source or 'the data'} holds texts where images are needed")
    return data.inputs


# ---------------------------------------------------------------- texts


@dataclass(frozen=True)
class TextRows:
    """Rows of texts, or of pairs of texts, each tokenised once; a batch is as long as its longest row.

    Attributes:
        data: The rows.
        tokenizer: Tokenizer of the encoder, from transformers.
        longest: Most tokens of a row, special ones included; None: what the tokenizer says its model takes. Of a pair
            the longer text loses its end first.
    """

    data: Labelled
    tokenizer: Any
    longest: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.data.inputs, tuple):
            raise ValueError(f"{self.data.source or 'the data'} holds images where texts are needed")
        if self.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token, which batches need; set pad_token")
        special = self.tokenizer.num_special_tokens_to_add(pair=self._pairs)
        if self.limit <= special:
            raise ValueError(f"longest is {self.limit}; {special} special tokens and some text must fit")

    @property
    def limit(self) -> int:
        """Most tokens of a row."""
        own: int = self.tokenizer.model_max_length
        return own if self.longest is None else min(own, self.longest)

    @property
    def _pairs(self) -> bool:
        return isinstance(self.data.inputs, tuple) and any(isinstance(text, tuple) for text in self.data.inputs[:1])

    @cached_property
    def _encoded(self) -> tuple[list[dict[str, list[int]]], Tensor]:
        """The tokens of each row, and how many of them were cut off, [N]."""
        texts: Sequence[Any] = self.data.inputs  # type: ignore[assignment]
        given = [list(side) for side in zip(*texts, strict=True)] if self._pairs else [list(texts)]
        options: dict[str, Any] = {"return_attention_mask": True, "verbose": False}
        whole = self.tokenizer(*given, **options)
        lost = torch.tensor([max(0, len(ids) - self.limit) for ids in whole["input_ids"]])
        cut = lost.nonzero()[:, 0].tolist()
        rows = [{name: values[row] for name, values in whole.items()} for row in range(len(texts))]
        if cut:
            some = [[side[row] for row in cut] for side in given]
            shorter = self.tokenizer(*some, truncation=True, max_length=self.limit, **options)
            for place, row in enumerate(cut):
                rows[row] = {name: values[place] for name, values in shorter.items()}
        return rows, lost

    @property
    def lost(self) -> Tensor:
        """How many tokens of each row are cut off, [N]."""
        return self._encoded[1]

    @property
    def truncated(self) -> int:
        """How many rows lost some of their tokens."""
        return int((self.lost > 0).sum())

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each row, [N]."""
        return torch.tensor([len(row["input_ids"]) for row in self._encoded[0]])

    @property
    def settings(self) -> dict[str, Any]:
        """How inputs are made, as JSON values."""
        return {"tokenizer": type(self.tokenizer).__name__, "longest": self.limit, "truncated": self.truncated}

    def inputs(self, rows: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """What the tokenizer makes of the rows at these places, each [B, T]."""
        found = self._encoded[0]
        padded = self.tokenizer.pad([found[row] for row in rows.tolist()], return_tensors="pt", verbose=False)
        return dict(padded)

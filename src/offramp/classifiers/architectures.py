"""Untrained classifiers by name, made to fit their data, and the options that each is usually trained with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from offramp.classifiers.batches import Augmentation, ImagePreprocessing, ImageRows, Rows, TextRows
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.families.backbone import Backbone, HeadConfig, SplitEncoder
from offramp.tasks.labelled import Labelled

MSDNETS = ("msdnet-small", "msdnet-medium", "msdnet-large")
RESNET = "resnet"
PUBLISHED = (*MSDNETS, RESNET)
"""Networks for images that are trained from nothing; all other names are pretrained encoders."""
EXITS = 6
"""Exits of an encoder with more layers, unless told otherwise."""


def build(
    architecture: str,
    data: Labelled,
    *,
    layers: Sequence[int] | None = None,
    head: HeadConfig | None = None,
    seed: int = 0,
) -> EarlyExitClassifier:
    """An untrained classifier.

    Args:
        architecture: One of `PUBLISHED`: MSDNet in its three sizes (see `MSDNetConfig.published`), or ResNet-18 (He et
            al. 2016, arXiv 1512.03385, table 1) with an exit behind each stage; or a pretrained encoder by packaged
            name ("minilm"), local folder or hub id.
        data: Training rows: classes, size and colours of images, and what they are normalised by.
        layers: Layers with an exit besides the last; None: all blocks and stages, of an encoder six at most.
        head: How exits are built.
        seed: Seed of weights that are drawn.

    Returns:
        The classifier, in training mode.

    Raises:
        ValueError: The layers are not possible, or the network is not for such data.
        ModelError: There is no such encoder, or it is damaged.
        UnsupportedModelError: There is no family for it.
    """
    backbone, tokenizer, preprocessing = _backbone(architecture, data, seed)
    reads_text = backbone.main_input == "input_ids"
    if reads_text != isinstance(data.inputs, tuple):
        kinds = ("texts", "images") if reads_text else ("images", "texts")
        raise ValueError(
            f"{architecture} is a network for {kinds[0]}, but {data.source} holds {kinds[1]}; choose another"
        )
    if reads_text and tokenizer is None:
        raise ValueError(f"{architecture} has no tokenizer, which texts need; save one in its folder")
    if head is not None and head.pooling is not None and getattr(backbone, "name", RESNET) == RESNET:
        raise ValueError(
            f"pooling is {head.pooling!r}, which is of states of tokens or patches; {architecture} has maps of images, "
            "so leave it out"
        )
    if layers is None:
        layers = _spread(backbone.num_layers)
    if not reads_text:
        preprocessing = _preprocessing(backbone, data, preprocessing)
    options = {"labels": data.classes, "head": head, "tokenizer": tokenizer, "preprocessing": preprocessing}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return EarlyExitClassifier(backbone, layers, **options)


def _backbone(architecture: str, data: Labelled, seed: int) -> tuple[Backbone, Any, dict[str, Any]]:
    """The network without exits, its tokenizer or None, and settings of its images if it has some."""
    if architecture not in PUBLISHED:
        from offramp.classifiers.saving import load_encoder

        encoder, tokenizer, preprocessing = load_encoder(architecture)
        return SplitEncoder(encoder), tokenizer, preprocessing
    if isinstance(data.inputs, tuple):
        raise ValueError(
            f"{architecture} is a network for images, but {data.source} holds texts; name an encoder such as minilm"
        )
    height, width, channels = _shape(data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == RESNET:
            from transformers import ResNetConfig, ResNetModel

            sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
            config = ResNetConfig(num_channels=channels, layer_type="basic", **sizes)
            return SplitEncoder(ResNetModel(config)), None, {}
        from offramp.classifiers.convolutional import MSDNet, MSDNetConfig

        if max(height, width) > 224:
            raise ValueError(f"{data.source}: images are {height} x {width}; MSDNet takes up to 224 x 224, resize them")
        side = 32 if max(height, width) <= 32 else 224
        return MSDNet(MSDNetConfig.published(architecture.removeprefix("msdnet-"), side, channels)), None, {}


def _spread(layers: int) -> list[int]:
    """Evenly spread layers below the last: all of them, or as many as make `EXITS` exits with the last."""
    count = min(EXITS, layers)
    return sorted({round(place * layers / count) for place in range(1, count)})


def _shape(data: Labelled) -> tuple[int, int, int]:
    """Height, width and channels of the images."""
    images: Any = data.inputs
    height, width, channels = images[np.arange(1)].shape[1:]
    return height, width, channels


def _preprocessing(backbone: Any, data: Labelled, given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a pretrained network, else mean and deviation of the training images; and the images' size."""
    height, width, colours = _shape(data)
    size = {"size": {"height": height, "width": width}}
    config = backbone.config
    channels = config.in_channels if hasattr(config, "in_channels") else config.num_channels
    if colours not in (1, channels):
        raise ValueError(
            f"{data.source} has images of {colours} colours, and the network takes {channels}; choose another "
            "network, or make the images grey"
        )
    if getattr(backbone, "name", "") == "vit" and np.broadcast_to(config.image_size, 2).tolist() != [height, width]:
        raise ValueError(
            f"{data.source} has images of {height} x {width} pixels, and the network takes {config.image_size}; bring "
            "them to that (image_size, of a folder of images), or choose another network"
        )
    if "image_mean" in given:
        return {**given, **size}
    of = ImagePreprocessing.of(data)
    if len(of.mean) == 1 < channels:  # grey images for a network of colours
        of = ImagePreprocessing(of.mean * channels, of.std * channels)
    return {**of.settings, **size}


# ---------------------------------------------------------------- its rows, and how it is trained


def rows_of(
    classifier: EarlyExitClassifier,
    data: Labelled,
    *,
    augmentation: Augmentation | None = None,
    longest: int | None = None,
) -> Rows:
    """Labelled rows as inputs of a classifier.

    Args:
        classifier: With a tokenizer, or with settings of images.
        data: The rows.
        augmentation: Augmentation of images in training.
        longest: Most tokens of a text.

    Returns:
        The rows; those of texts in the order of their lengths, so that little is padded. Of texts that are cut it is
        warned.

    Raises:
        ValueError: The rows are not for this classifier.
    """
    if classifier.tokenizer is None:
        return ImageRows(data, ImagePreprocessing.from_settings(classifier.preprocessing), augmentation)
    rows = TextRows(data, classifier.tokenizer, longest)
    if rows.truncated:
        warnings.warn(
            f"{data.source or 'the texts'}: {rows.truncated} of {len(data)} rows are longer than {rows.limit} tokens "
            "and lose the rest",
            stacklevel=2,
        )
    return replace(rows, data=data.take(rows.lengths.argsort(stable=True)))


def usual(architecture: str) -> dict[str, Any]:
    """Options of `ClassifierTrainConfig` that an architecture is usually trained with."""
    if architecture in PUBLISHED:  # as published, but for the number of epochs
        return {"epochs": 20, "batch_size": 64, "optimiser": "sgd", "schedule": "step", "weight_decay": 1e-4}
    return {
        "epochs": 3, "batch_size": 32, "optimiser": "adamw", "schedule": "linear", "weight_decay": 0.01, "clip": 1.0,
        "warmup": 20,
    }  # fmt: skip

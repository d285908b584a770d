"""Single images and texts classified by a trained classifier that really stops early."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.classifiers.architectures import rows_of
from offramp.classifiers.calibrated import Calibrated, Recorded
from offramp.classifiers.classifier import Classification, EarlyExitClassifier
from offramp.classifiers.evaluate import charged
from offramp.classifiers.splits import config_of
from offramp.tasks.image_files import read_image, stacked, tell
from offramp.tasks.labelled import Labelled
from offramp.uncertainty import nested_conformal

Thresholds = float | Sequence[float] | Tensor | None


@dataclass(frozen=True)
class Answer:
    """What one input is classified as.

    Attributes:
        given: The image's file, or the text.
        label: The answer.
        probability: Probability of the answer, at the exit taken.
        confidence: What the exit was taken by.
        exit: The exit taken, from 1.
        layer: After how many blocks it stands.
        flops: FLOPs of this input, with the heads of the exits it came to and what the posterior adds.
        share: The same over the FLOPs of the plain full network, the backbone and the last exit's head, in this batch.
        probabilities: By label.
        set: Classes in the conformal set at the exit taken, most probable first; None: no sets were calibrated.
        tokens_cut: How many tokens of a text the classifier never saw, for it takes no more.
    """

    given: str
    label: str
    probability: float
    confidence: float
    exit: int
    layer: int
    flops: float
    share: float
    probabilities: dict[str, float]
    set: list[str] | None = None
    tokens_cut: int = 0

    def __repr__(self) -> str:
        return (
            f"Answer({self.given!r}: {self.label!r} with probability {self.probability:.3f}, exit {self.exit} after "
            f"layer {self.layer}, {self.share:.3f} of the plain full network's FLOPs)"
        )


def answers(
    classifier: EarlyExitClassifier,
    given: Sequence[str],
    *,
    calibrated: Calibrated | None = None,
    thresholds: Thresholds = None,
    confidence: str = "max",
    batch_size: int = 32,
) -> list[Answer]:
    """Classify images or texts.

    Args:
        classifier: One that `offramp train` wrote: it knows how its inputs are made.
        given: Files of images, or texts; pairs of texts with a tab between them.
        calibrated: What makes probabilities; None: softmax.
        thresholds: One for all exits, or one each; None: no input leaves early.
        confidence: A name in `offramp.classifiers.confidence.CONFIDENCES`.
        batch_size: Inputs at once.

    Returns:
        The answers, in the order of the inputs.

    Raises:
        NotFiniteError: The classifier computes NaN or infinity.
        FileNotFoundError: An image is missing.
        ValueError: There is nothing to classify, an image cannot be read, or a pair has no second text.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    longest = config_of(classifier.trained_on).longest if classifier.trained_on else None
    rows = rows_of(classifier, _labelled(classifier, given), longest=longest)
    lost = rows.lost
    found: dict[int, Answer] = {}
    for places in torch.split(torch.arange(len(given)), batch_size):
        inputs = rows.inputs(places)
        recorded = None if calibrated is None else Recorded(calibrated.posterior, len(places))
        result = classifier.classify(inputs, recorded, thresholds, confidence)
        network, full = classifier.costs(inputs), float(classifier.costs(inputs, cut=True)[-1])
        costs = network if calibrated is None else charged(network, calibrated.posterior)
        sets = None
        if calibrated is not None and calibrated.sets is not None and recorded is not None:
            members = nested_conformal.apply_classes(calibrated.sets, recorded.seen).members
            sets = members[result.exits.cpu(), torch.arange(len(places))]  # [B, C]
        for row, place in enumerate(places.tolist()):
            original = int(rows.data.ids[place])
            found[original] = _answer(
                classifier, given[original], result, row, costs, full, None if sets is None else sets[row],
                int(lost[place]),
            )  # fmt: skip
    return [found[place] for place in range(len(given))]


def _answer(
    classifier: EarlyExitClassifier, given: str, result: Classification, row: int, costs: Tensor, full: float,
    members: Tensor | None, lost: int,
) -> Answer:  # fmt: skip
    exit_, p = int(result.exits[row]), result.probabilities[row].tolist()
    label = classifier.labels[int(result.classes[row])]
    inside = None
    if members is not None:
        inside = [classifier.labels[c] for c in np.argsort(p)[::-1].tolist() if bool(members[c])]
    flops = float(costs[exit_])
    return Answer(
        given, label, max(p), float(result.confidence[row]), exit_ + 1, classifier.layers[exit_], flops, flops / full,
        dict(zip(classifier.labels, p, strict=True)), inside, lost,
    )  # fmt: skip


# ---------------------------------------------------------------- inputs


def _labelled(classifier: EarlyExitClassifier, given: Sequence[str]) -> Labelled:
    """Inputs as rows, whose ids are their places and whose labels mean nothing."""
    if not given:
        raise ValueError("there is nothing to classify; give an image or a text")
    ids, labels = tuple(map(str, range(len(given)))), torch.zeros(len(given), dtype=torch.long)
    inputs: Any
    if classifier.tokenizer is None:
        inputs = _images(classifier, given)
    elif classifier.trained_on and config_of(classifier.trained_on).pairs:
        inputs = tuple(_pair(text) for text in given)
    else:
        inputs = tuple(given)
    return Labelled(ids, inputs, labels, classifier.labels, source="the input")


def _images(classifier: EarlyExitClassifier, given: Sequence[str]) -> Any:
    """Images as large as those the classifier was trained with, and of as many colours."""
    settings = classifier.preprocessing
    if "image_mean" not in settings:
        raise ValueError("the classifier does not say how its images are normalised; train it with offramp train")
    size = settings.get("size", {})
    height, width = size.get("height"), size.get("width")
    side = height if height == width else None
    grey, seen = len(settings["image_mean"]) == 1, Counter[str]()
    images = [read_image(path, size=side, grey=grey, seen=seen) for path in given]
    if height != width:  # of another shape than a square, they are to come as the network takes them
        for path, image in zip(given, images, strict=True):
            if image.shape[:2] != (height, width):
                raise ValueError(
                    f"{path} has {image.shape[1]} x {image.shape[0]} pixels, and the classifier takes {width} x "
                    f"{height}; bring it to that"
                )
    tell("the input", seen, len(given))
    return stacked(given, images)


def _pair(text: str) -> tuple[str, str]:
    first, tab, second = text.partition("\t")
    if not tab or not first.strip() or not second.strip():
        raise ValueError(f"the input {text!r:.80} is no pair of texts; put a tab between the two")
    return first, second

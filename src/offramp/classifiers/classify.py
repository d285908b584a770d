"""What a saved classifier, which really stops early, says of single images and texts: `offramp.classify`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from offramp.classifiers.architectures import rows_of
from offramp.classifiers.calibrated import Calibrated, Recorded, load_calibrated
from offramp.classifiers.classifier import Classification, EarlyExitClassifier
from offramp.classifiers.evaluate import charged
from offramp.classifiers.loading import load
from offramp.classifiers.splits import config_of
from offramp.runs.codec import encode
from offramp.runs.digests import fingerprint
from offramp.tasks.image_files import read_image, stacked, tell
from offramp.tasks.labelled import Labelled
from offramp.uncertainty import nested_conformal
from offramp.values import ArgumentError

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
    """Answers in the order of the inputs, by these thresholds (None: no input leaves early); else as `classify`."""
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


# ---------------------------------------------------------------- the verb


def classify(
    classifier: EarlyExitClassifier | str | os.PathLike[str],
    inputs: str | Sequence[str],
    *,
    posterior: Calibrated | str | os.PathLike[str] | None = None,
    budget: float | None = None,
    thresholds: Thresholds = None,
    confidence: Literal["max", "gap", "entropy"] = "max",
    batch_size: int = 32,
    device: str | None = None,
) -> list[Answer]:
    """Classify images or texts, each at the first exit that is sure enough.

    One classifier for many calls is loaded once, with `offramp.classifiers.loading.load`:

        for answer in offramp.classify("runs/train-msdnet/model", ["shoe.png"], posterior="runs/honest", budget=0.5):
            print(answer.label, answer.probability, answer.share)

    Args:
        classifier: One that `offramp train` wrote, or its folder.
        inputs: Files of images, or texts; pairs of texts with a tab between them.
        posterior: Folder that `offramp calibrate` wrote, or what it holds, for calibrated probabilities; None: softmax.
        budget: Share of the full network's FLOPs to spend on average; needs a posterior, whose rows say by what
            thresholds.
        thresholds: One for all exits, or one each; None: the posterior's certified one if it has one, else no input
            leaves early.
        confidence: What is compared with thresholds.
        batch_size: Inputs at once.
        device: Where a classifier from a folder is put; None: the first CUDA GPU if there is one, else the CPU.

    Returns:
        The answers, in the order of the inputs.

    Raises:
        ArgumentError: Arguments that do not go together, a ValueError.
        ValueError: Nothing to classify, or an input that cannot be read.
        FileNotFoundError: An image is missing.
        ModelError: The folder holds no classifier, or a damaged one.
        NotFiniteError: The classifier computes NaN or infinity.
    """
    if not isinstance(classifier, EarlyExitClassifier):
        classifier = load(classifier, device=device)
    if posterior is not None and not isinstance(posterior, Calibrated):
        posterior = load_calibrated(posterior, fingerprint(classifier))
    return answers(
        classifier, [inputs] if isinstance(inputs, str) else inputs, calibrated=posterior,
        thresholds=rule_of(posterior, budget, thresholds, confidence).thresholds, confidence=confidence,
        batch_size=batch_size,
    )  # fmt: skip


# ---------------------------------------------------------------- by what inputs leave early


@dataclass(frozen=True)
class Rule:
    """Thresholds, one for all exits or one each (None: no input leaves early), and where they come from.

    Attributes:
        thresholds: What a confidence has to be above.
        words: Where they come from.
        spent: For a budget, what was asked for and the quantile q that meets it.
    """

    thresholds: Thresholds
    words: str
    spent: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; infinities are null."""
        given = self.thresholds if isinstance(self.thresholds, Sequence) else [self.thresholds]
        limits = [float(value) for value in given if value is not None]
        spent = {} if self.spent is None else {"budget": self.spent[0], "q": self.spent[1]}
        return dict(encode({"words": self.words, **spent, "thresholds": limits}))


def rule_of(calibrated: Calibrated | None, budget: float | None, thresholds: Thresholds, confidence: str) -> Rule:
    """Thresholds by what `offramp.classify` is given, else certified ones; an ArgumentError if it does not fit."""
    if budget is not None:
        if thresholds is not None:
            raise ArgumentError("give one of `budget` and `thresholds`")
        if calibrated is None:
            raise ArgumentError("`budget` needs `posterior`: thresholds come from the rows of offramp calibrate")
        if confidence != "max":
            raise ArgumentError("`budget` has thresholds for `confidence` max only")
        found, full = calibrated.budget(budget), calibrated.full_cost
        met = (
            f"{found.target:.4g} FLOPs per row (on the threshold split {found.realised:.4g})"
            if full is None
            else f"{found.target / full:.3f} of the plain full network's FLOPs (on the threshold split "
            f"{found.realised / full:.3f})"
        )
        return Rule(found.thresholds.tolist(), f"a budget of {met}", (budget, found.q))
    if thresholds is not None:
        return Rule(thresholds, f"leaving above {thresholds}")
    if calibrated is None or calibrated.certified is None:
        return Rule(None, "full depth, for want of a budget or a threshold")
    if confidence != "max":
        raise ArgumentError(
            f"the threshold in `posterior` is certified for `confidence` max, not for {confidence}; give `thresholds` "
            "for it, or leave out `confidence`"
        )
    certified, certificate = calibrated.certified, calibrated.certificate or {}
    against = certificate["promise"].get("reference") or "the last exit with the posterior"  # as it once was
    words = f"the certified threshold, {certified:.6g} (its promise is against {against})"
    return Rule(certified, words if certificate["index"] else "full depth, for no early leaving is certified")

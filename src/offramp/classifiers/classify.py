"""What a saved classifier says of images or texts: `offramp.classify`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from offramp.classifiers.answers import Answer, Thresholds, answers
from offramp.classifiers.calibrated import Calibrated, load_calibrated
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.loading import load
from offramp.classifiers.rule import rule_of
from offramp.runs.digests import fingerprint


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

"""How good probabilities are: accuracy, NLPD, Brier score, calibration error, and whether they tell right from wrong.

Rows are graded once (`grade`), whatever exit each was answered by; everything else is computed from the grades. A good
calibration error does not make a good exit rule, hence AURC, AUGRC and AUROC beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.metrics import resampled
from offramp.metrics.resampled import Grades

Floats = NDArray[np.float64]

NAMES = ("top1", "top5", "nlpd", "brier", "ece", "aurc", "augrc", "auroc")
SMALLEST = 1e-12
"""Probabilities below it count as it in the NLPD, so that one row cannot make it infinite."""

# ---------------------------------------------------------------- rows


def grade(probabilities: Tensor, labels: Tensor) -> Grades:
    """Grade rows.

    Args:
        probabilities: Of each row at its exit, [N, C].
        labels: [N].

    Returns:
        The grades.

    Raises:
        ValueError: There are no rows, shapes do not fit, a label is out of range, or a number is not finite.
    """
    if probabilities.ndim != 2 or not len(probabilities) or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities have shape {list(probabilities.shape)} and labels {list(labels.shape)}; rows x classes and "
            "rows are needed, at least one row"
        )
    p = probabilities.detach().cpu().double()
    labels = labels.detach().cpu()
    classes = p.shape[1]
    if len(bad := (~p.isfinite().all(1)).nonzero()):
        raise ValueError(
            f"the probabilities of row {int(bad[0])} are not finite; leave the row out, or mend its features"
        )
    if len(bad := ((labels < 0) | (labels >= classes)).nonzero()):
        row = int(bad[0])
        raise ValueError(f"the label of row {row} is {int(labels[row])}; allowed are 0..{classes - 1}")
    own = p.gather(1, labels[:, None])
    before = (p > own).sum(1) + ((p == own) & (torch.arange(classes) < labels[:, None])).sum(1)
    return Grades(
        p.amax(1).numpy(),
        (before < 1).double().numpy(),
        (before < 5).double().numpy() if classes > 5 else None,
        -own.squeeze(1).clamp(min=SMALLEST).log().numpy(),
        (p.square().sum(1) - 2 * own.squeeze(1) + 1).numpy(),
        int((own < SMALLEST).sum()),
    )


# ---------------------------------------------------------------- calibration error


@dataclass(frozen=True)
class Reliability:
    """Bins of confidence: what is summed for the calibration error and drawn in a reliability diagram.

    Bins have equal width and hold their lower end; the last holds 1 as well, where saturated exits are.

    Attributes:
        count: Rows in each bin, [B].
        confidence: Sum of their confidences, [B].
        correct: How many were right, [B].
    """

    count: Floats
    confidence: Floats
    correct: Floats

    @classmethod
    def empty(cls, bins: int = 15) -> Reliability:
        """Of no rows."""
        if bins < 1:
            raise ValueError(f"bins is {bins}; it must be at least 1 (10 and 15 are customary)")
        return cls(np.zeros(bins), np.zeros(bins), np.zeros(bins))

    def update(self, confidence: Floats, correct: Floats) -> Reliability:
        """With these rows added, confidences in [0, 1]; these sums stay."""
        bins, place = len(self.count), resampled.bin_of(confidence, len(self.count))
        sums = [np.bincount(place, weights=w, minlength=bins) for w in (None, confidence, correct)]
        return self.merge(Reliability(*(s.astype(np.float64) for s in sums)))

    def merge(self, other: Reliability) -> Reliability:
        """Over the rows of both."""
        return Reliability(
            self.count + other.count, self.confidence + other.confidence, self.correct + other.correct
        )  # fmt: skip

    @property
    def error(self) -> float:
        """Expected calibration error (Naeini et al., 2015; Guo et al., 2017): Σ_b (n_b/N) |acc_b − conf_b|."""
        return float(np.abs(self.correct - self.confidence).sum() / self.count.sum())

    def bins(self) -> list[tuple[float, float, float, float, float]]:
        """Lower end, upper end, rows, mean confidence and accuracy of each bin that has rows."""
        edges = np.linspace(0, 1, len(self.count) + 1)
        return [
            (float(edges[b]), float(edges[b + 1]), float(n), float(self.confidence[b] / n), float(self.correct[b] / n))
            for b, n in enumerate(self.count) if n
        ]  # fmt: skip


def reliability(grades: Grades, bins: int = 15) -> Reliability:
    """The bins of graded rows."""
    return Reliability.empty(bins).update(grades.confidence, grades.correct)


# ---------------------------------------------------------------- does confidence tell right from wrong?


def aurc(score: Floats, correct: Floats) -> float:
    """Area under the risk-coverage curve: mean over k of the error rate among the k surest rows; smaller is better.

    Geifman et al. (2019), "Bias-Reduced Uncertainty Estimation". Scores [N], larger is surer, and whether answers are
    right, [N]. Tied rows: the expectation over their orders.

    Returns:
        In [0, 1].
    """
    return _areas(score, correct)[0]


def augrc(score: Floats, correct: Floats) -> float:
    """Area under the generalised risk-coverage curve: mean over k of (errors among the k surest rows) / N.

    Traub et al. (2024), arXiv 2407.01032: the probability that a row is accepted and wrong, averaged over coverage.
    Arguments and ties as in `aurc`.

    Returns:
        In [0, 1]; smaller is better.
    """
    return _areas(score, correct)[1]


def auroc(score: Floats, correct: Floats) -> float | None:
    """Probability that a right row is surer than a wrong one, ties by half, as in `aurc`; None if all are alike."""
    return _number(_areas(score, correct)[2])


def _areas(score: Floats, correct: Floats) -> tuple[float, float, float]:
    under, generalised = resampled.risk_coverage(score, correct, np.ones((1, len(score)), dtype=np.float32))
    ordered = resampled.auroc(correct.mean(keepdims=True), generalised, len(score))
    return float(under[0]), float(generalised[0]), float(ordered[0])


# ---------------------------------------------------------------- everything


def scores(grades: Grades, *, bins: int = 15) -> dict[str, float | None]:
    """All metrics of graded rows.

    Returns:
        "top1", "top5" (None with fewer than six classes), "nlpd", "brier", "ece", "aurc", "augrc", "auroc" (None if all
        rows are right, or none).
    """
    found = resampled.scores(grades, np.ones((1, len(grades.nlpd)), dtype=np.float32), bins)
    return {name: _number(found[name][0]) if name in found else None for name in NAMES}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)

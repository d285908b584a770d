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

Floats = NDArray[np.float64]

NAMES = ("top1", "top5", "nlpd", "brier", "ece", "aurc", "augrc", "auroc")
SMALLEST = 1e-12
"""Probabilities below it count as it in the NLPD, so that one row cannot make it infinite."""

# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Grades:
    """What the metrics read of N rows.

    Attributes:
        confidence: Largest probability, [N], float64; what AURC, AUGRC and AUROC sort by.
        correct: Whether the label comes first, [N]; ties go to the lower class.
        among_five: Whether it is among the first five, [N]; None with fewer than six classes.
        nlpd: −ln p_y with p_y clamped at `SMALLEST`, [N], in nats.
        brier: Σ_c (p_c − 1[c = y])², [N], in [0, 2].
        clamped: How many p_y were clamped.
    """

    confidence: Floats
    correct: Floats
    among_five: Floats | None
    nlpd: Floats
    brier: Floats
    clamped: int


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
        bins, place = len(self.count), bin_of(confidence, len(self.count))
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
    under, generalised = risk_coverage(score, correct, np.ones((1, len(score)), dtype=np.float32))
    ordered = auroc_from_augrc(correct.mean(keepdims=True), generalised, len(score))
    return float(under[0]), float(generalised[0]), float(ordered[0])


# ---------------------------------------------------------------- everything


def scores(grades: Grades, *, bins: int = 15) -> dict[str, float | None]:
    """All metrics of graded rows.

    Returns:
        "top1", "top5" (None with fewer than six classes), "nlpd", "brier", "ece", "aurc", "augrc", "auroc" (None if all
        rows are right, or none).
    """
    found = resampled_scores(grades, np.ones((1, len(grades.nlpd)), dtype=np.float32), bins)
    return {name: _number(found[name][0]) if name in found else None for name in NAMES}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# ---------------------------------------------------------------- the same on many resamples at once, for the bootstrap

Weights = NDArray[np.float32]
_TOGETHER = 128
"""Resamples worked on together."""


def resample(rows: int, resamples: int, seed: int = 0) -> Weights:
    """How often each row is drawn in many resamples; the first is of each row once: the metric itself.

    Args:
        rows: N.
        resamples: R; 0: none.
        seed: Of the draws, numpy's PCG64, the same everywhere.

    Returns:
        [1 + R, N], float32; the first row is ones.

    Raises:
        ValueError: No rows, or a negative number of resamples.
    """
    if rows < 1 or resamples < 0:
        raise ValueError(f"there are {rows} rows and {resamples} resamples; at least 1 row and 0 resamples are needed")
    generator = np.random.default_rng(seed)
    weights = np.ones((1 + resamples, rows), dtype=np.float32)
    for draw in weights[1:]:
        draw[:] = np.bincount(generator.integers(rows, size=rows), minlength=rows)
    return weights


def resampled_scores(grades: Grades, weights: Weights, bins: int = 15) -> dict[str, Floats]:
    """All metrics of graded rows on each resample.

    Returns:
        "top1", "top5" (not with fewer than six classes), "nlpd", "brier", "ece", "aurc", "augrc" and "auroc" (NaN
        where all rows are right, or none), [1 + R] each.
    """
    rows = np.arange(len(grades.nlpd))
    gaps = np.zeros((bins, len(rows)))
    gaps[bin_of(grades.confidence, bins), rows] = grades.correct - grades.confidence
    five = [] if grades.among_five is None else [grades.among_five]
    means = resampled_mean(np.stack([grades.correct, *five, grades.nlpd, grades.brier, *gaps]), weights)
    found = {"top1": means[0]} | ({"top5": means[1]} if five else {})
    found["nlpd"], found["brier"], gaps = means[len(five) + 1], means[len(five) + 2], means[len(five) + 3 :]
    found["ece"] = np.abs(gaps).sum(axis=0)
    found["aurc"], found["augrc"] = risk_coverage(grades.confidence, grades.correct, weights)
    found["auroc"] = auroc_from_augrc(found["top1"], found["augrc"], len(rows))
    return found


def bin_of(confidence: Floats, bins: int) -> NDArray[np.intp]:
    """Which of the bins of equal width each confidence is in, [N]: lower ends belong to them, and 1 to the last."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="right")


def resampled_mean(values: Floats, weights: Weights) -> Floats:
    """Mean over the rows drawn of values [K, N]: [K, 1 + R]; float64 for the rows themselves, float32 for resamples."""
    means = (values.astype(np.float32) @ weights.T).astype(np.float64)
    means[:, 0] = values.sum(axis=1)
    return np.asarray(means / values.shape[1])


def risk_coverage(score: Floats, correct: Floats, weights: Weights) -> tuple[Floats, Floats]:
    """AURC and AUGRC, row by row instead of along the curve: only wrong rows add something.

    An error at place k of N adds (1/k + ... + 1/N) / N to the mean over places of the error rate so far, and
    (N + 1 - k) / N² to that of the errors so far over N. Equally sure rows add the mean over the places of all of them,
    which is the expectation over their orders.

    Args:
        score: Larger is surer, [N].
        correct: Whether the answer is right, [N].
        weights: [1 + R, N].

    Returns:
        [1 + R] each.
    """
    rows = len(score)
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])  # of groups of equally sure rows
    wrong = np.add.reduceat(1 - correct[order], starts) > 0
    places = np.arange(rows + 1)
    harmonic = np.r_[0.0, np.cumsum(1 / places[1:])]
    later = np.r_[0.0, np.cumsum(harmonic[-1] - harmonic[:-1])]  # Σ of 1/k + ... + 1/N over places k
    left = places * (rows + 1) - places * (places + 1) / 2  # Σ of N + 1 - k over places k
    aurc, augrc = np.empty(len(weights)), np.empty(len(weights))
    for some in range(0, len(weights), _TOGETHER):
        part = slice(some, some + _TOGETHER)
        sizes = np.take(weights[part], order, axis=1)
        errors = sizes * (1 - correct[order]).astype(np.float32)
        if len(starts) < rows:
            sizes, errors = np.add.reduceat(sizes, starts, axis=1), np.add.reduceat(errors, starts, axis=1)
        last = sizes.cumsum(axis=1)[:, wrong].astype(np.int32)  # whole numbers, exact up to 2^24
        sizes = sizes[:, wrong]
        first = last - sizes.astype(np.int32)
        share = errors[:, wrong] / np.maximum(sizes, 1, dtype=np.float64)
        aurc[part] = ((later[last] - later[first]) * share).sum(axis=1) / rows
        augrc[part] = ((left[last] - left[first]) * share).sum(axis=1) / rows**2
    return aurc, augrc


def auroc_from_augrc(top1: Floats, augrc: Floats, rows: int) -> Floats:
    """Probability that a right row is surer than a wrong one, from AUGRC.

    N²·AUGRC - E(E + 1)/2 counts the pairs of one of E errors and a right row that is no surer, ties by half.

    Args:
        top1: Share of right rows, [1 + R].
        augrc: [1 + R].
        rows: N.

    Returns:
        [1 + R]; NaN where there are no pairs.
    """
    errors = np.round(rows * (1 - top1))
    pairs = errors * (rows - errors)
    wrong = np.round(2 * rows**2 * augrc - errors * (errors + 1)) / 2
    return np.divide(pairs - wrong, pairs, out=np.full_like(wrong, np.nan), where=pairs > 0)

"""The metrics of `offramp.metrics.calibration` on many resamples of the same rows at once, for the bootstrap.

A resample is how often each row is drawn, a row of weights [1 + R, N]. The first one is one of each, so that the first
value of every metric is the metric itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Weights = NDArray[np.float32]
_TOGETHER = 128
"""Resamples worked on together."""


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


def draws(rows: int, resamples: int, seed: int = 0) -> Weights:
    """How often each row is drawn.

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


def scores(grades: Grades, weights: Weights, bins: int = 15) -> dict[str, Floats]:
    """All metrics of graded rows on each resample.

    Returns:
        "top1", "top5" (not with fewer than six classes), "nlpd", "brier", "ece", "aurc", "augrc" and "auroc" (NaN
        where all rows are right, or none), [1 + R] each.
    """
    rows = np.arange(len(grades.nlpd))
    gaps = np.zeros((bins, len(rows)))
    gaps[bin_of(grades.confidence, bins), rows] = grades.correct - grades.confidence
    five = [] if grades.among_five is None else [grades.among_five]
    means = mean(np.stack([grades.correct, *five, grades.nlpd, grades.brier, *gaps]), weights)
    found = {"top1": means[0]} | ({"top5": means[1]} if five else {})
    found["nlpd"], found["brier"], gaps = means[len(five) + 1], means[len(five) + 2], means[len(five) + 3 :]
    found["ece"] = np.abs(gaps).sum(axis=0)
    found["aurc"], found["augrc"] = risk_coverage(grades.confidence, grades.correct, weights)
    found["auroc"] = auroc(found["top1"], found["augrc"], len(rows))
    return found


def bin_of(confidence: Floats, bins: int) -> NDArray[np.intp]:
    """Which of the bins of equal width each confidence is in, [N]: lower ends belong to them, and 1 to the last."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="right")


def mean(values: Floats, weights: Weights) -> Floats:
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


def auroc(top1: Floats, augrc: Floats, rows: int) -> Floats:
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

"""The metrics of `offramp.metrics.calibration` on many resamples of the same rows at once, for the bootstrap.

A resample is how often each row is drawn: a column of weights [N, 1 + R], whose first column is one of each row, so that
the first value of every metric is the metric itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from offramp.metrics.calibration import Grades

Floats = NDArray[np.float64]
Weights = NDArray[np.float32]
_COLUMNS = 128
"""Resamples worked on together."""


def draws(rows: int, resamples: int, seed: int = 0) -> Weights:
    """How often each row is drawn.

    Args:
        rows: N.
        resamples: R; 0: none.
        seed: Of the draws; numpy's PCG64, the same everywhere.

    Returns:
        [N, 1 + R], float32; the first column is ones.

    Raises:
        ValueError: No rows, or a negative number of resamples.
    """
    if rows < 1 or resamples < 0:
        raise ValueError(f"there are {rows} rows and {resamples} resamples; at least 1 row and 0 resamples are needed")
    generator = np.random.default_rng(seed)
    weights = np.ones((rows, 1 + resamples), dtype=np.float32)
    for column in range(1, 1 + resamples):
        weights[:, column] = np.bincount(generator.integers(rows, size=rows), minlength=rows)
    return weights


def scores(grades: Grades, weights: Weights, bins: int = 15) -> dict[str, Floats]:
    """All metrics of graded rows on each resample.

    Args:
        grades: The rows.
        weights: [N, 1 + R].
        bins: Of the calibration error.

    Returns:
        "top1", "top5" (not with fewer than six classes), "nlpd", "ece", "aurc", "augrc" and "brier", [1 + R] each.
    """
    found = {"top1": mean(grades.correct, weights)}
    if grades.among_five is not None:
        found["top5"] = mean(grades.among_five, weights)
    found["nlpd"] = mean(grades.nlpd, weights)
    found["ece"] = calibration_error(grades.confidence, grades.correct, weights, bins)
    found["aurc"], found["augrc"] = risk_coverage(grades.score, grades.correct, weights)
    found["brier"] = mean(grades.brier, weights)
    return found


def mean(values: Floats, weights: Weights) -> Floats:
    """Mean over the rows drawn of values [N]: [1 + R]."""
    return np.asarray(values @ weights / len(values), dtype=np.float64)


def calibration_error(confidence: Floats, correct: Floats, weights: Weights, bins: int) -> Floats:
    """Expected calibration error, Σ_b |Σ_{i in b} (correct_i - confidence_i)| / N over bins of equal width: [1 + R]."""
    gaps = np.zeros((bins, len(confidence)))
    edges = np.linspace(0, 1, bins + 1)[1:-1]  # the last bin holds 1 as well
    gaps[np.searchsorted(edges, confidence, side="right"), np.arange(len(confidence))] = correct - confidence
    return np.asarray(np.abs(gaps @ weights).sum(axis=0) / len(confidence), dtype=np.float64)


def risk_coverage(score: Floats, correct: Floats, weights: Weights) -> tuple[Floats, Floats]:
    """AURC and AUGRC, row by row instead of along the curve: only wrong rows add something.

    An error at place k of N adds (1/k + ... + 1/N) / N to the mean over places of the error rate so far, and
    (N + 1 - k) / N² to that of the errors so far over N. Equally sure rows add the mean over the places of all of them,
    which is the expectation over their orders.

    Args:
        score: Larger is surer, [N].
        correct: Whether the answer is right, [N].
        weights: [N, 1 + R].

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
    aurc, augrc = np.empty(weights.shape[1]), np.empty(weights.shape[1])
    for columns in _chunks(weights.shape[1]):
        sizes = weights[order, columns]
        errors = sizes * (1 - correct[order, None]).astype(np.float32)
        if len(starts) < rows:
            sizes, errors = np.add.reduceat(sizes, starts, axis=0), np.add.reduceat(errors, starts, axis=0)
        last = sizes.cumsum(axis=0, dtype=np.int64)[wrong]
        sizes = sizes[wrong]
        first = last - sizes.astype(np.int64)
        share = errors[wrong] / np.maximum(sizes, 1, dtype=np.float64)
        aurc[columns] = ((later[last] - later[first]) * share).sum(axis=0) / rows
        augrc[columns] = ((left[last] - left[first]) * share).sum(axis=0) / rows**2
    return aurc, augrc


def _chunks(columns: int) -> Iterator[slice]:
    return (slice(start, min(start + _COLUMNS, columns)) for start in range(0, columns, _COLUMNS))

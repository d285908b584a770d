"""Calibration metrics against enumeration, torchmetrics, closed forms and simulation."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.metrics import calibration
from offramp.metrics.calibration import Reliability, augrc, aurc, auroc, grade, reliability, scores

few = st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.5001, 0.9]), st.booleans()), min_size=1, max_size=6)


def random_rows(n=200, classes=10, seed=0):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=random, dtype=torch.float64)
    labels = torch.where(
        torch.rand(n, generator=random) < 0.6, logits.argmax(1), torch.randint(classes, (n,), generator=random)
    )
    return (2 * logits).softmax(1), labels


# ---------------------------------------------------------------- rows


@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=5), st.integers(0, 6))
def test_top_k_is_that_of_a_sort_by_probability_then_class(rows, label):
    p = torch.tensor(rows, dtype=torch.float64) + 1e-3
    found = grade(p, torch.full((len(p),), label))
    for i, row in enumerate(p.tolist()):
        order = sorted(range(7), key=lambda c: (-row[c], c))
        assert found.correct[i] == (label == order[0])
        assert found.among_five[i] == (label in order[:5])


def test_nlpd_is_clamped_and_counts_it():
    p = torch.tensor([[1.0, 0.0], [0.25, 0.75], [1e-13, 1.0]], dtype=torch.float64)
    found = grade(p, torch.tensor([1, 0, 0]))
    np.testing.assert_allclose(found.nlpd, [12 * np.log(10), np.log(4), 12 * np.log(10)])
    assert found.clamped == 2
    assert found.among_five is None
    assert scores(found)["top5"] is None


def test_brier_against_a_loop():
    p, labels = random_rows(20, 4)
    for row, label, value in zip(p.tolist(), labels.tolist(), grade(p, labels).brier, strict=True):
        assert value == pytest.approx(sum((q - (c == label)) ** 2 for c, q in enumerate(row)))


def test_bad_rows_are_named():
    p, labels = random_rows(5, 4)
    with pytest.raises(ValueError, match=r"label of row 2 is 4; allowed are 0\.\.3"):
        grade(p, torch.tensor([0, 1, 4, 0, 0]))
    p[3, 0] = torch.nan
    with pytest.raises(ValueError, match="row 3 are not finite"):
        grade(p, labels)
    with pytest.raises(ValueError, match="at least one row"):
        grade(p[:0], labels[:0])
    with pytest.raises(ValueError, match="bins is 0"):
        Reliability.empty(0)


# ---------------------------------------------------------------- calibration error


def test_confidence_one_is_in_the_last_bin():
    # Two rows, one right: |1/2 - .975| in one bin; with a bin of its own for 1.0 it were (.95 + 0) / 2.
    rows = Reliability.empty(10).update(np.array([0.95, 1.0]), np.array([0.0, 1.0]))
    assert rows.error == pytest.approx(0.475)
    assert rows.bins() == [(0.9, 1.0, 2.0, pytest.approx(0.975), 0.5)]


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), st.integers(1, 20))
def test_calibration_error_against_a_loop_and_merged(rows, bins):
    confidence, correct = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    edges = np.linspace(0, 1, bins + 1)
    total = 0.0
    for b in range(bins):
        last = b == bins - 1
        own = [(c, r) for c, r in rows if edges[b] <= c and (c <= 1 if last else c < edges[b + 1])]
        if own:
            total += abs(sum(r for _, r in own) - sum(c for c, _ in own)) / len(rows)
    whole = Reliability.empty(bins).update(confidence, correct)
    assert whole.error == pytest.approx(total, abs=1e-12)
    assert whole.count.sum() == len(rows)
    half = len(rows) // 2
    first, second = (Reliability.empty(bins).update(confidence[s], correct[s]) for s in (np.s_[:half], np.s_[half:]))
    np.testing.assert_allclose(first.merge(second).confidence, whole.confidence, atol=1e-12)
    np.testing.assert_array_equal(first.merge(second).count, whole.count)


@pytest.mark.parametrize("bins", [10, 15])
def test_calibration_error_is_that_of_torchmetrics_below_one(bins):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    p, labels = random_rows(500, 7)
    assert p.max() < 1
    expected = float(functional.multiclass_calibration_error(p, labels, 7, n_bins=bins, norm="l1"))
    assert reliability(grade(p, labels), bins).error == pytest.approx(expected, abs=1e-6)  # it works in float32


# ---------------------------------------------------------------- right from wrong


@given(few)
def test_areas_are_means_over_the_orders_of_ties(rows):
    score, correct = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    risks, joint = [], []
    for order in permutations(range(len(rows))):
        if all(score[a] >= score[b] for a, b in zip(order, order[1:], strict=False)):
            errors = np.cumsum(1 - correct[list(order)])
            risks.append((errors / np.arange(1, len(rows) + 1)).mean())
            joint.append(errors.mean() / len(rows))
    assert aurc(score, correct) == pytest.approx(np.mean(risks), abs=1e-12)
    assert augrc(score, correct) == pytest.approx(np.mean(joint), abs=1e-12)


@given(few)
def test_auroc_is_the_share_of_ordered_pairs(rows):
    score, correct = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    pairs = [(s > t) + (s == t) / 2 for s in score[correct == 1] for t in score[correct == 0]]
    assert auroc(score, correct) == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_auroc_is_that_of_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    found = grade(*random_rows())
    score, right = torch.tensor(found.confidence.round(1)), torch.tensor(found.correct).long()
    expected = float(functional.binary_auroc(score, right))
    assert auroc(score.numpy(), right.double().numpy()) == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- everything


def test_scores_of_weighted_rows_are_those_of_repeated_rows():
    p, labels = random_rows(12, 7)
    times = torch.tensor([0, 3, 1, 1, 0, 2, 1, 1, 1, 0, 1, 1])  # as many as there are rows
    repeated = scores(grade(p.repeat_interleave(times, 0), labels.repeat_interleave(times)))
    weighted = calibration.resampled_scores(grade(p, labels), times.float().numpy()[None].repeat(2, axis=0))
    for name, value in repeated.items():
        assert weighted[name][1] == pytest.approx(value), name

"""Per-prompt losses against sums done by hand."""

import math

import numpy as np
import pytest
import torch

from offramp.risk import risk_consistency, tail, textual_consistency

EARLY = [0.2, 0.9, 0.5, 0.0]
FULL = [0.3, 0.4, 0.5, 0.0]


def test_consistency_with_the_full_model_is_the_distance():
    assert textual_consistency([0.0, 0.25, 1.0]).tolist() == [0.0, 0.25, 1.0]
    assert textual_consistency(torch.tensor([True, False])).tolist() == [1.0, 0.0]


def test_a_better_answer_does_not_pay_for_a_worse_one():
    losses = risk_consistency(EARLY, FULL)
    assert losses == pytest.approx([0.0, 0.5, 0.0, 0.0])
    assert losses.mean() > max(0.0, np.mean(EARLY) - np.mean(FULL))  # clipping the mean is another, smaller number
    assert risk_consistency(EARLY, FULL, signed=True) == pytest.approx([-0.1, 0.5, 0.0, 0.0])


def test_tail_counts_prompts_that_lose_more_than_the_margin():
    assert tail(EARLY, FULL, 0.2).tolist() == [0, 1, 0, 0]
    assert tail(EARLY, FULL, 0.0).tolist() == [0, 1, 0, 0]
    assert 0.8 - 0.7 > 0.1  # in floats
    assert tail([0.8], [0.7], 0.1).tolist() == [0]


def test_everything_comes_back_in_double_precision():
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        values = torch.tensor([0.5, 1.0], dtype=kind, requires_grad=True)
        assert textual_consistency(values).dtype == np.float64
    assert textual_consistency(np.array([1.0 + 1e-7, -1e-7])).tolist() == [1.0, 0.0]  # rounding of float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: textual_consistency([0.1, 1.5]), r"distance\[1\] is 1.5; allowed are finite values in \[0, 1\]"),
        (lambda: textual_consistency([0.1, math.nan]), r"distance\[1\] is nan"),
        (lambda: textual_consistency([]), "distance is empty"),
        (lambda: textual_consistency(np.zeros((2, 2))), r"distance has shape \[2, 2\]; it must have 1 dimension"),
        (lambda: risk_consistency([0.1], [-0.2]), r"full\[0\] is -0.2"),
        (lambda: risk_consistency([-1.0], [0.2], signed=True), r"early\[0\] is -1"),
        (lambda: risk_consistency([0.1, 0.2], [0.1]), "early has 2 prompts, full has 1"),
        (lambda: tail([0.1], [0.1], 1.0), r"margin is 1.0; allowed are values in \[0, 1\)"),
        (lambda: tail([0.1], [0.1], math.nan), "margin is nan"),
        (lambda: tail([1.1], [0.1], 0.1), r"early\[0\] is 1.1"),
    ],
)
def test_what_is_no_loss_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Thresholds of the budgeted-batch protocol against a loop over rows, exact shares, and small cases by hand."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.risk import budgets

COSTS = torch.tensor([6.9, 14.4, 27.3, 48.0], dtype=torch.float64)
INF = math.inf


def published(confidences, q: Fraction):
    """Section by section with the published "at least the threshold", exact shares and plain lists: exits of rows."""
    exits, rows = len(confidences), len(confidences[0])
    total = sum(q**e for e in range(1, exits + 1))
    left, thresholds = list(range(rows)), []
    for e in range(exits - 1):
        k = math.floor(rows * q ** (e + 1) / total)
        ranked = sorted((confidences[e][row] for row in left), reverse=True)
        if k == 0:
            threshold = INF
        elif not ranked:
            threshold = -INF
        else:
            threshold = ranked[-1] if k >= len(ranked) else ranked[k - 1]
        thresholds.append(threshold)
        left = [row for row in left if not confidences[e][row] >= threshold]
    return [*thresholds, -INF]


def first_at_least(confidences, thresholds):
    return [
        next(e for e, threshold in enumerate(thresholds) if confidences[e][row] >= threshold)
        for row in range(len(confidences[0]))
    ]


coarse = st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9, 1.0])  # many ties


@st.composite
def matrices(draw, values=coarse):
    exits, rows = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    return draw(st.lists(st.lists(values, min_size=rows, max_size=rows), min_size=exits, max_size=exits))


@settings(max_examples=200, deadline=None)
@given(matrices(), st.integers(1, 39), st.sampled_from([torch.float32, torch.float64]), st.data())
def test_thresholds_are_the_published_ones(rows, p, dtype, data):
    confidences = torch.tensor(rows, dtype=dtype)
    costs = torch.arange(1, len(rows) + 1).double()
    budget = budgets.fit(confidences, costs, p / 20)
    expected = published(confidences.tolist(), Fraction(p, 20))
    assert budgets.leave(confidences, budget.thresholds).tolist() == first_at_least(confidences.tolist(), expected)
    # and on rows that were not there, at and beside the thresholds
    near = [float(np.nextafter(np.asarray(t, confidences.numpy().dtype), s)) for t in expected for s in (-INF, INF)]
    pool = st.sampled_from([t for t in [*near, *expected, 0.3] if math.isfinite(t)])
    new = torch.tensor(data.draw(st.lists(st.lists(pool, min_size=4, max_size=4), min_size=len(rows), max_size=len(rows))), dtype=dtype)  # fmt: skip  # noqa: E501
    assert budgets.leave(new, budget.thresholds).tolist() == first_at_least(new.tolist(), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 39), st.integers(1, 90), st.integers(0, 2**31))
def test_without_ties_each_exit_gets_its_share_and_the_cost_follows(exits, p, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    confidences = torch.stack([torch.randperm(rows, generator=generator) for _ in range(exits)]) / rows
    costs = (torch.rand(exits, generator=generator) + 0.1).cumsum(0).double()
    budget = budgets.fit(confidences, costs, p / 20)
    counts = torch.bincount(budgets.leave(confidences, budget.thresholds), minlength=exits).tolist()
    q = Fraction(p, 20)
    total = sum(q**e for e in range(1, exits + 1))
    expected = [math.floor(rows * q**e / total) for e in range(1, exits)]
    assert counts == [*expected, rows - sum(expected)]
    shares = torch.tensor(counts, dtype=torch.float64) / rows
    assert budget.realised == pytest.approx(float(shares @ costs))
    assert budget.realised >= budget.target * (1 - 1e-12)  # rounding down leaves rows to later exits


def test_the_documented_costs_of_four_exits():
    assert len(budgets.QS) == 39
    assert [budgets.target_cost(budgets.QS[p - 1], COSTS) for p in (1, 10, 20, 39)] == pytest.approx(
        [7.3, 14.4, 24.15, 34.9], abs=0.05
    )


@given(st.integers(1, 40), st.floats(0, 1e6), st.floats(0, 1e6))
def test_shares_sum_to_one_and_cost_grows_with_q(exits, one, other):
    shares = budgets.fractions(one, exits)
    assert shares.shape == (exits,)
    assert float(shares.sum()) == pytest.approx(1)
    assert bool((shares >= 0).all())
    costs = torch.arange(1, exits + 1).double()
    low, high = sorted([one, other])
    assert budgets.target_cost(low, costs) <= budgets.target_cost(high, costs) * (1 + 1e-12)


def test_extreme_shares():
    assert budgets.fractions(0, 3).tolist() == [1, 0, 0]
    assert budgets.fractions(INF, 3).tolist() == [0, 0, 1]
    assert budgets.fractions(1, 4).tolist() == [0.25] * 4
    assert budgets.fractions(2, 3).tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert budgets.fractions(1e300, 40)[-1] == 1


# ---------------------------------------------------------------- small cases by hand


def fitted(confidences, q=1.0):
    confidences = torch.tensor(confidences, dtype=torch.float64)
    budget = budgets.fit(confidences, torch.arange(1, len(confidences) + 1), q)
    return budget, budgets.leave(confidences, budget.thresholds).tolist()


def test_ties_leave_together():
    budget, exits = fitted([[0.9, 0.9, 0.9, 0.2], [0.5, 0.5, 0.5, 0.5]])  # two of four are wanted, three are equal
    assert exits == [0, 0, 0, 1]
    assert budget.realised == 1.25
    assert budget.target == 1.5


def test_too_few_rows_for_an_early_exit():
    budget, exits = fitted([[0.9, 0.8], [0.7, 0.6], [0.5, 0.4]])  # a third of two rows is none
    assert budget.thresholds.tolist() == [INF, INF, -INF]
    assert exits == [2, 2]


def test_when_all_have_left_later_exits_take_whoever_comes():
    budget, exits = fitted([[0.7] * 4, [0.5] * 4, [0.5] * 4, [0.1] * 4])
    assert exits == [0] * 4
    assert budget.thresholds[1:].tolist() == [-INF] * 3
    new = torch.tensor([[0.6], [0.0], [0.0], [0.0]], dtype=torch.float64)
    assert budgets.leave(new, budget.thresholds).tolist() == [1]  # the published code sends it through all exits


def test_as_many_as_are_left():
    # q = 1, E = 2 and ties at the first exit leave one row; with three exits two are wanted at the second.
    budget, exits = fitted([[0.9] * 5 + [0.1], [0.0] * 5 + [0.3], [0.0] * 6])
    assert exits == [0] * 5 + [1]
    assert budget.thresholds[1] == np.nextafter(0.3, 0)


def test_a_confidence_of_one_is_above_its_threshold():
    budget, exits = fitted([[1.0, 1.0, 0.9, 0.9], [1.0, 1.0, 1.0, 1.0]])
    assert exits == [0, 0, 1, 1]
    assert budget.thresholds[0] < 1


def test_a_single_exit():
    budget, exits = fitted([[0.3, 0.9]])
    assert exits == [0, 0]
    assert budget.thresholds.tolist() == [-INF]
    assert budget.realised == budget.target


def test_thresholds_keep_the_type_of_the_confidences():
    confidences = torch.tensor([[0.1, 0.7, 0.3, 0.9], [0.5] * 4])
    thresholds = budgets.fit(confidences, torch.tensor([1.0, 2.0]), 1).thresholds
    assert thresholds.dtype == torch.float32
    assert float(thresholds[0]) == np.nextafter(np.float32(0.7), np.float32(0))


# ---------------------------------------------------------------- one budget of a user


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.floats(0, 1))
def test_q_of_a_cost_asks_for_that_cost(steps, place):
    costs = torch.tensor(steps, dtype=torch.float64).cumsum(0)
    asked = float(costs[0] + place * (costs[-1] - costs[0]))
    assert budgets.target_cost(budgets.q_of(costs, flops=asked), costs) == pytest.approx(asked, rel=1e-5)
    share = asked / float(costs[-1])
    assert budgets.target_cost(budgets.q_of(costs, share=share), costs) == pytest.approx(asked, rel=1e-5)


def test_q_of_the_ends_and_of_a_known_budget():
    assert budgets.q_of(COSTS, flops=6.9) == 0
    assert budgets.q_of(COSTS, share=1) == INF
    half = float(COSTS[-1]) / 2  # of a plain network that costs half of what all heads do, all is half
    assert budgets.q_of(COSTS, share=1, full=half) == budgets.q_of(COSTS, share=0.5)
    assert budgets.q_of(COSTS, share=2, full=half) == INF
    assert budgets.q_of(COSTS, flops=24.15) == pytest.approx(1)
    assert budgets.q_of(COSTS, flops=budgets.target_cost(0.35, COSTS)) == pytest.approx(0.35)
    assert budgets.q_of(torch.tensor([5.0, 5.0]), flops=5) == 0


@pytest.mark.parametrize("asked", [{"flops": 6.8}, {"flops": 48.1}, {"share": 0.1}, {"share": 1.01}, {"flops": math.nan}])  # fmt: skip  # noqa: E501
def test_a_budget_out_of_reach_says_what_is_in_reach(asked):
    with pytest.raises(ValueError, match=r"a budget of .* allowed are 6\.9 FLOPs per row \(0\.144 .* to 48 \(1"):
        budgets.q_of(COSTS, **asked)


def test_one_budget_at_a_time():
    for asked in ({}, {"flops": 10, "share": 0.5}):
        with pytest.raises(ValueError, match="give one of them"):
            budgets.q_of(COSTS, **asked)


# ---------------------------------------------------------------- bad input


def test_bad_input_is_refused():
    good = torch.rand(2, 5)
    costs = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="q is -1"):
        budgets.fit(good, costs, -1)
    with pytest.raises(ValueError, match="q is nan"):
        budgets.fractions(math.nan, 2)
    with pytest.raises(ValueError, match="at least 1 is needed"):
        budgets.fractions(1, 0)
    for wrong in ([2.0, 1.0], [0.0, 1.0], [1.0, math.inf], [1.0, math.nan], []):
        with pytest.raises(ValueError, match="costs are"):
            budgets.target_cost(1, torch.tensor(wrong))
    with pytest.raises(ValueError, match=r"shape \[2, 5\]; 3 exits"):
        budgets.fit(good, torch.tensor([1.0, 2.0, 3.0]), 1)
    with pytest.raises(ValueError, match=r"shape \[2, 0\]"):
        budgets.fit(good[:, :0], costs, 1)
    good[1, 3] = math.nan
    with pytest.raises(ValueError, match="row 3 at exit 2 is nan"):
        budgets.leave(good, costs)

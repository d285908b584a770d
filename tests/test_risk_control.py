"""Which setting is chosen, with scripted p-values, losses and costs. Their promises: test_risk_validity.py."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.risk import (
    binomial,
    chains,
    conformal_risk_control,
    fixed_sequence,
    hoeffding_bentkus,
    pareto_front,
    pareto_testing,
    split,
)


class Asked:
    """P-values that remember which of them were asked for."""

    def __init__(self, *values):
        self.values, self.asked = values, []

    def __iter__(self):
        for index, value in enumerate(self.values):
            self.asked.append(index)
            yield value


# ---------------------------------------------------------------- one sequence


@pytest.mark.parametrize(
    ("p_values", "index", "seen"),
    [
        ([0.2, 0.0, 0.0], None, 1),  # the first fails
        ([0.01, 0.02, 0.05], 2, 3),  # all pass; equal to the level passes
        ([0.01, 0.04, 0.06, 0.0], 1, 3),  # a gap: what is behind it does not count
        ([0.01, 0.06, 0.04, 0.01], 0, 2),
        ([1.0], None, 1),
        ([0.0], 0, 1),
        ([], None, 0),
    ],
)
def test_the_last_that_passed_before_the_first_that_failed(p_values, index, seen):
    asked = Asked(*p_values)
    result = fixed_sequence(asked, 0.05)
    assert result.index == index
    assert result.passed == tuple(range(0 if index is None else index + 1))
    assert asked.asked == list(range(seen))  # and not one more
    assert result.p_values == tuple(p_values[:seen])
    assert "0.95" in result.guarantee


def test_p_values_may_come_from_a_function():
    called = []

    def p_value(threshold):
        called.append(threshold)
        return 0.0 if threshold > 0.5 else 0.9

    assert fixed_sequence(map(p_value, [0.9, 0.7, 0.5, 0.3]), 0.1).index == 1
    assert called == [0.9, 0.7, 0.5]


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.01, 0.99))
def test_what_failed_is_never_returned(p_values, failure):
    result = fixed_sequence(iter(p_values), failure)
    assert all(p_values[i] <= failure for i in result.passed)
    assert result.index == (result.passed[-1] if result.passed else None)
    assert len(result.p_values) <= len(result.passed) + 1
    if len(result.passed) < len(p_values):
        assert p_values[len(result.passed)] > failure


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1, math.inf])
def test_what_is_no_p_value_is_refused(bad):
    with pytest.raises(ValueError, match=f"the p-value of setting 1 is {bad}"):
        fixed_sequence([0.0, bad], 0.1)


@pytest.mark.parametrize("failure", [0, 1, math.nan, 5])
def test_a_failure_is_strictly_between_0_and_1(failure):
    with pytest.raises(ValueError, match=f"failure is {failure}"):
        fixed_sequence([0.0], failure)
    with pytest.raises(ValueError, match=f"failure is {failure}"):
        chains([[0.0]], lambda c, i: 0, failure)
    with pytest.raises(ValueError, match=f"failure is {failure}"):
        pareto_testing(lambda s, p: ([], 0.0), 1, 2, bound=binomial, tolerance=0.1, failure=failure, seed=0)


# ---------------------------------------------------------------- several


def test_each_chain_gets_its_share_and_the_cheapest_wins():
    asked = [Asked(0.01, 0.02, 0.03), Asked(0.03, 0.0), Asked(0.001, 0.025, 0.2)]
    costs = [[9, 8, 1], [1, 1], [9, 7, 1]]  # those of failed ones are lowest, and not looked at
    looked = []

    def cost(chain, index):
        looked.append((chain, index))
        return costs[chain][index]

    result = chains(asked, cost, 0.06)  # 0.02 each
    assert [c.index for c in result.chains] == [1, None, 0]
    assert [c.failure for c in result.chains] == pytest.approx([0.02] * 3)
    assert [a.asked for a in asked] == [[0, 1, 2], [0], [0, 1]]
    assert looked == [(0, 0), (0, 1), (2, 0)]
    assert (result.chain, result.index, result.cost) == (0, 1, 8)


def test_an_earlier_setting_of_a_chain_may_be_the_cheapest():
    result = chains([[0.0, 0.0]], lambda chain, index: [3, 4][index], 0.1)
    assert (result.chain, result.index, result.cost) == (0, 0, 3)


def test_equal_costs_go_to_the_earlier_chain_and_the_safer_setting():
    result = chains([[0.9], [0.0, 0.0], [0.0]], lambda chain, index: 1, 0.1)
    assert (result.chain, result.index) == (1, 0)


def test_chains_without_a_certificate():
    result = chains([[0.06], [0.2]], lambda chain, index: 1 / 0, 0.1)
    assert (result.chain, result.index, result.cost) == (None, None, None)
    assert [c.p_values for c in result.chains] == [(0.06,), (0.2,)]


def test_chains_refuse():
    with pytest.raises(ValueError, match="at least one chain"):
        chains([], lambda chain, index: 0, 0.1)
    with pytest.raises(ValueError, match="the cost of setting 0 of chain 1 is nan"):
        chains([[0.0], [0.0]], lambda chain, index: [0, math.nan][chain], 0.1)


# ---------------------------------------------------------------- Pareto


def test_front_by_hand():
    #         0    1    2    3    4    5    6
    losses = [0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.0]
    costs_ = [9.0, 5.0, 6.0, 7.0, 5.0, 1.0, 9.0]  # 2 loses to 1, 3 and 4 to 1, 6 equals 0
    assert pareto_front(losses, costs_) == (0, 1, 5)
    assert pareto_front([0.5], [1.0]) == (0,)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=15))
def test_front_against_all_pairs(points):
    def beaten(a, b):
        return b[0] <= a[0] and b[1] <= a[1] and b != a

    front = pareto_front([p[0] for p in points], [p[1] for p in points])
    assert [points[i] for i in front] == sorted({p for p in points if not any(beaten(p, q) for q in points)})
    assert all(points.index(points[i]) == i for i in front)


def test_front_refuses():
    with pytest.raises(ValueError, match="there are 2 losses and 1 costs"):
        pareto_front([0.1, 0.2], [1.0])
    with pytest.raises(ValueError, match=r"costs\[0\] is nan"):
        pareto_front([0.1], [math.nan])


def test_split_is_a_seeded_partition():
    first, second = split(10, seed=3)
    assert sorted([*first, *second]) == list(range(10))
    assert len(first) == 5
    assert [a.tolist() for a in split(10, seed=3)] == [first.tolist(), second.tolist()]
    assert split(10, seed=4)[0].tolist() != first.tolist()
    assert [len(part) for part in split(10, 0, share=0.2)] == [2, 8]
    assert [len(part) for part in split(2, 0, share=0.01)] == [1, 1]
    with pytest.raises(ValueError, match="prompts is 1; at least 2"):
        split(1, 0)
    with pytest.raises(ValueError, match="share is 1"):
        split(10, 0, share=1)


def test_pareto_testing_looks_at_the_front_only_and_stops():
    # By setting: loss of every prompt, cost. 2 is beaten by 1; 4 fails; 5 is cheaper still and is not asked for.
    table = [(0.0, 9.0), (0.01, 6.0), (0.02, 7.0), (0.03, 5.0), (0.3, 2.0), (0.5, 1.0)]
    asked = []

    def measure(setting, prompts):
        asked.append((setting, tuple(prompts.tolist())))
        return np.full(len(prompts), table[setting][0]), table[setting][1]

    result = pareto_testing(measure, 6, 400, bound=hoeffding_bentkus, tolerance=0.1, failure=0.05, seed=7)
    first, second = (tuple(part.tolist()) for part in split(400, 7))
    assert asked == [*((s, first) for s in range(6)), *((s, second) for s in (0, 1, 3, 4))]
    assert result.front == (0, 1, 3, 4, 5)
    assert result.certified.index == 2
    assert result.passed == (0, 1, 3)
    assert result.setting == 3
    assert (result.first, result.second, result.seed) == (first, second, 7)


def test_pareto_testing_without_a_certificate():
    result = pareto_testing(
        lambda setting, prompts: (torch.ones(len(prompts)), float(setting)),
        3, 20, bound=binomial, tolerance=0.1, failure=0.05, seed=0,
    )  # fmt: skip
    assert result.setting is None
    assert result.passed == ()
    assert result.certified.p_values == (1.0,)


def test_pareto_testing_refuses():
    options = {"bound": binomial, "tolerance": 0.1, "failure": 0.1, "seed": 0}
    with pytest.raises(ValueError, match="settings is 0"):
        pareto_testing(lambda s, p: ([], 0.0), 0, 10, **options)
    with pytest.raises(ValueError, match=r"losses of setting 1\[0\] is nan"):
        pareto_testing(lambda s, p: ([0.0, math.nan][s] * np.ones(len(p)), 0.0), 2, 10, **options)
    with pytest.raises(ValueError, match="tolerance is 2"):
        pareto_testing(lambda s, p: ([], 0.0), 1, 10, **options | {"tolerance": 2})


# ---------------------------------------------------------------- on average


def test_conformal_risk_control_by_hand():
    # n = 9: allowed while (sum + 1) / 10 <= 0.25, that is sum <= 1.5
    losses = np.zeros((4, 9))
    losses[1, 0] = 0.5
    losses[2, 1] = 1.0  # the first prompt's 0.5 stays: 1.5
    losses[3, 2] = 0.1
    result = conformal_risk_control(losses, 0.25)
    assert result.risks == pytest.approx([0.1, 0.15, 0.25, 0.26])
    assert result.index == 2
    assert result.passed == (0, 1, 2)
    assert "average" in result.guarantee


def test_a_loss_that_falls_again_does_not_help():
    losses = [[0.0] * 9, [1.0] * 9, [0.0] * 9]
    assert conformal_risk_control(torch.tensor(losses), 0.2).index == 0
    assert conformal_risk_control(losses, 0.2).risks == pytest.approx([0.1, 1.0, 1.0])


def test_too_few_prompts_allow_nothing_and_too_many_tolerances_all():
    assert conformal_risk_control(np.zeros((3, 8)), 0.1).index is None  # 1 / 9 > 0.1
    assert conformal_risk_control(np.zeros((3, 9)), 0.1).index == 2  # 1 / 10
    assert conformal_risk_control(np.zeros((3, 8)), 0.1).passed == ()


def test_conformal_risk_control_refuses():
    for losses, message in [
        ([[0.0, 1.2]], r"losses\[0, 1\] is 1.2"),
        ([[0.0, math.nan]], r"losses\[0, 1\] is nan"),
        ([[-0.5]], r"losses\[0, 0\] is -0.5"),
        ([0.0, 0.1], r"losses has shape \[2\]; it must have 2 dimensions"),
        (np.zeros((0, 5)), "losses is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            conformal_risk_control(losses, 0.1)
    with pytest.raises(ValueError, match="tolerance is 0"):
        conformal_risk_control([[0.0]], 0)


def test_results_are_json():
    measured = pareto_testing(
        lambda s, p: (np.zeros(len(p)), 1.0), 2, 99, bound=binomial, tolerance=0.1, failure=0.1, seed=1
    )
    for result in (
        fixed_sequence([0.0, 1.0], 0.1),
        chains([[0.0], [1.0]], lambda c, i: np.float64(3), 0.1),
        conformal_risk_control(np.zeros((3, 9)), 0.1),
        measured,
    ):
        assert json.loads(json.dumps(asdict(result), allow_nan=False))

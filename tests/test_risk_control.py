"""Which setting is chosen, with scripted p-values, losses and costs. Their promises: test_risk_validity.py."""

import json
import math
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.risk import Promised, conformal_risk_control, fixed_sequence, pareto_front, search


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


# ---------------------------------------------------------------- several


@dataclass(frozen=True)
class Scripted(Promised):
    """A promise whose losses are p-values already."""

    failure: float
    tolerance: float = 0.5
    bound: str = "scripted"

    def bound_at(self, level):
        return lambda losses, tolerance: float(losses[0])


def searched(chains, costs, failure, **options):
    """The outcome, and the p-values and costs that were asked for, of settings numbered chain by chain."""
    p_values, priced = [p for chain in chains for p in chain], [c for chain in costs for c in chain]
    numbers, asked, looked = iter(range(len(p_values))), [], []
    sequences = [[next(numbers) for _ in chain] for chain in chains]

    def losses(setting):
        asked.append(setting)
        return np.array([p_values[setting]])

    def cost(setting):
        looked.append(setting)
        return priced[setting]

    return search(sequences, losses, cost, Scripted(failure), **options), asked, looked


def test_each_chain_gets_its_share_and_the_cheapest_wins():
    outcome, asked, looked = searched(
        [[0.01, 0.02, 0.03], [0.03, 0.0], [0.001, 0.025, 0.2]],
        [[9, 8, 1], [1, 1], [9, 7, 1]],  # those of failed ones are lowest, and not looked at
        0.06,
    )
    assert outcome.level == pytest.approx(0.02)
    assert asked == [0, 1, 2, 3, 5, 6]
    assert looked == [0, 1, 5]
    assert outcome.selected == 1
    assert [(test.setting, test.chain, test.passed) for test in outcome.tests] == [
        (0, 0, True), (1, 0, True), (2, 0, False), (3, 1, False), (5, 2, True), (6, 2, False)
    ]  # fmt: skip


def test_an_earlier_setting_of_a_chain_may_be_the_cheapest():
    assert searched([[0.0, 0.0]], [[3, 4]], 0.1)[0].selected == 0
    assert searched([[0.0, 0.0]], [[3, 4]], 0.1, below=3)[0].selected is None


def test_equal_costs_go_to_the_earlier_chain_and_the_safer_setting():
    assert searched([[0.9], [0.0, 0.0], [0.0]], [[1], [1, 1], [1]], 0.1)[0].selected == 1


def test_chains_without_a_certificate():
    outcome, _, looked = searched([[0.06], [0.2]], [[1], [1]], 0.1)
    assert outcome.selected is None
    assert looked == []
    assert [test.p_value for test in outcome.tests] == [0.06, 0.2]


def test_a_search_refuses():
    with pytest.raises(ValueError, match="at least one is needed"):
        searched([], [], 0.1)
    with pytest.raises(ValueError, match="the cost of setting 1 is nan"):
        searched([[0.0], [0.0]], [[0], [math.nan]], 0.1)
    with pytest.raises(ValueError, match="no failure probability to divide"):
        search([[0], [1]], lambda s: np.zeros(9), lambda s: 0, Scripted(0.1, bound="crc"))


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


# ---------------------------------------------------------------- on average


def test_conformal_risk_control_by_hand():
    # n = 9: allowed while (sum + 1) / 10 <= 0.25, that is sum <= 1.5
    losses = np.zeros((4, 9))
    losses[1, 0] = 0.5
    losses[2, 1] = 1.0  # the first prompt's 0.5 stays: 1.5
    losses[3, 2] = 0.1
    result = conformal_risk_control(losses, 0.25)
    assert result.p_values == pytest.approx([0.1, 0.15, 0.25, 0.26])
    assert result.index == 2
    assert result.passed == (0, 1, 2)


def test_a_loss_that_falls_again_does_not_help():
    losses = [[0.0] * 9, [1.0] * 9, [0.0] * 9]
    assert conformal_risk_control(torch.tensor(losses), 0.2).index == 0
    assert conformal_risk_control(losses, 0.2).p_values == pytest.approx([0.1, 1.0])  # and no further one


def test_too_few_prompts_allow_nothing_and_too_many_tolerances_all():
    assert conformal_risk_control(np.zeros((3, 8)), 0.1).index is None  # 1 / 9 > 0.1
    assert conformal_risk_control(np.zeros((3, 9)), 0.1).index == 2  # 1 / 10
    assert conformal_risk_control(np.zeros((3, 8)), 0.1).passed == ()


def test_conformal_risk_control_refuses():
    for losses, message in [
        ([[0.0, 1.2]], r"losses of setting 0\[1\] is 1.2"),
        ([[0.0] * 20, [0.0, math.nan]], r"losses of setting 1\[1\] is nan"),
        ([[-0.5]], r"losses of setting 0\[0\] is -0.5"),
        ([0.0, 0.1], r"losses of setting 0 has shape \[\]; it must have 1 dimension"),
        (np.zeros((5, 0)), "losses of setting 0 is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            conformal_risk_control(losses, 0.1)
    with pytest.raises(ValueError, match="tolerance is 0"):
        conformal_risk_control([[0.0]], 0)


def test_results_are_json():
    for result in (
        fixed_sequence([0.0, 1.0], 0.1),
        conformal_risk_control(np.zeros((3, 9)), 0.1),
        searched([[0.0], [1.0]], [[np.float64(3)], [1]], 0.1)[0],
    ):
        read = json.loads(json.dumps(asdict(result), allow_nan=False))
        assert read.keys() == asdict(result).keys()

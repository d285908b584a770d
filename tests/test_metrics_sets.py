"""Metrics of sets against plain loops and scipy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from offramp.metrics import sets as metrics
from offramp.metrics.intervals import binomial
from offramp.uncertainty.sets import ClassSets, Intervals


@given(st.integers(0, 100_000), st.floats(0.2, 0.9))
@settings(max_examples=30, deadline=None)
def test_classes_against_a_loop(seed, density):
    random = torch.Generator().manual_seed(seed)
    members = torch.rand(3, 9, 4, generator=random) < density
    labels = torch.randint(4, (9,), generator=random)
    got = metrics.summarise(ClassSets(members), labels)
    sets = [[{c for c in range(4) if members[e, n, c]} for n in range(9)] for e in range(3)]
    shared = [[set.intersection(*(sets[i][n] for i in range(e + 1))) for n in range(9)] for e in range(3)]
    for e, exit in enumerate(got.exits):
        sizes = [len(s) for s in sets[e]]
        assert exit.size == pytest.approx(sum(sizes) / 9)
        some = [size for size in sizes if size]
        assert exit.size_not_empty == pytest.approx(sum(some) / len(some) if some else math.nan, nan_ok=True)
        assert exit.coverage.value == pytest.approx(sum(int(labels[n]) in sets[e][n] for n in range(9)) / 9)
        together = [all(int(labels[n]) in sets[i][n] for i in range(e + 1)) for n in range(9)]
        assert exit.simultaneous.value == pytest.approx(sum(together) / 9)
        ratios = [len(s) / len(c) if c else 1.0 for s, c in zip(shared[e], sets[e], strict=True)]
        assert exit.nestedness == pytest.approx(sum(ratios) / 9)
        assert exit.empty.value == pytest.approx(sizes.count(0) / 9)
        assert exit.small == pytest.approx(sum(len(s) == 1 for s in shared[e]) / 9)
        assert exit.unbounded == 0
    times = [next((e + 1 for e in range(3) if len(shared[e][n]) == 1), None) for n in range(9)]
    reached = [time for time in times if time]
    assert got.reached.value == pytest.approx(len(reached) / 9)
    assert got.time_to_small == pytest.approx(sum(reached) / len(reached) if reached else math.nan, nan_ok=True)


@given(st.integers(0, 100_000))
@settings(max_examples=25, deadline=None)
def test_running_intersections_have_nestedness_one_and_one_coverage(seed):
    random = torch.Generator().manual_seed(seed)
    low, length = torch.randn(2, 4, 20, generator=random, dtype=torch.float64)
    for sets, truth in (
        (ClassSets(torch.rand(4, 20, 3, generator=random) < 0.6), torch.zeros(20, dtype=torch.int64)),
        (Intervals.between(low, low + length + 1), torch.zeros(20).double()),
    ):
        plain, nested = metrics.summarise(sets, truth), metrics.summarise(sets.running(), truth)
        for before, after in zip(plain.exits, nested.exits, strict=True):
            assert after.nestedness == 1
            assert after.coverage == after.simultaneous == before.simultaneous
            assert after.size <= before.size
            assert before.nestedness <= 1


def test_intervals_by_hand():
    low = torch.tensor([[0.0, 0.0, 2.0, -math.inf], [1.0, 3.0, 2.0, 0.0]]).double()
    high = torch.tensor([[2.0, 1.0, 1.0, math.inf], [3.0, 4.0, 2.0, 1.0]]).double()
    got = metrics.summarise(Intervals.between(low, high), torch.tensor([1.5, 0.5, 2.0, 5.0]), limit=1.0)
    first, second = got.exits
    assert first.size == math.inf
    assert first.unbounded == 0.25
    assert first.empty.value == 0.25
    assert first.coverage.value == 0.75
    assert first.nestedness == 1
    # [1, 2] of [1, 3]; nothing of [3, 4]; nothing of {2}, since the third was empty; all of [0, 1]
    assert second.nestedness == pytest.approx((0.5 + 0 + 0 + 1) / 4)
    assert second.size == pytest.approx((2 + 1 + 0 + 1) / 4)
    assert second.coverage.value == 0.5
    assert second.simultaneous.value == 0.25
    assert (got.time_to_small, got.reached.value) == (pytest.approx((2 + 1 + 2) / 3), 0.75)


def test_nestedness_of_what_has_no_length():
    inf = math.inf
    size, shared = torch.tensor([[0.0, 0.0, inf, inf, 2.0]]), torch.tensor([[0.0, 0.0, inf, 1.0, 0.0]])
    empty, none = torch.tensor([[True, False, False, False, False]]), torch.tensor([[True, False, False, False, False]])
    assert metrics.nestedness(size, shared, empty, none).tolist() == [[1, 1, 1, 0, 0]]
    none[0, 1] = none[0, 4] = True
    assert metrics.nestedness(size, shared, empty, none).tolist() == [[1, 0, 1, 0, 0]]


@pytest.mark.parametrize(("count", "trials"), [(0, 10), (10, 10), (3, 10), (47, 50)])
def test_ends_of_intervals(count, trials):
    exact = binomial(count, trials)
    if count:  # the end is where what was seen or more has probability 2.5 %
        assert stats.binom.sf(count - 1, trials, exact.low) == pytest.approx(0.025, abs=1e-6)
    if count < trials:
        assert stats.binom.cdf(count, trials, exact.high) == pytest.approx(0.025, abs=1e-6)
    wilson, z, p = binomial(count, trials, level=0.9, method="wilson"), stats.norm.isf(0.05), count / trials
    for end in (wilson.low, wilson.high):
        assert abs(p - end) == pytest.approx(z * math.sqrt(end * (1 - end) / trials), abs=1e-6)


def test_wrong_input():
    with pytest.raises(ValueError, match="one each is needed"):
        metrics.summarise(ClassSets(torch.ones(2, 3, 4, dtype=torch.bool)), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="one each is needed"):
        metrics.summarise(ClassSets(torch.ones(2, 0, 4, dtype=torch.bool)), torch.zeros(0, dtype=torch.int64))

"""The cache of one layer against concatenation, and against the sliding layer of transformers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from offramp.families.state import LayerCache, as_rows

SETTINGS = settings(derandomize=True, deadline=None, max_examples=60, database=None)
BATCH, HEADS, WIDTH = 3, 2, 2
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([0, 1, 2], slice(0, 3)), ([2], slice(2, 3)), ([1, 2], slice(1, 3)), ([0, 2], [0, 2]), ([0, 1, 3], [0, 1, 3])],
)
def test_rows_that_lie_together_are_a_slice(rows, expected):
    got = as_rows(rows, CPU)
    assert torch.arange(5)[got].tolist() == rows
    if isinstance(expected, slice):
        assert got == expected
    else:
        assert isinstance(got, torch.Tensor)
        assert got.dtype == torch.long
        assert got.tolist() == expected


def test_no_rows_select_nothing():
    assert torch.arange(5)[as_rows([], CPU)].tolist() == []


class Numbers:
    """States that are all different, so that a mix-up shows."""

    def __init__(self):
        self.last = 0

    def states(self, rows, slots):
        count = rows * HEADS * slots * WIDTH
        keys = torch.arange(self.last + 1, self.last + 1 + count, dtype=torch.float32)
        self.last += count
        keys = keys.view(rows, HEADS, slots, WIDTH)
        return keys, -keys


class Concatenated:
    """The reference: one tensor per row that grows by `torch.cat`; NaN where a row was never written."""

    def __init__(self):
        self.keys = [torch.empty(HEADS, 0, WIDTH) for _ in range(BATCH)]

    def put(self, row, slot, keys):
        """Keys [H, n, D] of one row from `slot` on."""
        old = self.keys[row]
        gap = torch.full((HEADS, max(0, slot - old.shape[1]), WIDTH), math.nan)
        self.keys[row] = torch.cat([old[:, :slot], gap, keys, old[:, slot + keys.shape[1] :]], dim=1)

    def get(self, rows, first, stop):
        padded = [torch.nn.functional.pad(self.keys[r], (0, 0, 0, 400), value=math.nan) for r in rows]
        return torch.stack([keys[:, first:stop] for keys in padded])


def assert_same(got, expected):
    """Equal wherever the reference was ever written."""
    assert got.shape == expected.shape
    known = ~expected.isnan()
    assert torch.equal(got[known], expected[known])


some_rows = st.lists(st.integers(0, BATCH - 1), min_size=1, max_size=BATCH, unique=True).map(sorted)
places = st.tuples(st.integers(0, BATCH - 1), st.integers(0, 200))
operations = st.one_of(
    st.tuples(st.just("update"), some_rows, st.integers(1, 40)),
    st.tuples(st.just("crop"), st.integers(0, 30)),
    st.tuples(st.just("write"), st.lists(places, min_size=1, max_size=6, unique=True)),
)


@SETTINGS
@given(steps=st.lists(operations, min_size=1, max_size=14), window=st.none() | st.integers(1, 70))
def test_any_sequence_of_operations_equals_concatenation(steps, window):
    cache, reference, numbers, length = LayerCache(BATCH, window), Concatenated(), Numbers(), 0
    written = False
    for step in steps:
        if step[0] == "crop":
            length = cache.length = max(0, length - step[1])
        elif step[0] == "update":
            _, rows, n = step
            cache.rows = as_rows(rows, CPU)
            keys, values = numbers.states(len(rows), n)
            first = 0 if window is None else max(0, length - window + 1)
            seen_keys, seen_values = cache.update(keys, values)
            for row, k in zip(rows, keys, strict=True):
                reference.put(row, length, k)
            length += n
            written = True
            assert_same(seen_keys, reference.get(rows, first, length))
            assert_same(seen_values, -reference.get(rows, first, length))
        else:
            rows, slots = (torch.tensor(x) for x in zip(*step[1], strict=True))
            keys, values = numbers.states(len(rows), 1)
            cache.write(rows, slots, keys[:, :, 0], values[:, :, 0], stop=int(slots.max()) + 1)
            for (row, slot), k in zip(step[1], keys, strict=True):
                reference.put(row, slot, k)
            written = True
        assert cache.length == cache.get_seq_length() == length
        if written:
            cache.rows = slice(0, BATCH)
            assert_same(cache.keys, reference.get(range(BATCH), 0, length))
            assert_same(cache.values, -reference.get(range(BATCH), 0, length))


def test_appending_equals_the_layer_of_transformers():
    ours, theirs, numbers = LayerCache(BATCH), DynamicLayer(), Numbers()
    for n in (5, 1, 1, 60, 1, 130, 1):
        keys, values = numbers.states(BATCH, n)
        assert ours.get_mask_sizes(n) == tuple(theirs.get_mask_sizes(n))
        for got, expected in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(got, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("window", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("queries", [1, 2, 5])
def test_mask_sizes_of_a_window_are_those_of_transformers(window, queries):
    ours, theirs = LayerCache(1, window), DynamicSlidingWindowLayer(window)
    for length in range(3 * window + 5):
        ours.length = theirs.cumulative_length = length
        assert ours.get_mask_sizes(queries) == tuple(theirs.get_mask_sizes(queries)), length


@pytest.mark.parametrize("window", [2, 3, 8])
@pytest.mark.parametrize("chunks", [[1] * 20, [5, 1, 1, 1, 1, 3, 1], [20, 1, 1], [2, 7, 9, 1]])
def test_a_window_hands_out_what_transformers_does(window, chunks):
    ours, theirs, numbers = LayerCache(BATCH, window), DynamicSlidingWindowLayer(window), Numbers()
    for n in chunks:
        keys, values = numbers.states(BATCH, n)
        count, _ = ours.get_mask_sizes(n)
        got, expected = ours.update(keys, values), theirs.update(keys, values)
        assert got[0].shape[2] == count
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_more_than_a_window_can_be_taken_back():
    cache, numbers = LayerCache(BATCH, window=4), Numbers()
    keys, values = numbers.states(BATCH, 20)
    cache.update(keys, values)
    cache.length = 6
    more, more_values = numbers.states(BATCH, 1)
    seen, _ = cache.update(more, more_values)
    assert torch.equal(seen, torch.cat([keys[:, :, 3:6], more], dim=2))


@pytest.mark.parametrize("rows", [[0], [2], [0, 2], [1, 2]])
def test_an_update_of_some_rows_leaves_the_others(rows):
    cache, numbers = LayerCache(BATCH), Numbers()
    keys, values = numbers.states(BATCH, 6)
    cache.update(keys, values)
    cache.length = 2
    cache.rows = as_rows(rows, CPU)
    new, new_values = numbers.states(len(rows), 3)
    seen, seen_values = cache.update(new, new_values)
    assert torch.equal(seen, torch.cat([keys[rows][:, :, :2], new], dim=2))
    assert torch.equal(seen_values, torch.cat([values[rows][:, :, :2], new_values], dim=2))
    assert torch.equal(cache.keys, seen)
    cache.rows, cache.length = slice(0, BATCH), 6
    others = [r for r in range(BATCH) if r not in rows]
    assert torch.equal(cache.keys[others], keys[others])
    assert torch.equal(cache.values[others], values[others])
    assert torch.equal(cache.keys[rows][:, :, 5], keys[rows][:, :, 5])


def test_writing_does_not_move_the_end():
    cache, numbers = LayerCache(BATCH), Numbers()
    keys, values = numbers.states(BATCH, 4)
    cache.update(keys, values)
    new, new_values = numbers.states(2, 1)
    cache.write(torch.tensor([0, 2]), torch.tensor([1, 3]), new[:, :, 0], new_values[:, :, 0], stop=4)
    expected = keys.clone()
    expected[0, :, 1], expected[2, :, 3] = new[0, :, 0], new[1, :, 0]
    assert cache.length == 4
    assert torch.equal(cache.keys, expected)


@pytest.mark.parametrize("step", [1, 7, 64, 65])
def test_growth_keeps_the_contents_and_the_type(step):
    cache, numbers, parts = LayerCache(BATCH), Numbers(), []
    while cache.length < 300:
        keys, _ = numbers.states(BATCH, step)
        keys = keys.remainder(251).bfloat16()
        parts.append(keys)
        cache.update(keys, keys + 1)
    assert cache.keys.dtype == torch.bfloat16
    assert torch.equal(cache.keys, torch.cat(parts, dim=2))
    assert torch.equal(cache.values, torch.cat(parts, dim=2) + 1)


def test_a_write_far_behind_the_end_keeps_the_contents():
    cache, numbers = LayerCache(BATCH), Numbers()
    keys, values = numbers.states(BATCH, 10)
    cache.update(keys, values)
    new, new_values = numbers.states(1, 1)
    cache.write(torch.tensor([1]), torch.tensor([999]), new[:, :, 0], new_values[:, :, 0], stop=1000)
    assert torch.equal(cache.keys, keys)
    cache.length = 1000
    assert torch.equal(cache.keys[1, :, 999], new[0, :, 0])

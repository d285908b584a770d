"""Corruptions do what their formulas say, grow with severity, and depend on nothing but seed and row."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.tasks.images import CORRUPTIONS, SEVERITIES, corrupt, corrupted
from offramp.tasks.labelled import Labelled

RANDOM = np.random.default_rng(0)
SMOOTH = np.clip(RANDOM.normal(128, 30, (12, 32, 32, 3)), 0, 255).astype(np.uint8)
IDS = tuple(f"row {i}" for i in range(12))


def distance(one, other):
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_severity_grows_and_nothing_changes_the_input(kind):
    before = SMOOTH.copy()
    found = [distance(corrupt(SMOOTH, IDS, kind, severity), SMOOTH) for severity in (0, *SEVERITIES)]
    assert found[0] == 0
    assert found == sorted(set(found))
    assert np.array_equal(SMOOTH, before)


@given(st.sampled_from(list(CORRUPTIONS)), st.sampled_from(SEVERITIES), st.permutations(range(12)), st.integers(1, 11))
def test_neither_batch_nor_order_matter(kind, severity, order, cut):
    whole = corrupt(SMOOTH, IDS, kind, severity, seed=3)
    parts = [
        corrupt(SMOOTH[rows], [IDS[i] for i in rows], kind, severity, seed=3) for rows in (order[:cut], order[cut:])
    ]
    assert np.array_equal(np.concatenate(parts), whole[list(order)])


def test_noise_is_gaussian_of_the_stated_width_and_seeded_by_row():
    grey = np.full((6, 64, 64, 1), 128, np.uint8)
    for severity in SEVERITIES[:3]:
        found = corrupt(grey, IDS[:6], "noise", severity).astype(float) / 255
        assert found.std() == pytest.approx(0.04 * severity, rel=0.03)
        assert found.mean() == pytest.approx(128 / 255, abs=0.002)
    first, again, other = (corrupt(grey, IDS[:6], "noise", 2, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


def test_blur_is_a_gaussian_in_proportion_to_the_image():
    for side in (32, 64):
        point = np.zeros((1, side, side, 1), np.uint8)
        point[0, side // 2, side // 2] = 255
        line = corrupt(point, IDS[:1], "blur", 5)[0, :, :, 0].sum(0).astype(float)
        places = np.arange(side) - side // 2
        sigma = np.sqrt((line * places**2).sum() / line.sum())
        assert sigma == pytest.approx(1.2 * side / 32, rel=0.1)


def test_contrast_keeps_the_mean_of_each_channel():
    found = corrupt(SMOOTH, IDS, "contrast", 4).astype(float)
    assert np.abs(found.mean((1, 2)) - SMOOTH.mean((1, 2))).max() < 0.6  # rounding
    expected = SMOOTH.mean((1, 2), keepdims=True) + 0.3 * (SMOOTH - SMOOTH.mean((1, 2), keepdims=True))
    assert np.abs(found - expected).max() <= 0.51


def test_rows_keep_their_names():
    data = Labelled(IDS, SMOOTH, torch.arange(12) % 2, ("a", "b"))
    changed = corrupted(data, "blur", 3)
    assert changed.ids == data.ids
    assert torch.equal(changed.labels, data.labels)
    assert np.array_equal(changed.take([4]).inputs, corrupt(SMOOTH[4:5], IDS[4:5], "blur", 3))
    with pytest.raises(ValueError, match="corruption is 'fog'; allowed are 'noise', 'blur', 'contrast'"):
        corrupted(data, "fog", 3)
    with pytest.raises(ValueError, match="severity is 6"):
        corrupted(data, "blur", 6)
    with pytest.raises(ValueError, match="corruptions are for images"):
        corrupted(Labelled(("a", "b"), ("x", "y"), torch.tensor([0, 1]), ("n", "p")), "blur", 1)

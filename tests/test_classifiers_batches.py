"""Images normalised and augmented, texts tokenised, cut and padded, batches in an order of their own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from classifier_runs import images, rows
from offramp.classifiers.batches import (
    IMAGENET,
    Augmentation,
    ImagePreprocessing,
    ImageRows,
    TextRows,
    by_length,
    in_order,
    order,
)
from offramp.tasks.labelled import Labelled
from tiny import tokenizer


def coloured(count=40):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
    return Labelled(tuple(map(str, range(count))), pixels, torch.arange(count) % 2, ("a", "b"))


def test_normalised_training_images_have_mean_0_and_deviation_1():
    data = coloured(1100)  # more than are looked at together
    made = ImagePreprocessing.of(data)(data.inputs)
    assert made.shape == (1100, 3, 6, 5)
    torch.testing.assert_close(made.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-5, rtol=0)
    assert made[7, 2, 3, 4] == pytest.approx((data.inputs[7, 3, 4, 2] / 255 - data.inputs[..., 2].mean() / 255)
                                             / (data.inputs[..., 2] / 255).std(), rel=1e-4)  # fmt: skip


def test_grey_images_for_a_network_of_three_channels():
    made = IMAGENET(images(2).inputs)
    assert made.shape == (2, 3, 8, 8)
    value = images(2).inputs[1, 2, 3, 0] / 255
    assert made[1, :, 2, 3].tolist() == pytest.approx(
        [(value - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    )
    assert ImagePreprocessing.from_settings(IMAGENET.settings) == IMAGENET
    with pytest.raises(ValueError, match="images have 3 channels; this preprocessing is for 1"):
        ImagePreprocessing((0.5,), (0.2,))(coloured(2).inputs)
    blank = Labelled(("a", "b"), np.full((2, 3, 3, 1), 7, np.uint8), torch.tensor([0, 1]), ("n", "p"))
    with pytest.raises(ValueError, match="one value everywhere"):
        ImagePreprocessing.of(blank)


@given(st.integers(0, 3), st.booleans(), st.integers(0, 9))
def test_augmented_images_are_shifted_and_mirrored_ones(pad, flip, seed):
    data = coloured(6).inputs
    found = Augmentation(pad, flip)(data, torch.Generator().manual_seed(seed))
    again = Augmentation(pad, flip)(data, torch.Generator().manual_seed(seed))
    assert np.array_equal(found, again)
    for image, changed in zip(data, found, strict=True):
        possible = []
        for dy in range(-pad, pad + 1):
            for dx in range(-pad, pad + 1):
                moved = np.zeros_like(image)
                for y in range(6):
                    for x in range(5):
                        if 0 <= y + dy < 6 and 0 <= x + dx < 5:
                            moved[y, x] = image[y + dy, x + dx]
                possible += [moved, moved[:, ::-1]] if flip else [moved]
        assert any(np.array_equal(changed, other) for other in possible)


def test_only_training_augments():
    prepared = rows(30)
    plain = prepared.inputs(torch.arange(30))
    assert torch.equal(plain, prepared.preprocessing(prepared.data.inputs))
    assert not torch.equal(prepared.inputs(torch.arange(30), torch.Generator().manual_seed(0)), plain)
    parts = list(in_order(prepared, 8))
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]), plain)
    assert torch.equal(torch.cat([labels for _, labels in parts]), prepared.data.labels)


# ---------------------------------------------------------------- texts


def texts(lengths, pairs=False):
    words = [" ".join(["sky"] * length) for length in lengths]
    inputs = tuple((word, "is blue") for word in words) if pairs else tuple(words)
    ids = tuple(map(str, range(len(lengths))))
    return Labelled(ids, inputs, torch.arange(len(lengths)) % 2, ("a", "b"))


def test_texts_are_padded_to_the_longest_of_their_batch():
    prepared = TextRows(texts([3, 1, 7, 2]), tokenizer())
    found = prepared.inputs(torch.tensor([1, 3]))
    sky, pad = tokenizer()("sky")["input_ids"][0], tokenizer().pad_token_id
    assert found["input_ids"].tolist() == [[sky, pad], [sky, sky]]
    assert found["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert prepared.lengths.tolist() == [3, 1, 7, 2]
    assert prepared.truncated == 0


def test_what_is_too_long_is_cut_and_counted():
    prepared = TextRows(texts([3, 1, 9, 2], pairs=True), tokenizer(), longest=5)
    assert prepared.truncated == 1
    assert prepared.lengths.tolist() == [5, 3, 5, 4]
    sky, is_, blue = tokenizer()("sky is blue")["input_ids"]
    assert prepared.inputs(torch.tensor([2]))["input_ids"].tolist() == [[sky, sky, sky, is_, blue]]
    assert prepared.settings["truncated"] == 1
    whole = TextRows(texts([3, 1, 9, 2], pairs=True), tokenizer())
    assert whole.truncated == 0


def test_rows_for_something_else_are_refused():
    with pytest.raises(ValueError, match="holds images where texts are needed"):
        TextRows(images(3), tokenizer())
    with pytest.raises(ValueError, match="holds texts where images are needed"):
        ImageRows(texts([1, 2]), IMAGENET).inputs(torch.tensor([0]))
    without = tokenizer()
    without.pad_token = None
    with pytest.raises(ValueError, match="has no padding token"):
        TextRows(texts([1, 2]), without)
    with pytest.raises(ValueError, match="longest is 0"):
        TextRows(texts([1, 2]), tokenizer(), longest=0)


# ---------------------------------------------------------------- order


@given(st.integers(2, 60), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_an_epoch_holds_every_row_once_and_no_single_row(count, size, seed, epoch, drawn):
    prepared = rows(count)
    batches = order(prepared, size, seed, epoch, torch.ones(count) if drawn else None)
    places = torch.cat(batches).tolist()
    assert len(places) == count
    assert drawn or sorted(places) == list(range(count))
    assert max(map(len, batches)) <= size + 1
    assert size == 1 or min(map(len, batches)) > 1
    assert all(map(torch.equal, batches, order(prepared, size, seed, epoch, torch.ones(count) if drawn else None)))


def test_texts_of_like_length_go_together():
    lengths = np.random.default_rng(0).integers(1, 40, 512).tolist()
    prepared = TextRows(texts(lengths), tokenizer())
    padded = sum(len(places) * int(prepared.lengths[places].max()) for places in order(prepared, 8, 0, 0))
    assert padded < 1.1 * sum(lengths)


def test_passes_over_all_rows_by_length_come_back_in_order():
    lengths = np.random.default_rng(0).integers(1, 40, 500).tolist()
    prepared = TextRows(texts(lengths), tokenizer())
    batches = by_length(prepared, 8)
    assert sum(len(places) * int(prepared.lengths[places].max()) for places in batches) < 1.1 * sum(lengths)
    tokens = torch.cat([prepared.inputs(places)["attention_mask"].sum(1) for places in batches])
    assert tokens[torch.cat(batches).argsort()].tolist() == lengths

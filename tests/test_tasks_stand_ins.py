"""Generated sets: seeded, with the correlations asked for, labelled rightly, and as difficult as they should be."""

import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from group_training import cnn, tensor_of, trained
from offramp.metrics.groups import Groups
from offramp.tasks.group_sets import Grouped, GroupedSet
from offramp.tasks.group_texts import has_negation
from offramp.tasks.labelled import Labelled
from offramp.tasks.stand_in_texts import (
    ADDITIONS,
    INDIRECT,
    INSULTS,
    NOUNS,
    PRAISE,
    TARGETED,
    VERBS,
    WORDS,
    template_nli,
    template_toxicity,
)
from offramp.tasks.stand_ins import BLUE, GREEN, PLACES, coloured_mnist, digits_on_colour, mnist_on_colour, spuco_mnist

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from difficulty import check_difficulty  # noqa: E402 - no package: it is found by the line above


def digit_images(count=600, seed=0):
    """Images like MNIST's: a bright square in the middle on 0, digits in turn."""
    draw = np.random.default_rng(seed)
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 10:18, 10:18] = draw.integers(1, 256, (count, 8, 8))
    return images, np.arange(count) % 10


small = {"train": 400, "val": 80, "test": 120}
digits = pytest.importorskip("sklearn.datasets").load_digits
SETS = {
    "digits-on-colour": digits_on_colour,
    "mnist-on-colour": lambda seed: mnist_on_colour(*digit_images(), agreement=0.9, seed=seed, **small),
    "spuco-mnist": lambda seed: spuco_mnist(*digit_images(), agreement=0.7, seed=seed, **small),
    "coloured-mnist": lambda seed: coloured_mnist(
        *digit_images(3000), agreement=0.7, seed=seed, train=400, val=1000, test=1000
    ),
    "template-nli": lambda seed: template_nli(seed=seed, train=900, val=300, test=300),
    "template-toxicity": lambda seed: template_toxicity(seed=seed, agreement=0.9, train=1200, val=600, test=600),
}


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_seeded_and_whole(name):
    make = SETS[name]
    first, again, other = make(seed=0), make(seed=0), make(seed=1)
    assert first.name == name
    assert (first.digests, first.counts(), first.source) == (again.digests, again.counts(), again.source)
    assert first.digests != other.digests
    first.require_groups("train", "val", "test")
    assert set(first.splits) == {"train", "val", "test"}
    assert "seed 0" in first.source
    for split in first.splits.values():
        assert len(split.rows.inputs) == len(split)


# ---------------------------------------------------------------- digits on colour


def test_digits_agree_with_their_background_as_asked():
    data = digits_on_colour(agreement=0.95, seed=2)
    counts = torch.tensor(list(data.counts()["train"].values())).reshape(2, 2)
    assert counts.sum() == 1000
    for label in (0, 1):
        assert counts[label, label] == round(0.95 * int(counts[label].sum()))
    assert min(data.counts()["test"].values()) >= 200


def test_validation_and_test_digits_are_on_both_backgrounds():
    data = digits_on_colour(seed=0)
    images, true = digits(return_X_y=True)
    for split, count in ((data.val, 300), (data.test, 497)):
        pixels = tensor_of(split.rows)
        background, pairs = split.attributes["background"], split.pairs
        assert len(split) == 2 * count
        assert (background[::2] == 0).all()
        assert (background[1::2] == 1).all()
        assert (pairs[::2] == pairs[1::2]).all()
        assert len(pairs.unique()) == count
        assert (split.rows.labels == torch.from_numpy(true[pairs] >= 5)).all()
        dark = torch.from_numpy(images[pairs].reshape(-1, 1, 8, 8)) == 0  # where the background shows
        for value, colour in enumerate((GREEN, BLUE)):
            there = pixels[background == value]
            shade = (there * dark[background == value]).sum((0, 2, 3)) / dark[background == value].sum((0, 2, 3))
            torch.testing.assert_close(shade, torch.tensor(colour), atol=0.02, rtol=0)
        bright = torch.from_numpy(images[pairs].reshape(-1, 8, 8)) == 16
        assert pixels.mean(1)[bright].mean() > 0.93
    used = [set(map(int, (id.split("-")[0] for id in split.rows.ids))) for split in data.splits.values()]
    assert not used[0] & used[1]
    assert not used[0] & used[2]
    assert not used[1] & used[2]


def test_mnist_is_averaged_over_squares():
    images, numbers = digit_images()
    data = mnist_on_colour(images, numbers, agreement=0.9, high=(1, 3), **small)
    assert data.train.rows.inputs.shape == (400, 14, 14, 3)
    assert (data.test.rows.labels == torch.from_numpy(np.isin(numbers[data.test.pairs], (1, 3)))).all()
    bright = images[data.test.pairs, 12:16, 12:16].mean((1, 2)) / 255  # the middle of the square
    seen = data.test.rows.inputs[:, 6:8, 6:8].mean((1, 2, 3)) / 255
    assert np.corrcoef(bright, seen)[0, 1] > 0.9


def test_sets_that_cannot_be_made():
    images, numbers = digit_images(100)
    with pytest.raises(ValueError, match="400 \\+ 80 \\+ 120 images are asked for, but there are 100"):
        mnist_on_colour(images, numbers, **small)
    with pytest.raises(ValueError, match="agreement is 1; it must be in"):
        digits_on_colour(agreement=1)
    with pytest.raises(ValueError, match="group 'low, blue' has no row in split 'train of mnist-on-colour'"):
        mnist_on_colour(images, numbers, agreement=0.99, train=20, val=20, test=20)
    with pytest.raises(ValueError, match="difficulty is 'hard'; allowed are 'magnitude-easy'"):
        spuco_mnist(images, numbers, difficulty="hard")
    with pytest.raises(ValueError, match="the grammar has 48000"):
        template_nli(train=50_000)


# ---------------------------------------------------------------- SpuCo and coloured digits


@pytest.mark.parametrize("difficulty", PLACES)
def test_spuco_background_shows_where_it_should(difficulty):
    images, numbers = digit_images()
    data = spuco_mnist(images, numbers, difficulty=difficulty, agreement=0.7, **small)
    rows = data.train.rows
    at = np.array(list(map(int, rows.ids)))
    pixels, shown = np.asarray(rows.inputs), images[at] > 0
    assert (pixels[shown] == images[at][shown][:, None]).all()  # the digit is untouched
    coloured = (pixels.max(-1) > 0) & ~shown
    side, count = PLACES[difficulty] or (28, 784)
    assert not coloured[:, side:].any()
    assert not coloured[:, :, side:].any()
    covered = 64 if difficulty in ("magnitude-easy", "variance-hard", "variance-medium") else 0
    assert coloured.sum((1, 2)).max() <= count
    assert coloured.sum((1, 2)).min() >= count - covered
    moves = (coloured != coloured[0]).any()
    assert moves == (difficulty in ("variance-medium", "variance-hard"))  # drawn for each image
    assert (rows.labels.numpy() == numbers[at] // 2).all()


def test_spuco_conflicts_are_spread_evenly_and_tests_balanced():
    data = spuco_mnist(*digit_images(1000), agreement=0.8, train=700, val=100, test=200)
    counts = torch.tensor(list(data.counts()["train"].values())).reshape(5, 5)
    for label in range(5):
        row = counts[label]
        assert row[label] == round(0.8 * int(row.sum()))
        others = row[torch.arange(5) != label]
        assert others.max() - others.min() <= 1
    test = torch.tensor(list(data.counts()["test"].values())).reshape(5, 5)
    assert (test.max(1).values - test.min(1).values).max() <= 2
    assert len({tuple(image[0, 0]) for image in data.train.rows.inputs}) == 5  # five colours


def test_spuco_noise():
    clean = spuco_mnist(*digit_images(), agreement=0.7, **small)
    noisy = spuco_mnist(*digit_images(), agreement=0.7, label_noise=0.1, core_noise=0.25, **small)
    changed = clean.train.rows.labels != noisy.train.rows.labels
    assert int(changed.sum()) == 40
    assert (clean.train.groups.members == noisy.train.groups.members).all()  # of the true label
    different = (np.asarray(clean.train.rows.inputs) != np.asarray(noisy.train.rows.inputs)).any((1, 2, 3))
    assert different.sum() == 100
    assert (clean.test.rows.labels == noisy.test.rows.labels).all()


def test_coloured_digits_have_the_colour_said():
    data = coloured_mnist(*digit_images(), agreement=0.7, jitter=0.02, **small)
    pixels, colour = np.asarray(data.train.rows.inputs) / 255, data.train.attributes["colour"].numpy()
    shade = pixels.reshape(len(pixels), -1, 3).sum(1)
    shade /= shade.max(1, keepdims=True)
    means = np.stack([shade[colour == c].mean(0) for c in range(10)])
    assert (np.linalg.norm(shade[:, None] - means, axis=2).argmin(1) == colour).mean() > 0.98
    conflict = data.train.attributes["conflict"]
    assert (conflict.bool() == (data.train.attributes["colour"] != data.train.rows.labels)).all()
    for digit in range(10):
        of_digit = conflict[data.train.rows.labels == digit]
        assert int((of_digit == 0).sum()) == round(0.7 * len(of_digit))
    assert data.test.groups.names[1] == "0, other colour"


# ---------------------------------------------------------------- text


def _true_label(premise, hypothesis):
    """What follows, worked out from the sentences alone; one reading of the grammar, written apart from it."""
    wider = dict(NOUNS)
    past_of = {infinitive: past for past, infinitive, _ in VERBS}
    opposite = {past: words for past, _, words in VERBS}

    def verb(words):
        return next((v for v in opposite if v in words), None)

    first, second = premise.split(), hypothesis.split()
    if "not" in first:  # a poodle did not run
        did = past_of[first[first.index("not") + 1]]
        assert verb(second) == did
        return "entailment" if "never" in second else "contradiction"
    did = verb(first)
    if any(hypothesis.endswith(addition) for addition in ADDITIONS):
        return "neutral"
    if second[0] == "nothing":
        assert verb(second) == did
        return "contradiction"
    if "never" in second:
        return "contradiction" if verb(second) == did else "neutral"
    if opposite[did] in hypothesis and verb(second) != did:
        return "contradiction"
    if verb(second) == did:
        assert wider[first[2]] == second[2]
        return "entailment"
    return "neutral"


def test_sentences_are_labelled_rightly():
    data = template_nli(seed=4, train=3000, val=900, test=900)
    for split in data.splits.values():
        for (premise, hypothesis), label in zip(split.rows.inputs, split.rows.labels.tolist(), strict=True):
            assert _true_label(premise, hypothesis) == data.classes[label], (premise, hypothesis)
    cells = Counter(data.test.rows.groups.tolist())
    assert set(cells.values()) == {150}
    train = torch.tensor(list(data.counts()["train"].values())).reshape(3, 2)
    assert train.tolist() == [[800, 200], [985, 15], [985, 15]]
    negation = [has_negation(hypothesis) for _, hypothesis in data.test.rows.inputs]
    assert negation == data.test.attributes["negation"].bool().tolist()


def test_no_premise_is_in_two_splits():
    data = template_nli(seed=0, train=9000, val=3000, test=3000)
    premises = [{premise for premise, _ in split.rows.inputs} for split in data.splits.values()]
    assert len(set.union(*premises)) == sum(map(len, premises))


def test_comments_are_labelled_rightly():
    data = template_toxicity(seed=0)
    test = data.test
    assert test.groups.overlap
    for i in range(1000):
        text, toxic = test.rows.inputs[i], bool(test.rows.labels[i])
        insult = any(f" {word}" in text for word in INSULTS)
        assert insult != any(f" {word}" in text for word in PRAISE)
        indirect = any(text.startswith(frame.split("{}")[0].strip()) for frame in INDIRECT)
        assert toxic == (insult != indirect), text
        for identity, values in test.attributes.items():
            others = text.replace("women", "").replace("black people", "").replace("white people", "")
            seen = WORDS[identity] in (others if identity == "male" else text)
            assert seen == bool(values[i]), (identity, text)
    for identity in WORDS:
        share = {n: float(s.rows.labels[s.attributes[identity] == 1].double().mean()) for n, s in data.splits.items()}
        assert share["test"] == pytest.approx(1 / 3, abs=0.01)
        assert share["train"] == pytest.approx(0.97 if identity in TARGETED else 1 / 3, abs=0.01)


# ---------------------------------------------------------------- difficulty


@pytest.mark.slow
def test_digits_on_colour_are_difficult_and_solvable():
    found = check_difficulty(lambda seed: digits_on_colour(seed=seed), partial(trained, network=cnn, epochs=30))
    assert found.passes, found.table()


def scores(erm, oracle):
    """A trainer that returns what is written down for each seed."""
    return lambda data, balanced, seed: [(oracle if balanced else erm)[seed], 0.99, 0.99, 0.97]


def four_groups(seed, train=1000, test=1000):
    splits = {}
    for name, rows in (("train", train), ("test", test)):
        numbers = torch.arange(rows) % 4 if name == "test" else (torch.arange(rows) % 50).clamp(max=4) % 4
        labels = numbers // 2
        groups = Groups.by_number(numbers, ["a", "b", "c", "d"])
        inputs = np.zeros((rows, 2), np.float32)
        splits[name] = Grouped.of(
            Labelled(tuple(f"{name}{i}" for i in range(rows)), inputs, labels, ("x", "y")), {}, groups
        )
    return GroupedSet("set", splits, "")


@pytest.mark.parametrize(
    ("erm", "oracle", "said"),
    [
        ([0.6, 0.62, 0.58, 0.61, 0.6], [0.8, 0.79, 0.81, 0.8, 0.83], None),
        ([0.8, 0.82, 0.8, 0.81, 0.8], [0.9, 0.92, 0.91, 0.93, 0.9], "plain training's worst group is at 80.6%"),
        ([0.3, 0.32, 0.3, 0.31, 0.3], [0.8, 0.82, 0.81, 0.8, 0.8], "plain training's worst group is at 30.6%"),
        ([0.6, 0.62, 0.58, 0.61, 0.6], [0.65, 0.66, 0.64, 0.66, 0.65], "the oracle gains 5.0%"),
        ([0.6, 0.62, 0.58, 0.61, 0.6], [0.9, 0.4, 0.95, 0.3, 0.95], "the oracle gains 9.8%, interval from -"),
        ([0.6, 0.62], [0.8, 0.81], "2 seeds are too few"),
    ],
)
def test_difficulty_says_what_is_wrong(erm, oracle, said):
    found = check_difficulty(four_groups, scores(erm, oracle), range(len(erm)), images=False)
    assert found.passes == (said is None)
    assert said is None or any(said in failure for failure in found.failures), found.failures


def test_difficulty_counts_rows():
    few = partial(four_groups, train=40, test=400)
    found = check_difficulty(few, scores([0.6] * 5, [0.8] * 5), images=False)
    assert "a group has 1 training rows; 20 are needed" in found.failures
    assert "a group has 100 test rows; 200 are needed" in found.failures

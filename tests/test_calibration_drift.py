"""Drift: false alarms are as rare as promised, change is seen, and the certificate carries what is needed."""

import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offramp.calibration import Drift, Promise
from offramp.calibration.certificate import EARLIER, check_drift
from offramp.calibration.drift import Martingale, packed, unpacked
from test_calibration_certificate import certified

DEPTH = 6


def answers(rng, count, early=0.5):
    """Whole answers leave early more or less often, so tokens of one are anything but independent."""
    made = []
    for _ in range(count):
        share = rng.beta(2 * early, 2 * (1 - early))
        made.append([2 if rng.random() < share else DEPTH for _ in range(rng.integers(1, 12))])
    return made


@given(st.lists(st.integers(1, 40), max_size=30))
def test_packing_keeps_the_histogram(layers):
    assert unpacked(packed(layers)) == sorted(layers)


def test_false_alarms_are_at_most_as_frequent_as_promised():
    """Looked at after every answer; tokens counted one by one would ring far more often."""
    rng, rung = np.random.default_rng(0), 0
    for seed in range(200):
        watch = Drift(answers(rng, 30), false_alarm=0.1, seed=seed)
        rung += any([watch.add(answer) for answer in answers(rng, 60)])
    assert rung <= stats.binom.ppf(0.999, 200, 0.1)


@pytest.mark.parametrize(("early", "direction"), [(0.9, "90%"), (0.1, "10%")])
def test_change_is_seen_in_both_directions(early, direction):
    rng = np.random.default_rng(1)
    watch = Drift(answers(rng, 100), false_alarm=0.01)
    assert "no drift seen in 0 answers" in watch.words()
    rang = [watch.add(answer) for answer in answers(rng, 80, early)]
    assert not any(rang[:5])  # so few cannot tell
    assert rang == sorted(rang)  # it rings on
    assert rang[-1]
    assert watch.words().startswith("drift: ")
    assert "a false alarm has probability 0.01 at most" in watch.words()


def test_layers_never_left_after_before_are_seen():
    watch = Drift([[DEPTH] * 5] * 50)
    assert any([watch.add([3] * 5) for _ in range(40)])
    assert "leave after layer 3.0 on average, in certification 6.0" in watch.words()


def test_a_change_of_shape_at_the_same_mean_is_seen():
    rng = np.random.default_rng(2)
    middle = [[int(layer) for layer in rng.choice([3, 4, 5], 8)] for _ in range(100)]
    watch = Drift(middle)
    ends = [[int(layer) for layer in rng.choice([2, 6], 8)] for _ in range(100)]
    assert any([watch.add(answer) for answer in ends])
    assert "leave by layer 3" in watch.words() or "leave by layer 4" in watch.words()


def test_p_values_are_uniform_with_ties():
    rng, values = np.random.default_rng(3), []
    for seed in range(150):
        bet = Martingale(rng.integers(0, 4, 20).tolist(), random.Random(seed))
        values += [bet.add(float(value)) for value in rng.integers(0, 4, 10)]
    assert stats.kstest(values, "uniform").pvalue > 0.01


def test_the_wealth_is_that_of_all_ways_to_change_sides():
    """Against the definition: a mixture over paths of a Markov chain that jumps anywhere with probability 0.01."""
    bet = Martingale([1.0, 2.0, 3.0], random.Random(0))
    p = [bet.add(value) for value in (0.5, 2.5, 9.0)]
    total = 0.0
    for path in itertools.product((-1, 0, 1), repeat=4):
        chance = 1 / 3
        for before, after in itertools.pairwise(path):
            chance *= 0.99 * (before == after) + 0.01 / 3
        total += chance * math.prod(1 + side * (value - 0.5) for side, value in zip(path[1:], p, strict=True))
    assert bet.wealth == pytest.approx(total)


def test_empty_answers_say_nothing():
    watch = Drift([[2, 6], []])
    assert not watch.add([])
    assert watch.answers == 0
    with pytest.raises(ValueError, match="no answers to compare with"):
        Drift([[]])
    with pytest.raises(ValueError, match=r"false_alarm is 0; allowed are values strictly between 0 and 1"):
        Drift([[1]], false_alarm=0)


# ---------------------------------------------------------------- certificates


def test_a_certificate_knows_where_held_out_answers_left(monkeypatch, tmp_path, caplog):
    certificate = certified(monkeypatch, tmp_path)
    assert certificate.exits == ["4:1"] * 50  # the held-out ones; the script's answers are one token at the last layer
    assert certificate.drift().words().startswith("no drift")
    path = tmp_path / "policy.json"
    check_drift(path, [[4]] * 100)
    check_drift(None, [[1]] * 100)
    assert caplog.messages == []
    check_drift(path, [[1]] * 100)
    (said,) = caplog.messages
    assert said.startswith("certificate may not apply: drift: ")
    caplog.clear()
    values = json.loads(path.read_text())
    values["certificate"]["schema"] = EARLIER
    del values["certificate"]["exits"], values["certificate"]["digest"]  # as an earlier version wrote it
    path.write_text(json.dumps(values))
    check_drift(path, [[1]] * 100)
    assert caplog.messages == []


def test_without_a_held_out_part_certification_serves_and_groups_do_not(monkeypatch, tmp_path):
    assert len(certified(monkeypatch, tmp_path, test=0.0).exits) == 200
    groups = certified(monkeypatch, tmp_path / "groups", Promise("f1", 0.1, 0.1, unit="group"))
    assert groups.exits is groups.drift() is None

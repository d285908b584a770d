"""Which exit rows take by their sets, what empty sets mean, and that sets' states survive a disk."""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.runs import artefact
from offramp.uncertainty import (
    avcs_classification,
    avcs_regression,
    bayesian_regression,
    exits_by_size,
    nested_conformal,
    per_exit,
)
from offramp.uncertainty.avcs_regression import AVCSRegressionConfig
from offramp.uncertainty.nested_conformal import NestedConformal, NestedConformalConfig
from offramp.uncertainty.sets import ClassSets, Intervals, SetExitConfig
from sealing import without_digests


def sets_of(*rows):
    """Rows of sets per exit, as texts of digits."""
    exits = [[[str(c) in text for c in range(3)] for text in column] for column in zip(*rows, strict=True)]
    return ClassSets(torch.tensor(exits))


ROWS = [
    ("012", "01", "0"),  # a singleton at the last exit
    ("1", "012", "012"),  # at the first
    ("01", "12", "012"),  # only of the intersection, {1}, at the second
    ("01", "2", "2"),  # empty at the second
    ("", "0", "1"),  # at the first
    ("012", "012", "012"),  # never small
]


@pytest.mark.parametrize(
    ("empty", "exits", "reported", "answered"),
    [
        ("continue", [2, 0, 1, 2, 2, 2], [1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1]),
        ("abstain", [2, 0, 1, 1, 0, 2], [1, 1, 1, 0, 0, 1], [1, 1, 1, 0, 0, 1]),
        ("stop", [2, 0, 1, 1, 0, 2], [1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1]),
    ],
)
def test_what_empty_sets_mean(empty, exits, reported, answered):
    got = exits_by_size(sets_of(*ROWS), SetExitConfig(empty=empty))
    assert got.exits.tolist() == exits
    assert got.reported.int().tolist() == reported
    assert got.answered.int().tolist() == answered
    assert got.small.int().tolist() == [1, 1, 1, 0, 0, 0]


def test_no_row_leaves_before_the_first_exit():
    assert exits_by_size(sets_of(*ROWS), SetExitConfig(first_exit=1)).exits.tolist() == [2, 1, 1, 2, 2, 2]
    assert exits_by_size(sets_of(*ROWS), SetExitConfig(limit=2)).exits.tolist() == [1, 0, 0, 0, 2, 2]
    with pytest.raises(ValueError, match="exits 0..2"):
        exits_by_size(sets_of(*ROWS), SetExitConfig(first_exit=3))
    with pytest.raises(ValueError, match="'continue', 'abstain', 'stop'"):
        SetExitConfig(empty="guess")
    with pytest.raises(ValueError, match="limit is -1"):
        SetExitConfig(limit=-1)


def test_intervals_leave_when_they_are_short():
    low = torch.tensor([[-math.inf, 0.0, 0.0], [0.0, 1.0, 5.0], [0.0, 1.2, 0.0]]).double()
    high = torch.tensor([[1.0, 4.0, 3.0], [1.0, 1.5, 6.0], [0.5, 9.0, 1.0]]).double()
    got = exits_by_size(Intervals.between(low, high), SetExitConfig(limit=0.6))
    assert got.exits.tolist() == [2, 1, 2]
    assert got.reported.tolist() == [True, True, False]  # [0, 3] and [5, 6] share nothing, for good


@given(st.integers(0, 100_000), st.sampled_from(["continue", "abstain", "stop"]), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_what_comes_after_the_exit_does_not_matter(seed, empty, limit):
    random = torch.Generator().manual_seed(seed)
    members = torch.rand(4, 15, 4, generator=random) < 0.7
    config = SetExitConfig(limit=limit, empty=empty)
    got = exits_by_size(ClassSets(members), config)
    other = members.clone()
    for n, e in enumerate(got.exits.tolist()):
        other[e + 1 :, n] = torch.rand(3 - e, 4, generator=random) < 0.5
    again = exits_by_size(ClassSets(other), config)
    assert torch.equal(got.exits, again.exits)
    assert torch.equal(got.reported, again.reported)


# ---------------------------------------------------------------- sets


@given(st.integers(0, 100_000))
@settings(max_examples=30, deadline=None)
def test_running_intersections_against_a_loop(seed):
    random = torch.Generator().manual_seed(seed)
    members = torch.rand(4, 6, 5, generator=random) < 0.7
    low, length = torch.randn(2, 4, 6, generator=random, dtype=torch.float64)
    intervals = Intervals.between(low, low + length + 0.7)  # some empty
    classes, shared = ClassSets(members).running(), intervals.running()
    points = torch.linspace(-4, 5, 400).double()
    for n in range(6):
        for e in range(4):
            assert classes.members[e, n].tolist() == [bool(members[: e + 1, n, c].all()) for c in range(5)]
            inside = (points[:, None] >= intervals.low[: e + 1, n]) & (points[:, None] <= intervals.high[: e + 1, n])
            one = Intervals(shared.low[e : e + 1, n : n + 1], shared.high[e : e + 1, n : n + 1])
            assert one.contains(points)[0].tolist() == inside.all(1).tolist()
            if bool(shared.empty[e, n]):
                assert not bool(inside.all(1).any())


def test_empty_is_not_zero():
    empty = Intervals.between(torch.tensor([[1.0], [2.0]]), torch.tensor([[-1.0], [math.inf]]))
    assert empty.empty.flatten().tolist() == [True, False]
    assert empty.unbounded.flatten().tolist() == [False, True]
    assert empty.size.flatten().tolist() == [0.0, math.inf]
    assert not bool(empty.contains(torch.zeros(1)).any())
    point = Intervals.between(torch.zeros(1, 1), torch.zeros(1, 1))
    assert not bool(point.empty.any())  # an interval of length zero is one
    assert bool(point.contains(torch.zeros(1)).all())


# ---------------------------------------------------------------- saving


def states():
    random = torch.Generator().manual_seed(0)
    features = [torch.randn(40, width, generator=random) for width in (2, 4)]
    posterior = bayesian_regression.fit(features, features[1].sum(1) + torch.randn(40, generator=random))
    labels = torch.randint(3, (80,), generator=random)
    logits = torch.randn(2, 80, 3, generator=random) + 6 * torch.nn.functional.one_hot(labels, 3)
    scores = torch.rand(2, 50, generator=random)
    yield posterior
    yield avcs_regression.fit(posterior, AVCSRegressionConfig(n_sequences=3))
    yield avcs_classification.fit(logits, labels)
    yield nested_conformal.fit(scores, tune=torch.rand(2, 30, generator=random))
    yield nested_conformal.fit(scores, NestedConformalConfig(equalise=False))
    yield per_exit.fit(scores)


def same(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if hasattr(first, "__dataclass_fields__"):
        return type(first) is type(second) and all(
            same(getattr(first, name), getattr(second, name)) for name in first.__dataclass_fields__
        )
    return type(first) is type(second) and first == second


def test_states_come_back_as_they_were(tmp_path):
    for state in states():
        folder = tmp_path / type(state).__name__
        artefact.save(state, folder)
        assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}
        assert same(artefact.load(type(state), folder), state)
        assert artefact.load(type(state), folder) is not state


def test_empty_tensors_come_back(tmp_path):
    state = per_exit.PerExit(torch.empty(0).double(), per_exit.PerExitConfig())
    artefact.save(state, tmp_path / "state")
    assert same(artefact.load(per_exit.PerExit, tmp_path / "state"), state)


def undigested(folder):
    """The file of a state and what stands in it, without the digest: the first states had none."""
    without_digests(folder)
    file = folder / "state.json"
    return file, json.loads(file.read_text())


def test_states_from_before_a_field_or_the_digest_was_added_come_back(tmp_path):
    state = list(states())[2]
    artefact.save(state, tmp_path / "state")
    file, values = undigested(tmp_path / "state")
    del values["state"]["config"]["first_exit"]
    file.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="has no digest"):
        assert same(artefact.load(type(state), tmp_path / "state"), state)
    del values["state"]["rows"]  # has no default
    file.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="has no digest"), pytest.raises(ValueError, match="damaged"):
        artefact.load(type(state), tmp_path / "state")


def test_states_that_were_changed_or_mixed_are_refused(tmp_path):
    random = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        artefact.save(per_exit.fit(torch.rand(2, 50, generator=random)), tmp_path / name)
    shutil.copy(tmp_path / "a" / "state.safetensors", tmp_path / "b")
    with pytest.raises(ValueError, match="not what was saved.*copy the whole folder"):
        artefact.load(per_exit.PerExit, tmp_path / "b")
    file = tmp_path / "a" / "state.json"
    values = json.loads(file.read_text())
    values["state"]["config"]["alpha"] += 0.1
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="not what was saved"):
        artefact.load(per_exit.PerExit, tmp_path / "a")


def test_infinite_quantiles_come_back(tmp_path):
    with pytest.warns(UserWarning, match="too few"):
        state = nested_conformal.fit(torch.rand(2, 3), NestedConformalConfig(equalise=False))
    artefact.save(state, tmp_path / "state")
    assert artefact.load(NestedConformal, tmp_path / "state").quantiles.tolist() == [math.inf]


@pytest.mark.filterwarnings("ignore:.* has no digest")
def test_what_is_no_state_is_told(tmp_path):
    state = per_exit.fit(torch.rand(2, 50))
    artefact.save(state, tmp_path / "state")
    artefact.save(state, tmp_path / "state")  # replaced
    with pytest.raises(ValueError, match="holds 'PerExit', but 'NestedConformal' was asked for"):
        artefact.load(NestedConformal, tmp_path / "state")
    with pytest.raises(ValueError, match="there is no state.json"):
        artefact.load(NestedConformal, tmp_path / "nowhere")
    file, values = undigested(tmp_path / "state")
    for broken in ({**values["state"], "more": 1}, {"quantiles": "other"}, [], {**values["state"], "quantiles": "x"}):
        file.write_text(json.dumps({**values, "state": broken}))
        with pytest.raises(ValueError, match="damaged"):
            artefact.load(per_exit.PerExit, tmp_path / "state")
    file.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        artefact.load(per_exit.PerExit, tmp_path / "state")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="something else"):
        artefact.save(state, tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"

"""The shape of the source: no new import circles, nothing at the root, and low rooms that know no higher ones."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import house

FILES = house.modules()
GRAPH = house.imports(FILES)
LOW = {
    "runs": set(),
    "uncertainty": {"runs"},
    "metrics": {"uncertainty"},
    "risk": set(),
    "families": {"classifiers"},  # whose heads an encoder makes
    "native": {"core", "families", "hub"},
    "core": {"families", "hub", "native", "runs"},
}
"""What these may import beside themselves and `offramp.values`."""


def room_of(name):
    return name.partition(".")[2].split(".")[0]


def test_there_is_no_import_circle():
    assert house.circles(GRAPH) == []


def test_a_classifier_is_free_of_language_models_and_their_decoder():
    """Also in what it imports when it is used: saving, passes over splits, encoders by name."""
    graph = {**GRAPH, "offramp": set()}  # the top names all rooms, and imports them when they are asked for
    used = house.closure(graph, "offramp.classifiers.classifier") - {"offramp"}
    assert not {room_of(name) for name in used} & {"core", "native", "lm", "training", "evaluation", "calibration"}
    assert len(house.closure(house.imports(FILES, late=False), "offramp.classifiers.classifier")) <= 20


def test_a_circle_would_be_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}
    assert house.circles(graph) == [{"b", "c"}]


def test_hardly_anything_lies_at_the_root():
    assert {path.stem for path in FILES.values() if path.parent == house.SOURCE / "offramp"} == {
        "__init__", "__main__", "values"
    }  # fmt: skip


@pytest.mark.parametrize("room", LOW)
def test_low_rooms_know_no_higher_ones(room):
    used = {room_of(other) for name in GRAPH if room_of(name) == room for other in GRAPH[name] if other != "offramp"}
    assert used - {room, "values"} <= LOW[room]

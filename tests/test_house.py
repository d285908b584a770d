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


def test_import_circles_are_those_that_are_known():
    """A classifier saves itself, and what saves and counts it names its class."""
    (known,) = house.circles(GRAPH)
    assert known == {f"offramp.classifiers.{name}" for name in ("classifier", "flops", "outputs", "saving")}


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

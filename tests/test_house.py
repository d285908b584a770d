"""The shape of the source: no import circles, and nothing at the root. Who may import whom: `lint-imports`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import house

FILES = house.modules()
GRAPH = house.imports(FILES)


def test_there_is_no_import_circle():
    assert house.circles(GRAPH) == []


def test_a_classifier_is_imported_with_little():
    assert len(house.closure(house.imports(FILES, late=False), "offramp.classifiers.classifier")) <= 15


def test_a_circle_would_be_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}
    assert house.circles(graph) == [{"b", "c"}]


def test_hardly_anything_lies_at_the_root():
    assert {path.stem for path in FILES.values() if path.parent == house.SOURCE / "offramp"} == {
        "__init__", "__main__", "values"
    }  # fmt: skip

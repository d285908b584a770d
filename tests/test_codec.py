"""Dataclasses go to JSON and come back by their annotations, however they are nested."""

import importlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
import torch
from torch import Tensor

from offramp.runs.codec import decode, encode
from offramp.runs.results import Result

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import house


@dataclass(frozen=True)
class Leaf:
    value: float
    low: float | None = None


@dataclass(frozen=True)
class Tree(Result):
    schema, noun = "test/tree/1", "tree"

    kind: Literal["oak", "elm"]
    place: Path
    leaf: Leaf | None
    pairs: tuple[tuple[int, str], ...]
    weights: str | tuple[float, ...]
    by_name: Mapping[str, Leaf]
    listed: list[Leaf]
    counts: dict[int, int]
    grown: tuple[Mapping[str, Leaf], ...] = field(default=())

    def table(self):
        return self.kind


TREE = Tree(
    "oak", Path("a/b"), Leaf(1.5), ((1, "one"), (2, "two")), (0.5, 0.5), {"a": Leaf(2.0, 1.0)}, [Leaf(3.0)], {3: 1},
    ({"b": Leaf(4.0)},),
)  # fmt: skip


@pytest.mark.parametrize("tree", [TREE, replace(TREE, leaf=None, weights="uniform", grown=())])
def test_what_is_written_comes_back(tree, tmp_path):
    assert decode(Tree, json.loads(json.dumps(encode(tree)))) == tree
    data, text = tree.save(tmp_path / "new")
    assert Tree.from_dict(json.loads(data.read_text())) == tree
    assert text.read_text() == "oak\n"


def test_a_result_knows_its_schema_and_no_other_keys():
    values = {**TREE.to_dict(), "derived": 1}
    assert values["schema"] == "test/tree/1"
    assert Tree.from_dict(values) == TREE
    with pytest.raises(ValueError, match="the schema is 'other', not 'test/tree/1': this is no tree"):
        Tree.from_dict({**values, "schema": "other"})


def test_fields_are_all_there_and_known():
    values = encode(TREE)
    assert decode(Tree, {name: value for name, value in values.items() if name != "grown"}).grown == ()
    for damaged in ({**values, "more": 1}, {name: value for name, value in values.items() if name != "kind"}, [], 3):
        with pytest.raises(TypeError):
            decode(Tree, damaged)


@dataclass(frozen=True)
class Rows:
    numbers: Tensor
    more: Tensor | None = None


def test_tensors_go_into_a_file_of_their_own_or_stand_as_lists():
    rows, tensors = Rows(torch.tensor([1.0, math.nan, math.inf])), {}
    assert encode(rows, tensors, "rows") == {"numbers": "rows.numbers", "more": None}
    assert decode(Rows, {"numbers": "rows.numbers", "more": None}, tensors).numbers is tensors["rows.numbers"]
    assert encode(rows) == {"numbers": [1.0, None, None], "more": None}
    torch.testing.assert_close(
        decode(Rows, encode(Rows(torch.tensor([1.0, math.nan])))).numbers,
        torch.tensor([1.0, math.nan]).double(), equal_nan=True,
    )  # fmt: skip


def test_what_is_not_data_is_refused():
    with pytest.raises(TypeError, match=r"state\.call is a function, which is not saved"):
        encode({"call": lambda: None}, {}, "state")


def every(kind):
    return [found for each in kind.__subclasses__() for found in (each, *every(each))]


def test_every_result_can_be_read_again():
    """The annotations that `decode` goes by can be resolved: no name of theirs is imported for types alone."""
    for module in house.modules():
        if module.split(".")[-1] in ("result", "trainer", "certify", "validity", "validate") or "report" in module:
            importlib.import_module(module)
    found = [kind for kind in every(Result) if kind.__module__.startswith("offramp.")]
    assert len(found) >= 9
    for kind in found:
        assert set(get_type_hints(kind)) >= {each.name for each in fields(kind)}
        assert kind.schema.startswith("offramp/")

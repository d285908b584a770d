"""One pass over a split: what is kept, on disk and in memory."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offramp.classifiers.outputs import collect, load_description, load_outputs
from offramp.runs.tensor_files import write_tensors
from tiny_encoders import inputs_for, tiny

ROWS = (4, 4, 3)


def batches(name="bert", lengths=(9, 9, 9)):
    """A split of 11 rows in three batches."""
    for i, (rows, length) in enumerate(zip(ROWS, lengths, strict=True)):
        yield inputs_for(name, rows, length=length, seed=i), torch.arange(rows) % 5


IDS = tuple(f"row/{i}" for i in range(11))


@pytest.mark.parametrize("name", ["bert", "msdnet"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_all_exits_of_all_rows_are_kept_in_order(name, on_disk, tmp_path):
    path = tmp_path / "new" / "outputs.safetensors" if on_disk else None
    classifier = tiny(name)
    got = classifier.outputs(batches(name), ids=IDS, groups=torch.arange(11), path=path)
    with torch.no_grad():
        wanted = [classifier(inputs) for inputs, _ in batches(name)]
    for e in range(3):
        assert got.features[e].equal(torch.cat([w[e].features for w in wanted]))
        assert got.logits[e].equal(torch.cat([w[e].logits for w in wanted]))
    assert got.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert got.ids == IDS
    assert got.groups.tolist() == list(range(11))
    assert got.costs.equal(classifier.costs(inputs_for(name)))
    if on_disk:
        assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing else is left behind
        plain = load_file(path)  # the file is one that safetensors itself reads
        assert plain["logits"].equal(got.logits)
        assert plain["features.2"].equal(got.features[2])


def test_costs_are_those_of_a_row_on_average():
    classifier = tiny("bert")
    got = classifier.outputs(batches(lengths=(9, 9, 20)))
    each = [classifier.costs(inputs_for("bert", length=length)) for length in (9, 9, 20)]
    assert torch.allclose(got.costs, sum(c * n for c, n in zip(each, ROWS, strict=True)) / 11)


def test_batches_are_read_one_at_a_time_and_written_as_they_come(tmp_path):
    sizes = []

    def watched():
        for batch in batches():
            sizes.append(sum(p.stat().st_size for p in tmp_path.rglob("logits.0")))
            yield batch

    tiny("bert").outputs(watched(), path=tmp_path / "o.safetensors")
    assert sizes == [0, 4 * 5 * 4, 8 * 5 * 4]


@pytest.mark.parametrize("groups", [None, torch.arange(11)])
def test_saved_outputs_come_back(groups, tmp_path):
    model, given = tiny("bert"), {"ids": IDS, "groups": groups}
    outputs = model.outputs(batches(), **given)
    model.outputs(batches(), **given, path=tmp_path / "o.safetensors", description={"weights": "abc"})
    got = load_outputs(tmp_path / "o.safetensors")
    assert all(a.equal(b) for a, b in zip(got.features, outputs.features, strict=True))
    assert got.logits.equal(outputs.logits)
    assert (got.ids, got.labels.tolist(), got.costs.tolist()) == (IDS, outputs.labels.tolist(), outputs.costs.tolist())
    assert got.cut.tolist() == outputs.cut.tolist()
    assert got.groups is None if groups is None else got.groups.equal(groups)
    assert load_description(tmp_path / "o.safetensors") == {"weights": "abc"}


def resident():
    """Memory of this process that is its own, in MiB, where the system says."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the system does not say")
    return next(int(line.split()[1]) for line in status.read_text().split("\n") if line.startswith("RssAnon")) / 1024


def test_loading_maps_the_file(tmp_path):
    rows, classes = 4000, 1000
    tensors = {
        "features.0": torch.zeros(rows, 8),
        "logits": torch.ones(2, rows, classes),
        "features.1": torch.zeros(rows, 8),
    }
    tensors |= {"labels": torch.zeros(rows, dtype=torch.long), "costs": torch.tensor([1.0, 2.0]).double()}
    path = tmp_path / "o.safetensors"
    write_tensors(path, tensors, {"schema": "offramp/exit-outputs/1", "ids": "[]", "description": "{}"})
    del tensors
    before = resident()
    got = load_outputs(path)
    assert got.logits.sum() == 2 * rows * classes
    assert resident() - before < 10  # of 31


def broken(i):
    x, y = inputs_for("msdnet", 4), torch.zeros(4)
    if i == 1:
        x["pixel_values"][2] = math.nan
    return x, y


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_not_finite_is_named_and_nothing_is_left(on_disk, tmp_path):
    path = tmp_path / "o.safetensors" if on_disk else None
    with pytest.raises(ValueError, match=r"features\.0 of row 6 is not finite"):
        collect(tiny("msdnet"), map(broken, range(2)), path=path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [({"ids": ("a", "b")}, "2 ids"), ({"groups": torch.zeros(3)}, "groups")],
)
def test_ids_and_groups_of_other_rows_are_refused(on_disk, options, message, tmp_path):
    path = tmp_path / "o.safetensors" if on_disk else None
    with pytest.raises(ValueError, match=message):
        collect(tiny("bert"), batches(), path=path, **options)
    assert list(tmp_path.iterdir()) == []


def test_no_rows_and_labels_outside_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there are no rows"):
        collect(tiny("bert"), [])
    with pytest.raises(ValueError, match="there are no rows"):
        collect(tiny("bert"), [], path=tmp_path / "o.safetensors")
    with pytest.raises(ValueError, match=r"label of row 1 is 5; allowed are 0\.\.4"):
        collect(tiny("bert"), [(inputs_for("bert", 2), torch.tensor([0, 5]))])
    late = [next(batches()), (inputs_for("bert", 2), torch.tensor([0, -1]))]
    with pytest.raises(ValueError, match=r"label of row 5 is -1"):
        collect(tiny("bert"), late, path=tmp_path / "o.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"batch of 2 rows came with labels of shape \[3\]"):
        collect(tiny("bert"), [(inputs_for("bert", 2), torch.tensor([0, 1, 2]))])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "is not what was written"),
        (lambda path: path.write_text(json.dumps({})), "missing or damaged"),
        (lambda path: write_tensors(path, {"x": torch.zeros(1)}), "schema None"),
        (lambda path: write_tensors(path, {"x": torch.zeros(1)}, {"schema": "offramp/exit-outputs/1"}), "damaged"),
    ],
)
def test_damaged_files_are_named(damage, message, tmp_path):
    path = tmp_path / "o.safetensors"
    tiny("bert").outputs(batches(), path=path)
    damage(path)
    with pytest.raises(ValueError, match=message):
        load_outputs(path)

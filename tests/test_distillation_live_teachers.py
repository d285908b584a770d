"""Teachers that are asked about the very images that a student sees, where these are augmented."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from distillation_runs import small_study
from offramp.classifiers.batches import batch
from offramp.distillation import runs
from offramp.distillation.data import load_set
from offramp.distillation.grid import run_grid
from offramp.distillation.networks import build, rows_for
from offramp.distillation.teacher import live

pytest.importorskip("sklearn")
STUDY = small_study(1)


@pytest.fixture(scope="module")
def taught():
    """A teacher that is not trained, and training rows."""
    data = load_set(STUDY.data, 0).train.rows
    return build(STUDY.teacher, data, 0).eval(), data


def test_it_computes_in_its_precision(taught, monkeypatch):
    teacher, data = taught
    rows, found = rows_for(teacher, data), []
    kind = type(teacher.backbone)
    through = kind.run
    monkeypatch.setattr(kind, "run", lambda *a: found.append(torch.is_autocast_enabled("cpu")) or through(*a))
    part = batch(rows, torch.arange(4))
    answers = [live(teacher, rows, rows, precision)(part) for precision in ("bf16", None)]
    assert [answer.dtype for answer in answers] == [torch.float32] * 2
    exits = len(found) // 2
    assert found == [True] * exits + [False] * exits


def test_it_sees_images_as_it_knows_them(taught, monkeypatch):
    teacher, data = taught
    own = rows_for(teacher, data)
    monkeypatch.setattr(teacher, "preprocessing", {"image_mean": (0.4, 0.5, 0.6), "image_std": (0.1, 0.2, 0.3)})
    other, places = rows_for(teacher, data), torch.arange(8)
    assert not torch.allclose(own.inputs(places), other.inputs(places))
    with torch.no_grad():
        wanted = teacher(other.inputs(places))[-1].logits
    torch.testing.assert_close(live(teacher, own, other)(batch(own, places)), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(live(teacher, other, other)(batch(other, places)), wanted)
    grey = SimpleNamespace(settings={"mean": (0.5,), "std": (0.2,)})
    with pytest.raises(ValueError, match="images with 1 channels and the teacher with 3"):
        live(teacher, grey, other)


def test_a_student_of_augmented_images_learns(tmp_path):
    (found,) = run_grid(runs(replace(STUDY, pad=1, flip=True), ["kd"], ["erm"], [0]), tmp_path)
    assert found["terms"]["kd"][0] > 0

"""A file is either what it was or what it should become."""

import json
import math

import pytest

from offramp.runs.files import replace_file, write_json
from offramp.runs.resume import locked


def everything_in(folder):
    return sorted(p.name for p in folder.rglob("*"))


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("when", ["before", "in the middle"])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error, when):
    path = tmp_path / "policy.json"
    path.write_text("old")

    def write(temporary):
        if when == "in the middle":
            temporary.write_text("half of the n")
        raise error("stopped")

    with pytest.raises(error, match="stopped"):
        replace_file(path, write)
    assert path.read_text() == "old"
    assert everything_in(tmp_path) == ["policy.json"]


def test_a_first_write_that_fails_leaves_no_file(tmp_path):
    def write(temporary):
        temporary.write_bytes(b"half")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        replace_file(tmp_path / "new.bin", write)
    assert everything_in(tmp_path) == []


def test_the_file_appears_only_when_its_writer_is_done(tmp_path):
    path, seen = tmp_path / "weights.safetensors", []

    def write(temporary):
        temporary.write_bytes(b"new")
        seen.append((temporary.parent, temporary.suffix, temporary != path, path.exists()))

    replace_file(path, write)
    assert seen == [(tmp_path, ".safetensors", True, False)]
    assert path.read_bytes() == b"new"
    assert everything_in(tmp_path) == ["weights.safetensors"]


def test_an_old_file_is_readable_until_it_is_replaced(tmp_path):
    path, seen = tmp_path / "a.txt", []
    path.write_text("old")

    def write(temporary):
        temporary.write_text("new")
        seen.append(path.read_text())

    replace_file(path, write)
    assert (seen, path.read_text()) == (["old"], "new")


def test_missing_folders_are_made_and_the_file_is_readable_for_others(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    write_json(path, {})
    assert json.loads(path.read_text()) == {}
    assert path.stat().st_mode & 0o444 == 0o444


def test_json_comes_back_as_it_was(tmp_path):
    path = tmp_path / "x.json"
    values = {"text": 'τ ≤ 1 \N{SNOWMAN} " \\ \n', "numbers": [0.1, -3, 1e-300, 2**60], "none": None, "yes": True}
    write_json(path, values)
    assert json.loads(path.read_text(encoding="utf-8")) == values
    assert path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [1, x], lambda x: {"a": {"b": [x]}}])
def test_numbers_that_json_lacks_are_refused_and_the_old_file_stays(tmp_path, value, wrap):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(ValueError):  # noqa: PT011 - the text is Python's own
        write_json(path, wrap(value))
    assert path.read_text() == "old"
    assert everything_in(tmp_path) == ["x.json"]


def test_what_is_not_json_at_all_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "old"
    assert everything_in(tmp_path) == ["x.json"]


def test_a_run_folder_has_one_user_at_a_time(tmp_path):
    folder = tmp_path / "new" / "run"
    with locked(folder, "another calibration runs"):
        assert folder.is_dir()
        again = locked(folder, "another calibration runs")
        with pytest.raises(ValueError, match="another calibration runs in .*run; wait for it"):
            again.__enter__()
    with locked(folder, "another calibration runs"):
        pass

"""Files of JSON lines: whatever stops their growth, they go on, and what was edited is refused."""

import json
import math

import pytest

from offramp.runs.resume import append_lines, keep_lines, open_lines, read_lines, write_lines
from sealing import without_digests


@pytest.mark.parametrize("cut", range(0, 170, 7))
def test_lines_survive_an_interruption_anywhere(tmp_path, cut):
    path, values = tmp_path / "runs" / "a.jsonl", [{"n": 1}, {"s": "zwei \u00fc"}, {"l": [3]}]
    assert open_lines(path, {"of": "me"}, "things") == []
    append_lines(path, values)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    kept = open_lines(path, {"of": "me"}, "things")
    assert kept == values[: max(whole[:cut].count(b"\n") - 1, 0)]
    append_lines(path, values[len(kept) :])
    assert path.read_bytes() == whole


def test_lines_of_something_else_are_left_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    open_lines(path, {"of": "me"}, "things")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds things made otherwise .of was 'me' and is now 'you'.; remove it"):
        open_lines(path, {"of": "you"}, "things")
    assert path.read_bytes() == before
    for other in (b"no json\n", b"[1]\n"):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="does not hold things"):
            open_lines(path, {"of": "me"}, "things")
        assert path.read_bytes() == other
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_lines(path, [{"n": math.nan}])


def test_only_whole_groups_of_lines_count(tmp_path):
    path = tmp_path / "a.jsonl"
    open_lines(path, {}, "things")
    append_lines(path, [{"n": n} for n in range(5)])
    assert open_lines(path, {}, "things", lambda found: len(found) - len(found) % 2) == [{"n": n} for n in range(4)]
    assert open_lines(path, {}, "things") == [{"n": n} for n in range(4)]


def written(path, count=5):
    values = [{"n": n, "text": f"zeile {n} \u00fc"} for n in range(count)]
    open_lines(path, {"of": "me"}, "things")
    append_lines(path, values)
    return values


def test_every_flipped_bit_is_seen_or_changes_nothing(tmp_path):
    """Half a line at the end is what a killed process leaves: the last line may go with its line end."""
    path = tmp_path / "a.jsonl"
    values, whole = written(path, 3), path.read_bytes()
    for at in range(len(whole)):
        for bit in (1, 32, 128):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            found, said = read_or_error(path)
            assert said is None or (str(path) in said and "\n" not in said)
            if said is None:
                assert found in ([{"of": "me"}, *values], [{"of": "me"}, *values[:-1]])
                assert len(found) == 4 or at == len(whole) - 1


def read_or_error(path):
    try:
        return read_lines(path, "things"), None
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: [*lines[:2], *lines[3:]],  # one is missing
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [{**lines[0], "of": "you"}, *lines[1:]],
        lambda lines: [*lines[:3], {**lines[3], "n": 7}, *lines[4:]],
        lambda lines: [*lines[:3], {k: v for k, v in lines[3].items() if k != "digest"}, *lines[4:]],
    ],
)
def test_edited_files_are_refused(tmp_path, edit):
    path = tmp_path / "a.jsonl"
    written(path)
    lines = edit([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"a.jsonl, line \d is not what was written: things were changed"):
        open_lines(path, {"of": "me"}, "things")


def test_files_of_earlier_versions_are_read_and_go_on_with_a_note(tmp_path):
    path = tmp_path / "a.jsonl"
    values = written(path)
    without_digests(tmp_path)
    for more in ({"n": 5}, {"n": 6}):
        with pytest.warns(UserWarning, match="has no digest, as earlier versions"):
            assert open_lines(path, {"of": "me"}, "things") == values
        append_lines(path, [more])
        values.append(more)
    assert "digest" not in path.read_text()


def test_a_file_that_is_cut_goes_on_with_its_digests(tmp_path):
    path = tmp_path / "a.jsonl"
    values = written(path)
    whole = path.read_bytes()
    keep_lines(path, 3)
    assert read_lines(path, "things") == [{"of": "me"}, *values[:2]]
    append_lines(path, values[2:])
    assert path.read_bytes() == whole
    write_lines(path, [{"of": "me"}, *values])
    assert path.read_bytes() == whole


def test_long_lines_are_found_from_the_end(tmp_path):
    path = tmp_path / "a.jsonl"
    for n in range(3):
        append_lines(path, [{"n": n, "text": "x" * 300_000}])
    assert [value["n"] for value in read_lines(path, "things")] == [0, 1, 2]

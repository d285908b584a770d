"""Where files and folders are written to is looked at: links, pipes, modes, and what killed processes left."""

import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from offramp.runs import files
from offramp.runs.files import recover_folder, replace_folder, require_writable, write_json, write_text

posix = pytest.mark.skipif(os.name != "posix", reason="modes, links and pipes of POSIX")


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@posix
def test_the_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "far" / "real.json")
    write_json(tmp_path / "link.json", {})
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "far" / "real.json").read_text() == "{}\n"
    (tmp_path / "none.json").symlink_to(tmp_path / "far" / "new.json")
    write_json(tmp_path / "none.json", {})
    assert (tmp_path / "far" / "new.json").read_text() == "{}\n"
    assert everything_in(tmp_path) == ["far", "far/new.json", "far/real.json", "link.json", "none.json"]


@posix
def test_modes_are_kept_and_new_files_obey_the_umask(tmp_path):
    path = tmp_path / "a.json"
    before = os.umask(0o077)
    try:
        write_json(path, {})
        replace_folder(tmp_path / "folder", lambda new: (new / "x").write_text("y"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700
    write_json(path, [])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for mode in (0o640, 0o666, 0o444):
        path.chmod(mode)
        write_json(path, [mode])
        assert stat.S_IMODE(path.stat().st_mode) == mode
    replace_folder(tmp_path / "folder", lambda new: (new / "x").write_text("z"))
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700


@posix
def test_a_pipe_is_written_into(tmp_path):
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    reader.start()
    require_writable(path)
    write_text(path, "all of it\n" * 20_000)
    reader.join()
    assert got == ["all of it\n" * 20_000]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert everything_in(tmp_path) == ["pipe"]


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="no /dev/stdout")
@pytest.mark.parametrize("piped", [True, False])
def test_standard_output_is_written_behind_what_is_there(tmp_path, piped):
    code = "import sys\nfrom pathlib import Path\nfrom offramp.runs.files import write_text\nprint('first')\n"
    code += "write_text(Path('/dev/stdout'), 'second\\n')\nprint('third')\n"
    if piped:
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    else:
        with (tmp_path / "out.txt").open("a") as out:
            subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
        said = (tmp_path / "out.txt").read_text()
    assert said.split() == ["first", "second", "third"]


def test_targets_that_cannot_be_written_are_refused_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a folder; name a file"):
        require_writable(tmp_path)
    with pytest.raises(ValueError, match="file is no folder; name another file"):
        require_writable(tmp_path / "file" / "a" / "b.json")
    require_writable(tmp_path / "a" / "b" / "c.json")
    require_writable(tmp_path / "file")
    with pytest.raises(IsADirectoryError, match="it is a folder; name a file"):
        write_json(tmp_path, {})
    assert everything_in(tmp_path) == ["file"]


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="nothing is read-only for root")
def test_read_only_places_are_refused(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o555)
    with pytest.raises(ValueError, match="shut may not be written"):
        require_writable(tmp_path / "shut" / "a.json")
    with pytest.raises(PermissionError):
        write_json(tmp_path / "shut" / "a.json", {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_told(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        write_text(Path("/dev/full"), "x" * 100_000)


def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path):
    old = time.time() - 3600
    dead, other, fresh = (tmp_path / f".{name}.json" for name in ("a-0123456789ab", "b-0123456789ab", "a-ba9876543210"))
    mine = tmp_path / ".a-notes.json"
    held = tmp_path / ".a-aaaaaaaaaaaa.json"
    for path in (dead, other, mine, held):
        path.write_text("half")
        os.utime(path, (old, old))
    fresh.write_text("half")
    handle = files._opened(held)
    folder = tmp_path / ".a.json-cccccccccccc"
    (folder / "new").mkdir(parents=True)
    os.utime(folder, (old, old))
    write_json(tmp_path / "a.json", {})
    os.close(handle)
    assert everything_in(tmp_path) == sorted(p.name for p in (other, fresh, mine, held)) + ["a.json"]


def version(folder):
    values = json.loads((folder / "a.json").read_text())
    assert values == json.loads((folder / "sub" / "b.json").read_text())
    return values


def put(new):
    (new / "sub").mkdir()
    for name in ("a.json", "sub/b.json"):
        (new / name).write_text("7")


REPLACING = """
import sys
from pathlib import Path
from offramp.runs import files
if sys.argv[2] == "renames":
    files._exchange = lambda *_: False
def put(n, new):
    (new / "sub").mkdir()
    for name in ("a.json", "sub/b.json"):
        (new / name).write_text(str(n))
print("ready", flush=True)
for n in range(1, 10**6):
    files.replace_folder(Path(sys.argv[1]), lambda new: put(n, new))
"""


@posix
@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_a_folder_is_whole_whenever_its_writer_is_killed(tmp_path, how):
    folder, draw = tmp_path / "exits", random.Random(0)
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", REPLACING, str(folder), how], stdout=subprocess.PIPE)
        with process:
            process.stdout.readline()
            while not folder.exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(draw.random() * 0.02)
            process.send_signal(signal.SIGKILL)
        recover_folder(folder)
        assert version(folder) >= 1
    for left in tmp_path.glob(".*"):
        os.utime(left, (0, 0))
    files._looked.clear()
    replace_folder(folder, put)
    assert version(folder) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["exits"]


def test_what_a_kill_between_two_renames_leaves_is_ended_by_the_next_reader(tmp_path):
    work = tmp_path / ".exits-0123456789ab"
    for name, text in (("old", "1"), ("new", "2")):
        (work / name / "sub").mkdir(parents=True)
        for file in ("a.json", "sub/b.json"):
            (work / name / file).write_text(text)
    earlier = [tmp_path / f".exits-{token}" for token in ("000000000000", "ffffffffffff")]
    for other in earlier:  # killed while they removed what they had replaced
        (other / "old" / "sub").mkdir(parents=True)
    recover_folder(tmp_path / "exits")
    assert version(tmp_path / "exits") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([other.name for other in earlier] + ["exits"])
    recover_folder(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_whose_writer_fails_stays(tmp_path, error):
    folder = tmp_path / "exits"
    replace_folder(folder, lambda new: (new / "a").write_text("old"))

    def fail(new):
        (new / "a").write_text("half")
        raise error("stopped")

    with pytest.raises(error, match="stopped"):
        replace_folder(folder, fail)
    assert everything_in(tmp_path) == ["exits", "exits/a"]
    assert (folder / "a").read_text() == "old"

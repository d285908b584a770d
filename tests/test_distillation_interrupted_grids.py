"""Processes of a grid end with it: when it is interrupted, and when it is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import interrupted_grid
from offramp.distillation import run_grid

pytest.importorskip("sklearn")
HERE = Path(__file__).parent


def alive(pid):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_no_process_outlives_its_grid(tmp_path, how):
    grid = subprocess.Popen(
        [sys.executable, interrupted_grid.__file__, tmp_path], cwd=HERE, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        workers = [int(pid) for pid in grid.stdout.readline().split()]
        assert len(workers) == 2
        if how == "interrupted":
            os.killpg(grid.pid, signal.SIGINT)  # as a terminal does
        else:
            grid.kill()
        error = grid.communicate(timeout=60)[1]
        assert ("KeyboardInterrupt" in error) == (how != "killed")
        last = time.monotonic() + 60
        while any(map(alive, workers)) and time.monotonic() < last:
            time.sleep(0.1)
        assert not any(map(alive, workers))
    finally:
        grid.kill()
    finished = list((tmp_path / "runs").glob("*/result.json"))
    assert 1 <= len(finished) < len(interrupted_grid.METHODS)  # what waited was not begun
    if how == "interrupted":
        results = run_grid(interrupted_grid.asked(), tmp_path)
        assert [r["name"] for r in results] == interrupted_grid.METHODS

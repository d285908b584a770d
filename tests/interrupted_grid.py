"""A grid in two processes, for a test that interrupts it: python interrupted_grid.py FOLDER."""

import multiprocessing
import signal
import sys
from pathlib import Path

from distillation_runs import READOUT, small_study
from offramp.distillation import run_grid, runs

METHODS = [f"erm+learning_rate={rate}" for rate in (0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008)]


def asked():
    return runs(small_study(3), METHODS, [], [0], READOUT)


def told(done, total, key):
    """Which processes there are, when the first run has ended."""
    sys.stdout.write(" ".join(str(child.pid) for child in multiprocessing.active_children()) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which those whom a shell put in the background lack
    run_grid(asked(), Path(sys.argv[1]), processes=2, progress=told)

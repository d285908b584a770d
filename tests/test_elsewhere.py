"""Models on another device than the CPU, without one: the contract there, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch cannot have devices written in Python",
)
@pytest.mark.parametrize("part", ["every_family", "not every_family"])
def test_the_contract_holds_on_another_device(part):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", part]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "OFFRAMP_TEST"))}
    done = subprocess.run(
        [*command, HERE / "device_contract.py"], capture_output=True, text=True, env=env, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

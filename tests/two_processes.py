"""A script run as two processes with what `accelerate launch` and `torchrun` tell theirs, on the loopback device."""

import os
import socket
import subprocess
import sys


def run(script, *arguments):
    """Exit codes and what was written to standard error, of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env={**os.environ, **common, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    return [process.returncode for process in started], errors

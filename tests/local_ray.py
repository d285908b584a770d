"""Ray on the loopback address, for tests."""

import contextlib
import tempfile

import pytest

SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as there: all servers listen on the loopback address
    "RAY_AUTH_MODE": "disabled",  # else a token is written to the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
}


@contextlib.contextmanager
def local_ray(monkeypatch, cpus=2):
    """The module, with a cluster of this machine that ends with the block."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    ray = pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(prefix="ray") as files:  # sockets are in there, whose paths must be short
        try:
            ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, _temp_dir=files)
        except Exception as error:  # seen where other work left a core 3 % free: it waits for its parts in vain
            ray.shutdown()
            pytest.skip(f"Ray does not start here: {error}")
        try:
            assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
            yield ray
        finally:
            ray.shutdown()

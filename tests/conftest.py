"""Settings for all tests: few threads, since tests run side by side, and one profile for property tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # tables are then as wide as they are; workers of pytest-xdist are told a width

import pytest
import torch

torch.set_num_threads(1)
try:
    from hypothesis import settings
except ImportError:  # on a bare machine with a GPU, tests/cuda.sh
    pass
else:
    settings.register_profile("offramp", deadline=None, derandomize=True, max_examples=50, print_blob=False)
    settings.load_profile("offramp")


@pytest.fixture(autouse=True)
def _same_numbers_each_time():
    """What a test draws does not depend on the tests that ran before it in the same process."""
    torch.manual_seed(0)

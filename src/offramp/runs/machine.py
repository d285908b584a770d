"""What a measurement or a training ran on, for its record."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import torch
import transformers


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, as JSON values: device, vector instructions, cores, threads in use, packages."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "offramp": version("offramp"),
    }

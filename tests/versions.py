"""Says which releases a run of the tests is about: `python tests/versions.py`."""

import platform
import sys
from importlib.metadata import version

NAMES = (
    "torch", "transformers", "tokenizers", "huggingface-hub", "safetensors", "accelerate", "gguf", "numpy", "scipy",
    "peft", "typer", "pytest",
)  # fmt: skip

if __name__ == "__main__":
    found = ", ".join(f"{name} {version(name)}" for name in NAMES)
    sys.stdout.write(f"Python {platform.python_version()}, {found}\n")

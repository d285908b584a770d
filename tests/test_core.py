"""The core is a room of its own: what decoding loads, and what it must not know."""

import subprocess
import sys
from pathlib import Path

import offramp

HOUSE = Path(offramp.__file__).parent
LOADED = """
import sys
import offramp.core.decoding
print(*sorted(name for name in sys.modules if name.startswith("offramp.")))
"""


def loaded():
    return subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True).stdout.split()


def test_decoding_loads_the_core_and_the_families_alone():
    names = [name for name in loaded() if name not in ("offramp.core", "offramp.families", "offramp.values")]
    assert {name.split(".")[1] for name in names} == {"core", "families"}
    assert len(names) < 25


def test_the_core_imports_no_wing():
    wings = {path.parent.name for path in HOUSE.glob("*/__init__.py")} - {
        "core",
        "families",
        "native",
        "cuda",
        "hub",
        "runs",
    }
    assert {"uncertainty", "calibration", "classifiers", "lm", "training"} <= wings
    for path in (HOUSE / "core").glob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]) and len(words) > 1 and words[1].startswith("offramp."):
                assert words[1].split(".")[1] not in wings, f"{path.name}: {line.strip()}"

"""Write docs/benchmarks.md: every figure in it comes from the runs this script makes.

    .venv/bin/python benchmarks/run.py          # about twenty minutes on two idle cores; finished runs are not repeated

Results are kept in runs/benchmarks, one JSON file and one folder per run; delete both to repeat it.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS, PICTURES, PAGE = ROOT / "runs" / "benchmarks", ROOT / "docs" / "pictures", ROOT / "docs" / "benchmarks.md"
BENCHES = {
    "smollm2-float32": ("SmolLM2-135M-Instruct, float32", ["smollm2"]),
    "smollm2-bfloat16": (
        "SmolLM2-135M-Instruct, bfloat16",
        ["smollm2", "--dtype", "bfloat16", "--limit", "2", "--max-new-tokens", "24"],
    ),
    "t5-large": (
        "Shape of T5-large, random weights, scripted exits, float32",
        ["--random", "t5-large", "--limit", "1", "--max-new-tokens", "8"],
    ),
}
INTRO = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split("\n", 1)[1].strip()


def run(name: str, arguments: list[str]) -> tuple[str, dict]:
    """One bench: its printed table and its JSON; taken from an earlier run if there is one."""
    table, result = RUNS / f"{name}.txt", RUNS / f"{name}.json"
    if not result.exists():
        print(f"running: offramp bench {' '.join(arguments)}", flush=True)
        RUNS.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", "from offramp.cli import main; main()", "bench", *arguments]
        done = subprocess.run([*command, "--out", str(RUNS / name), "--json", str(result)], stdout=subprocess.PIPE)
        if done.returncode:
            sys.exit(done.returncode)
        table.write_bytes(done.stdout)
    return table.read_text(encoding="utf-8"), json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    """Run what has not run yet, then write the page."""
    page = ["# Benchmarks", "", "Written by `benchmarks/run.py`.", "", INTRO]
    for name, (title, arguments) in BENCHES.items():
        table, result = run(name, arguments)
        PICTURES.mkdir(parents=True, exist_ok=True)
        picture = PICTURES / f"bench-{name}.svg"
        picture.write_bytes((RUNS / name / "bench.svg").read_bytes())
        page += ["", f"## {title}", "", f"`offramp bench {' '.join(arguments)}`", "", table.strip(), ""]
        page += [f"![{title}](pictures/{picture.name})"]
    PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()

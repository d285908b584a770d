"""Write docs/benchmarks.md: every figure in it comes from the runs this script makes.

    .venv/bin/python benchmarks/run.py              # on idle cores; finished runs are not repeated
    .venv/bin/python benchmarks/run.py peers        # this one anew; of the others the page keeps what it has

Results are kept in runs/benchmarks, one JSON file and one folder per run; delete both to repeat it.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS, PICTURES, PAGE = ROOT / "runs" / "benchmarks", ROOT / "docs" / "pictures", ROOT / "docs" / "benchmarks.md"
NATIVE = ["--engine", "native", "--dtype", "bfloat16"]
BENCHES = {
    "peers": (
        "Beside llama.cpp and economize: SmolLM2-135M-Instruct, native engine, bfloat16 and int8",
        ["smollm2", *NATIVE, "--with-int8", "--limit", "2", "--max-new-tokens", "64", "--mean-layer", "20",
         "--min-layer", "15", "--arms", "static 20,softmax + fixed", "--repeats", "7",
         "--peers", "llama.cpp,economize"],
    ),
    "long-prompt": (
        "A prompt of 300 tokens",
        ["smollm2", *NATIVE, "--prompts", "benchmarks/prompt_300_tokens.txt", "--limit", "1", "--max-new-tokens", "8",
         "--arms", "static 20", "--repeats", "7", "--peers", "llama.cpp"],
    ),
    "peers-avx2": (
        "Beside llama.cpp on a processor without AVX-512: SmolLM2-135M-Instruct, in bfloat16 and fewer bits",
        ["smollm2", *NATIVE, "--with-int8", "--with-int4", "--limit", "2", "--max-new-tokens", "64",
         "--mean-layer", "20", "--min-layer", "15", "--arms", "static 20,softmax + fixed", "--repeats", "7",
         "--peers", "llama.cpp"],
    ),
    "long-prompt-avx2": (
        "A prompt of 300 tokens on a processor without AVX-512",
        ["smollm2", *NATIVE, "--with-int8", "--with-int4", "--prompts", "benchmarks/prompt_300_tokens.txt",
         "--limit", "1", "--max-new-tokens", "8", "--arms", "static 20", "--repeats", "7", "--peers", "llama.cpp"],
    ),
    "batches": (
        "Several prompts together: SmolLM2-135M-Instruct, exits scripted at layer 20",
        ["smollm2", *NATIVE, "--batch-sizes", "1,4,8,16", "--max-new-tokens", "32", "--mean-layer", "20",
         "--min-layer", "15", "--arms", "static 20,softmax + fixed"],
    ),
    "llama-3.2-1b": (
        "Shape of Llama-3.2-1B, random weights, exits scripted at layer 12",
        ["--shape", "llama-3.2-1b", *NATIVE, "--prompt-length", "16", "--batch-sizes", "1,4,8,16",
         "--max-new-tokens", "16", "--mean-layer", "12", "--min-layer", "8", "--arms", "static 12,softmax + fixed"],
    ),
    "t5-large": (
        "Shape of T5-large, random weights, exits scripted as in the source document",
        ["--shape", "t5-large", *NATIVE, "--prompt-length", "32", "--batch-sizes", "1,4,8,16",
         "--max-new-tokens", "32", "--mean-layer", "19.2", "--min-layer", "7",
         "--arms", "static 19,softmax,softmax + fixed"],
    ),
    "smollm2-float32": ("SmolLM2-135M-Instruct, float32", ["smollm2", "--engine", "torch"]),
    "smollm2-bfloat16": (
        "SmolLM2-135M-Instruct, bfloat16",
        ["smollm2", "--dtype", "bfloat16", "--limit", "2", "--max-new-tokens", "24", "--engine", "torch"],
    ),
}  # fmt: skip
INTRO = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split("\n", 1)[1].strip()


def run(name: str, arguments: list[str], *, anew: bool) -> str:
    """One bench: its printed table; taken from an earlier run if there is one, unless it is to be made anew."""
    table, result = RUNS / f"{name}.txt", RUNS / f"{name}.json"
    if anew:
        shutil.rmtree(RUNS / name, ignore_errors=True)
    if anew or not result.exists():
        print(f"running: offramp bench {shlex.join(arguments)}", flush=True)
        RUNS.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", "from offramp.cli import main; main()", "bench", *arguments]
        kept = ["--out", str(RUNS / name), "--json", str(result)]
        done = subprocess.run([*command, *kept], stdout=subprocess.PIPE, cwd=ROOT)
        if done.returncode:
            sys.exit(done.returncode)
        table.write_bytes(done.stdout)
    return table.read_text(encoding="utf-8")


def section(name: str, title: str, arguments: list[str], *, anew: bool) -> str:
    """What the page says of one bench."""
    table = run(name, arguments, anew=anew).strip()
    PICTURES.mkdir(parents=True, exist_ok=True)
    picture = PICTURES / f"bench-{name}.svg"
    picture.write_bytes(next((RUNS / name).rglob("bench.svg")).read_bytes())  # of several sizes, the first
    command = f"`offramp bench {shlex.join(arguments)}`"
    return f"## {title}\n\n{command}\n\n{table}\n\n![{title}](pictures/{picture.name})\n"


def main() -> None:
    """Run what is asked for, or what has not run yet, then write the page."""
    asked = sys.argv[1:]
    if unknown := set(asked) - set(BENCHES):
        sys.exit(f"there is no run {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    have = PAGE.read_text(encoding="utf-8").split("\n## ")[1:] if PAGE.exists() else []
    old = {text.partition("\n")[0]: f"## {text.strip()}\n" for text in have}
    page = [f"# Benchmarks\n\nWritten by `benchmarks/run.py`.\n\n{INTRO}\n"]
    for name, (title, arguments) in BENCHES.items():
        if name in asked or not asked or (RUNS / f"{name}.json").exists():
            page.append(section(name, title, arguments, anew=name in asked))
        elif title in old:
            page.append(old[title])
    PAGE.write_text("\n".join(page), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()

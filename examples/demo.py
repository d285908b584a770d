"""The main job, end to end, on a small pretrained model: probe it, generate with exits, compare, draw.

Run with `make demo`. Takes a few minutes on two cores; figures and pictures go to runs/demo.
"""

import io
import sys
import time
from pathlib import Path

from rich.console import Console
from tqdm.auto import tqdm

import offramp
from offramp import ExitPolicy
from offramp.bench import run_bench
from offramp.bench_results import Bench
from offramp.cli.show import Painter
from offramp.files import replace_file, write_json
from offramp.probe import probe
from offramp.prompts import bundled_prompts
from offramp.report.plots import save_bench

FOLDER = Path("runs/demo")
TOKENS, PROMPTS, ROUNDS = 24, 3, 3
FIRST = 24  # of 30 layers
ARMS = {
    "static 28": ExitPolicy("static", min_layer=28),
    "softmax": ExitPolicy(threshold=0.9, min_layer=FIRST),
    "softmax, fixed": ExitPolicy(threshold=0.9, min_layer=FIRST, vocabulary="fixed"),
    "softmax, adaptive": ExitPolicy(threshold=0.9, min_layer=FIRST, vocabulary="adaptive"),
    "JSD, adaptive": ExitPolicy("jsd", threshold=0.9, min_layer=FIRST, vocabulary="adaptive"),
    "verify": ExitPolicy(threshold=0.9, min_layer=FIRST, vocabulary="fixed", skipped="verify"),
}
SHOWN = "Why is the sky blue?"


def main() -> None:
    """Probe, generate, compare."""
    began = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    lm = offramp.load("smollm2", dtype="float32")

    say("1. Is SmolLM2 suited to early exits? A probe on the bundled prompts")
    with tqdm(desc="probing", leave=False, disable=None) as bar:
        report = probe(lm, min_layer=FIRST, progress=lambda done, total: step(bar, done, total))
    print(report.table())
    pictures = report.save(FOLDER)

    say(f"2. {SHOWN!r}, with the layer each token left at")
    texts = {}
    for name, policy in {"full model": None, "softmax": ARMS["softmax"], "verify": ARMS["verify"]}.items():
        print(f"{name}:")
        texts[name] = show(lm, policy)
        print()
    pictures.append(draw_exits(lm, ARMS["verify"]))
    print(f"verify and the full model wrote the same text: {'yes' if texts['verify'] == texts['full model'] else 'NO'}")

    say(f"3. Every policy against transformers' generate: {PROMPTS} prompts, {TOKENS} tokens, {ROUNDS} rounds in turns")
    with tqdm(desc="timing", leave=False, disable=None) as bar:
        bench = run_bench(
            lm, bundled_prompts()[:: 60 // PROMPTS][:PROMPTS], ARMS, max_new_tokens=TOKENS, repeats=ROUNDS, chat=True,
            name="smollm2", progress=lambda done, total, what: step(bar, done, total, what),
        )  # fmt: skip
    pictures += save_bench(bench, FOLDER)
    write_json(FOLDER / "bench.json", bench.to_dict())
    print(bench.table())
    say("4. In words")
    print(in_words(bench))
    print(f"\n{time.perf_counter() - began:.0f} s. Figures and pictures are in {FOLDER}:")
    for path in sorted({*pictures, FOLDER / "bench.json"}):
        print(f"  {path}")


def say(title: str) -> None:
    """A heading."""
    print(f"\n== {title}\n", flush=True)


def step(bar: tqdm, done: int, total: int, what: str = "") -> None:
    """Move a progress bar."""
    bar.total, bar.n = total, done
    bar.set_postfix_str(what)


def show(lm: offramp.LanguageModel, policy: ExitPolicy | None, console: Console | None = None) -> str:
    """Stream one answer with its exits; return the text."""
    painter = Painter(console or Console(soft_wrap=True), lm.tokenizer, lm.num_layers, FIRST, show_exits=True)
    if policy is not None:
        painter.legend()
    for step in lm.stream(SHOWN, policy=policy, max_new_tokens=40, chat=True):
        painter.put(int(step.token), int(step.exit_layer))
    painter.end()
    return painter.written


def draw_exits(lm: offramp.LanguageModel, policy: ExitPolicy) -> Path:
    """The coloured answer as a picture."""
    console = Console(record=True, width=100, force_terminal=True, color_system="truecolor", file=io.StringIO())
    show(lm, policy, console)
    path = FOLDER / "exits.svg"
    replace_file(path, lambda file: console.save_svg(str(file), title=f"{SHOWN} (exit layers of a verified answer)"))
    return path


def in_words(bench: Bench) -> str:
    """What the table says, and what it does not."""
    static, softmax, fixed, verify = (bench.arm(name) for name in ("static 28", "softmax", "softmax, fixed", "verify"))
    (saving,) = (s for s in bench.savings if s.pruned == "softmax, fixed")
    return (
        f"- SmolLM2 was not trained to exit, and its early readouts are poor: leaving from layer {FIRST} on at\n"
        f"  confidence 0.9 gives the full model's token at only {softmax.agreement:.0%} of the positions.\n"
        f"  Do not use it so: train exits.\n"
        f"- verify checks every early token with the full model: {verify.identical:.0%} of its texts are identical.\n"
        f"  It runs at {verify.ratio} of the full model's speed: too many early tokens are wrong to gain by it.\n"
        f"- Pruning makes the tests cheap: reading out and judging takes {saving.seconds} times less time with a\n"
        f"  pruned vocabulary, and the whole generation is {saving.whole} times as fast as with full tests;\n"
        f"  FLOPs {fixed.flops_ratio:.2f} of the full model's instead of {softmax.flops_ratio:.2f}.\n"
        f"- A static exit is the baseline to beat: after layer 28 it runs at {static.ratio} and follows the full\n"
        f"  model at {static.agreement:.0%} of the positions."
    )


if __name__ == "__main__":
    sys.exit(main())

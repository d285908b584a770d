"""The main job, end to end, on a small pretrained model: probe it, generate with exits, compare, draw.

Run with `make demo`. Takes a few minutes on two cores; figures and pictures go to runs/demo.
"""

import sys
import time
from pathlib import Path

from rich.console import Console
from tqdm.auto import tqdm

import offramp
from offramp import ExitPolicy
from offramp.bench import FULL, REFERENCE, run_bench
from offramp.cli.show import Painter
from offramp.files import replace_file, write_json
from offramp.prompts import bundled_prompts
from offramp.report.plots import save_bench

FOLDER = Path("runs/demo")
TOKENS, PROMPTS, ROUNDS = 24, 3, 3
SHOWN = "Why is the sky blue?"


def main() -> None:
    """Probe, generate, compare."""
    began = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    lm = offramp.load("smollm2", dtype="float32")
    depth, first = lm.num_layers, lm.num_layers - 6
    arms = {
        "static, last but two": ExitPolicy("static", min_layer=depth - 2),
        "softmax": ExitPolicy(threshold=0.9, min_layer=first),
        "softmax, fixed": ExitPolicy(threshold=0.9, min_layer=first, vocabulary="fixed"),
        "softmax, adaptive": ExitPolicy(threshold=0.9, min_layer=first, vocabulary="adaptive"),
        "JSD, adaptive": ExitPolicy("jsd", threshold=0.9, min_layer=first, vocabulary="adaptive"),
        "verify": ExitPolicy(threshold=0.9, min_layer=first, vocabulary="fixed", skipped="verify"),
    }

    say("1. Is SmolLM2 suited to early exits? A probe on the bundled prompts")
    with tqdm(desc="probing", leave=False) as bar:
        probe = offramp.probe(lm, min_layer=first, progress=lambda done, total: step(bar, done, total))
    print(probe.table())
    pictures = probe.save(FOLDER)

    say(f"2. {SHOWN!r}, with the layer each token left at")
    texts = {}
    for name, policy in {"full model": None, "softmax": arms["softmax"], "verify": arms["verify"]}.items():
        print(f"{name}:")
        texts[name] = show(lm, policy, first)
        print()
    pictures.append(draw_exits(lm, arms["verify"], first))
    print(f"verify and the full model wrote the same text: {'yes' if texts['verify'] == texts['full model'] else 'NO'}")

    say(f"3. Every policy against transformers' generate: {PROMPTS} prompts, {TOKENS} tokens, {ROUNDS} rounds in turns")
    with tqdm(desc="timing", leave=False) as bar:
        bench = run_bench(
            lm, bundled_prompts()[:: 60 // PROMPTS][:PROMPTS], arms, max_new_tokens=TOKENS, repeats=ROUNDS, chat=True,
            name="smollm2", progress=lambda done, total, what: step(bar, done, total, what),
        )  # fmt: skip
    pictures += save_bench(bench, FOLDER)
    write_json(FOLDER / "bench.json", bench.to_dict())
    print(bench.table())
    say("4. In words")
    print(in_words(bench, arms))
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


def show(lm: offramp.LanguageModel, policy: ExitPolicy | None, first: int, console: Console | None = None) -> str:
    """Stream one answer with its exits; return the text."""
    painter = Painter(console or Console(soft_wrap=True), lm.tokenizer, lm.num_layers, first, show_exits=True)
    if policy is not None:
        painter.legend()
    for step in lm.stream(SHOWN, policy=policy, max_new_tokens=40, chat=True):
        painter.put(int(step.token), int(step.exit_layer))
    painter.end()
    return painter.written


def draw_exits(lm: offramp.LanguageModel, policy: ExitPolicy, first: int) -> Path:
    """The coloured answer as a picture."""
    console = Console(record=True, width=100, force_terminal=True, color_system="truecolor", file=open("/dev/null", "w"))
    show(lm, policy, first, console)
    path = FOLDER / "exits.svg"
    replace_file(path, lambda file: console.save_svg(str(file), title=f"{SHOWN} (exit layers of a verified answer)"))
    return path


def in_words(bench: object, arms: dict[str, ExitPolicy]) -> str:
    """What the table says, and what it does not."""
    softmax, fixed, verify = (bench.arm(name) for name in ("softmax", "softmax, fixed", "verify"))
    return "\n".join(
        [
            f"- SmolLM2's early readouts are untrained and poor: with exits from layer {arms['softmax'].min_layer} on at "
            f"confidence 0.9, only {softmax.agreement:.0%} of the tokens are the full model's. Do not use it so; train exits.",
            f"- verify checks every early token with the full model: {verify.identical:.0%} of its texts are identical. On "
            f"this model it runs at {verify.ratio} of the full model's speed, as too many early tokens are wrong.",
            f"- Pruning the vocabulary after the first test takes the FLOPs of the softmax rule from "
            f"{softmax.flops_ratio:.2f} to {fixed.flops_ratio:.2f} of the full model's, and its speed from {softmax.ratio} "
            f"to {fixed.ratio}.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

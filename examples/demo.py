"""The main job, end to end, on a small pretrained model: probe it, leave early, compare, certify, report.

Run with `make demo`. Takes under six minutes on two cores; figures, pictures and a report go to runs/demo.
"""

import io
import itertools
import sys
import time
from pathlib import Path

from rich.console import Console

import offramp
from offramp import ExitPolicy
from offramp.calibration import Grid, Promise, calibrate
from offramp.cli.progress import progress
from offramp.cli.show import Painter
from offramp.evaluation import evaluate
from offramp.files import replace_file
from offramp.probe import probe
from offramp.prompts import bundled_prompts
from offramp.report.html import report
from offramp.tasks import TASKS, Example

FOLDER = Path("runs/demo")
SHOWN = "Why is the sky blue?"
SUBJECTS = (
    "a bridge", "a candle", "a carpenter", "a castle", "a clock", "a comet", "a desert", "a dictionary", "a ferry",
    "a forest", "a garden", "a glacier", "a harbour", "a kettle", "a library", "a lighthouse", "a map", "a market",
    "a mill", "a mirror", "a museum", "a newspaper", "a novel", "a pencil", "a piano", "a postman", "a radio",
    "a river", "a sailor", "a shadow", "a spider", "a suitcase", "a teacher", "a telescope", "a theatre", "a train",
    "an umbrella", "a village", "a violin", "a volcano",
)  # fmt: skip
FORMS = ("What is {}?", "What is {} good for?", "Tell me one interesting thing about {}.")
QUESTIONS = [form.format(subject) for form, subject in itertools.product(FORMS, SUBJECTS)]
"""Other prompts than the bundled ones, on whose answers the bundled exits were trained."""
CLASSIFIER = ExitPolicy("classifier", threshold=0.6)  # at all trained exits; needs no readout to decide
ARMS = {
    "classifier": CLASSIFIER,
    "softmax": ExitPolicy(threshold=0.9),
    "softmax, fixed": ExitPolicy(threshold=0.9, vocabulary="fixed"),
    "verify": ExitPolicy("classifier", threshold=0.6, skipped="verify"),
}


def main() -> None:
    """Probe, leave early, compare, certify, report."""
    began = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    lm = offramp.load("smollm2", dtype="float32")

    say("1. Is SmolLM2 as it is suited to early exits? A probe on twenty bundled prompts")
    with progress("probing") as update:
        found = probe(lm, bundled_prompts()[::3], progress=update, chat=True)
    print(found.table())
    found.save(FOLDER / "probe")

    say(f"2. {SHOWN!r}, with the bundled exits: the layer each token left at")
    lm = offramp.load("smollm2", dtype="float32", exits="bundled")
    texts = {}
    for name, policy in {"full model": None, "classifier": CLASSIFIER, "verify": ARMS["verify"]}.items():
        print(f"{name}:")
        texts[name] = show(lm, policy)
        print()
    draw_exits(lm, CLASSIFIER)
    print(f"verify and the full model wrote the same text: {'yes' if texts['verify'] == texts['full model'] else 'NO'}")

    questions = [Example(str(number), text, (), text) for number, text in enumerate(QUESTIONS)]
    task = TASKS["prompts"]
    say("3. What policies cost and how far they follow the full model: ten questions the exits were not trained on")
    with progress("evaluating") as update:
        table = evaluate(
            lm, task, questions[::12], ARMS, FOLDER / "evaluate", max_new_tokens=24, static_layers=(18, 24),
            progress=update,
        )  # fmt: skip
    print(table.table())

    say(f"4. A threshold with a promise, from {len(questions)} questions")
    promise = Promise("rougeL", tolerance=0.2, failure=0.1, kind="textual")
    with progress("calibrating") as update:
        certified = calibrate(
            lm, task, questions, CLASSIFIER, promise, FOLDER / "calibrate", max_new_tokens=16, batch_size=8,
            grid=Grid(thresholds=(0.9, 0.75, 0.7)), progress=update,
        )  # fmt: skip
    print(certified.table())

    page = report([FOLDER / name for name in ("probe", "evaluate", "calibrate")], FOLDER / "report.html")
    print(f"\n{time.perf_counter() - began:.0f} s. All in one page: {page}; the policy: {FOLDER}/calibrate/policy.json")


def say(title: str) -> None:
    """A heading."""
    print(f"\n== {title}\n", flush=True)


def show(lm: offramp.LanguageModel, policy: ExitPolicy | None, console: Console | None = None) -> str:
    """Stream one answer with its exits; return the text."""
    first = lm.split.exit_layers[0]
    painter = Painter(console or Console(soft_wrap=True), lm.tokenizer, lm.num_layers, first, show_exits=True)
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
    replace_file(path, lambda file: console.save_svg(str(file), title=f"{SHOWN} (the layer each token left at)"))
    return path


if __name__ == "__main__":
    sys.exit(main())

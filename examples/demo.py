"""The main job, end to end, on a small pretrained model: certify a policy, ask a question four ways, time them.

Run with `make demo`. Takes under five minutes on two cores; a page with everything goes to runs/demo.
"""

import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

import offramp
from offramp import ExitPolicy
from offramp.calibration import Calibration, Grid, Promise, calibrate
from offramp.core.policy import DRAFTS
from offramp.lm.bench import run_bench
from offramp.lm.bench_arms import FULL, REFERENCE
from offramp.lm.bench_results import Bench
from offramp.report.html import report
from offramp.runs.progress import progress
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
"""Other prompts than those on whose answers the bundled exits and their drafter were trained."""
TIMED = QUESTIONS[5::15]
DRAFTED, CERTIFIED = "drafts, checked", "certified"
EVERY = replace(DRAFTS, confidence="max", threshold=0.0)
"""Drafts whatever the confidence, as `DRAFTS` does, in words that a calibration can vary."""
PROMISE = Promise("rougeL", tolerance=0.1, failure=0.1, kind="textual")


def main() -> None:
    """Certify, ask, time, and say in one sentence what came of it."""
    began = time.perf_counter()
    lm = offramp.load("smollm2", dtype="bfloat16", exits="bundled")

    say(f"1. A promise, from {len(QUESTIONS)} questions: how lax may the check of drafts be?")
    task, examples = TASKS["prompts"], [Example(str(i), text, (), text) for i, text in enumerate(QUESTIONS)]
    with progress("calibrating") as update:
        certified = calibrate(
            lm, task, examples, EVERY, PROMISE, FOLDER / "calibrate", max_new_tokens=24,
            grid=Grid(thresholds=(0.0,), accepts=(1.0, 0.5, 0.3), static_layers=()), order="path",
            minimise="seconds-per-token", progress=update,
        )  # fmt: skip
    print(certified.certificate.words())

    arms = {DRAFTED: DRAFTS, CERTIFIED: certified.policy}
    say(f"2. {SHOWN!r}, answered four ways")
    ask(lm, arms)

    say(f"3. {len(TIMED)} other questions, in turns")
    with progress("timing") as update:
        bench = run_bench(
            lm, TIMED, arms, max_new_tokens=48, repeats=3, chat=True, folder=FOLDER / "bench", progress=update
        )  # fmt: skip
    print(bench.table())
    same = sum(text(lm, prompt, DRAFTS) == text(lm, prompt, None) for prompt in TIMED)
    print(f"\n{sentence(bench, certified, same)}")

    page = report([FOLDER / "calibrate"], FOLDER / "report.html")
    print(f"\n{time.perf_counter() - began:.0f} s. The certificate as a page: {page}")


def say(title: str) -> None:
    """A heading."""
    print(f"\n== {title}\n", flush=True)


def ask(lm: offramp.LanguageModel, arms: dict[str, ExitPolicy]) -> None:
    """Print each way's answer and its seconds, the shortest of three in turns."""
    ways = {
        "transformers": lambda: reference(lm),
        "full depth": lambda: text(lm, SHOWN, None),
        **{name: lambda policy=policy: text(lm, SHOWN, policy) for name, policy in arms.items()},
    }
    seconds, texts = {name: [] for name in ways}, {}
    for _ in range(3):
        for name, answer in ways.items():
            began = time.perf_counter()
            texts[name] = answer()
            seconds[name].append(time.perf_counter() - began)
    for name, answer in texts.items():
        print(f"{name} ({min(seconds[name]):.2f} s):\n  {' '.join(answer.split())}\n")
    print("drafts and full depth wrote the same text:", "yes" if texts[DRAFTED] == texts["full depth"] else "NO")


def text(lm: offramp.LanguageModel, prompt: str, policy: ExitPolicy | None) -> str:
    """An answer."""
    return lm.generate(prompt, policy=policy, max_new_tokens=48, chat=True).texts[0]


def reference(lm: offramp.LanguageModel) -> str:
    """The answer by transformers alone."""
    inputs = lm.encode([SHOWN], chat=True)
    ids = lm.model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return lm.decode(ids[:, inputs["input_ids"].shape[1] :].tolist())[0]


def sentence(bench: Bench, certified: Calibration, same: int) -> str:
    """What was gained and what is promised; a gain only where three quarters of the rounds show one."""
    said = []
    for name in (DRAFTED, CERTIFIED):
        arm = bench.arm(name)
        times = bench.seconds_ratio(arm)
        gain = f"{name}: {times.median:.2f} of full depth's seconds (quartiles {times.low:.2f}-{times.high:.2f})"
        said.append(gain if times.high < 1 else f"{name}: no gain shown ({times.median:.2f} of full depth's seconds)")
    full = bench.over(bench.arm(FULL), bench.arm(REFERENCE)).median
    said.append(f"full depth itself: {full:.1f} times as fast as transformers")
    words = certified.certificate.words().split(". ")[0]
    return f"{'; '.join(said)}. Drafts gave full depth's very text {same} of {len(TIMED)} times. {words}."


if __name__ == "__main__":
    sys.exit(main())

"""Write docs/results: every figure in it comes from the commands this script runs.

    .venv/bin/python benchmarks/results.py DATA [translation] [summarisation] [short-prompts] [same-training]
        [questions] [posteriors]

DATA is a folder with multi30k/, dialogsum/, samsum/ and xquad_en/ in their published layouts. Runs are kept in
runs/results; each command goes on where it was interrupted and is not repeated once it is done. All of them take some
twelve hours on two cores.
"""

import argparse
import gzip
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import transformers
from t5_policies import CLAIMS, LEVERS

import offramp
from offramp.tasks import TASKS, read_examples
from offramp.training.trainable import save_model

ROOT = Path(__file__).parents[1]
RUNS, PAGES = ROOT / "runs" / "results", ROOT / "docs" / "results"
OFFRAMP = [sys.executable, "-m", "offramp"]


@dataclass(frozen=True)
class Step:
    """A command of a study: `arguments` with {data} and {run} in them, and what it shows on the page."""

    title: str
    command: str
    name: str
    shows: bool = True
    folder: str = ""  # of its run, if not its name: calibrations that share one share the answers they need


@dataclass(frozen=True)
class Study:
    """A page: what it is about, and its commands in order."""

    title: str
    about: str
    steps: tuple[Step, ...]


SCRIPTS = ("new_t5", "t5_policies", "figures", "claims", "levers", "seeds", "baseline")
"""Commands that are a file in benchmarks/ of that name."""
_TRANSLATION = "--task translation --data {data}/multi30k/val.en.gz --target {data}/multi30k/val.de.gz"
_T5_TRAINING = (
    "--task translation --data {data}/multi30k/train.en.gz --target {data}/multi30k/train.de.gz --trainable all "
    "--objective labels --epochs 4 --batch-size 32 --window 128 --learning-rate 3e-4 --schedule linear --warmup 100 "
    "--weight-decay 0.01 --precision bfloat16 --held-out 0.02 --validate-every 444 --save-every 222"
)
_T5 = "{run}/train/model --exits {run}/classifier/exits " + _TRANSLATION
_LEVERS = " ".join(f"--policy {{run}}/policies/{name}.json" for name in LEVERS)
_CLAIMED = " ".join(f"--policy {{run}}/policies/{name}.json" for name in CLAIMS)
PAIRS = (
    "static 2|full model", "static 3|full model", "frequent-fixed|full model", "frequent-fixed|static 3",
    "fixed|softmax", "decaying|softmax", "adaptive|softmax", "frequent|softmax", "frequent-fixed|softmax",
    "frequent-fixed|fixed", "classifier-0.5|frequent-fixed", "contrastive|softmax", "jsd-all|softmax",
    "only-after-2|frequent-fixed", "only-after-3|frequent-fixed", "after-2-and-4|frequent-fixed",
    "threshold-0.2|frequent-fixed", "threshold-0.9|frequent-fixed", "verify|full model", "verify-after-2|full model",
)  # fmt: skip

_LEFT = "frequent-fixed, prompt to 14"
SHORT_PAIRS = (
    "prompt to 14|full model",
    *(f"softmax > {threshold}, {_LEFT}|prompt to 14" for threshold in (0.9, 0.6, 0.4, 0.2)),
    "static 24, prompt to 14|prompt to 14",
    *(f"softmax > {threshold}, {_LEFT}|static 24, prompt to 14" for threshold in (0.4, 0.2)),
)

SAME_PAIRS = tuple(pair for pair in SHORT_PAIRS if "0.9" not in pair)


def _seed(seed: int) -> tuple[Step, ...]:
    """The study's main arms on a model of another seed, trained in the same way."""
    arms = " ".join(f"--policy {{run}}/policies/{name}.json" for name in ("frequent-fixed", "threshold-0.2", "verify"))
    folder = f"train-{seed}" if seed else "train"
    made = (
        Step(f"Seed {seed}: a new model", f"new_t5 {{run}}/base-{seed} {{data}}/multi30k/train.en.gz "
             f"{{data}}/multi30k/train.de.gz --seed {seed}", f"base-{seed}", shows=False),
        Step(f"Seed {seed}: training", f"train {{run}}/base-{seed} {_T5_TRAINING} --weights layer --layers 2,3,4 "
             f"--seed {seed}", folder, shows=False),
    )  # fmt: skip
    judged = Step(
        f"Seed {seed}: the main arms, in turns", f"evaluate {{run}}/{folder}/model --exits {{run}}/{folder}/exits "
        f"{_TRANSLATION} --limit 300 --static 3 {arms}", f"evaluate-{seed}", shows=False,
    )  # fmt: skip
    return (*(made if seed else ()), judged)


def _other(name: str, what: str, decoder: str, layers: str) -> tuple[Step, ...]:
    """The same training of a model without exits, to compare with; `layers` are some to look at all the same."""
    return (
        Step(f"{what}: a new model", f"new_t5 {{run}}/base-{name} {{data}}/multi30k/train.en.gz "
             f"{{data}}/multi30k/train.de.gz{decoder}", f"base-{name}", shows=False),
        Step(f"{what}: training", f"train {{run}}/base-{name} {_T5_TRAINING} --weights last --layers {layers}",
             f"train-{name}", shows=False),
        Step(f"{what}: judged", f"evaluate {{run}}/train-{name}/model --exits {{run}}/train-{name}/exits "
             f"{_TRANSLATION} --limit 300 --static {layers.split(',')[-1]}", f"evaluate-{name}", shows=False),
    )  # fmt: skip


_SUMMARIES = "--task summarisation --data {data}/dialogsum/dev.jsonl --longest 512"
_LATER = "--task summarisation --data {run}/later.jsonl --longest 512 --batch-size 8"
_SMOLLM2 = "{run}/train/model --exits {run}/classifier/exits --dtype bfloat16"
_SHORT = "{run}/train/model --exits {run}/train/exits --dtype bfloat16 --task summarisation --longest 512"
_SAME_TRAINING = (
    "--dtype float32 --task summarisation --data {data}/dialogsum/train.jsonl.gz --limit 840 --trainable all "
    "--objective labels --epochs 1 --batch-size 16 --window 512 --learning-rate 3e-4 --warmup 5 --schedule cosine "
    "--held-out 0.05 --save-every 5"
)
_JUDGED = "--dtype int8 --task summarisation --longest 512 --data {run}/later.jsonl"
_SHORTENED = " --prompt-layer 14 --confidence softmax --threshold 0.9"
_QUESTIONS = "smollm2 --dtype bfloat16 --task question-answering"
_LAYERS = "{run}/measures.json {run}/pruning.json"
_FIGURES = f"figures {_LAYERS} --out {{run}}/figures"
_CLAIMS = f"claims {_LAYERS} --records {{run}}/layers"

STUDIES = {
    "translation": Study(
        "Translation: a T5 trained from scratch with exits",
        "A T5 of 6 + 6 layers, width 256 (12 million parameters), trained on Multi30k English to German with weighted "
        "cross-entropy over the exits after layers 2 to 4 and the last layer (weights proportional to the layer, as "
        "CALM and FREE), from first values that hold words and their translations alike (`benchmarks/new_t5.py`). "
        "Judged on sentences of the validation set; nothing was chosen on them but what calibration certifies, which "
        "has its own splits.",
        (
            Step("A new model and tokenizer", "new_t5 {run}/base {data}/multi30k/train.en.gz "
                 "{data}/multi30k/train.de.gz", "base", shows=False),
            Step("Training", f"train {{run}}/base {_T5_TRAINING} --weights layer --layers 2,3,4", "train"),
            Step("Consistency classifiers", "train {run}/train/model --exits {run}/train/exits --task translation "
                 "--data {data}/multi30k/train.en.gz --target {data}/multi30k/train.de.gz --limit 4000 "
                 "--objective consistency --epochs 1 --batch-size 32 --window 128 --learning-rate 1e-2", "classifier"),
            Step("Sentences as prompts", "prompts {data}/multi30k/val.en.gz {run}/prompts.txt", "sentences",
                 shows=False),
            Step("Policies", "t5_policies {run}/policies", "policies", shows=False),
            Step("Rank, confidence and saturation by layer (figures 1 to 3)", "probe {run}/train/model "
                 "--exits {run}/classifier/exits --prompts {run}/prompts.txt --max-new-tokens 64 --min-layer 2",
                 "probe"),
            Step("Every policy, in turns", f"evaluate {_T5} --limit 300 --static 2,3,4 {_LEVERS}", "evaluate"),
            Step("Which lever moved what: paired differences between arms",
                 f"levers {{run}}/evaluate {shlex.join(PAIRS)}", "levers"),
            *(step for seed in (0, 1, 2) for step in _seed(seed)),
            Step("Three seeds", "seeds {run}/evaluate-0 {run}/evaluate-1 {run}/evaluate-2", "seeds"),
            *_other("plain", "Without exits", "", "2,3"),
            *_other("short", "Three layers alone", " --decoder 3", "1,2"),
            Step("Beside the same training without exits, and of three layers alone",
                 "baseline {run}/evaluate-0 {run}/evaluate-plain {run}/evaluate-short", "baseline"),
            Step("A certificate: at most 0.05 of chrF, the fewest seconds per generated token",
                 f"calibrate {_T5} --limit 500 --vocabulary frequent-fixed --metric chrf --bound wsr "
                 "--threshold 0.9,0.6,0.4,0.2,0.1,0 --minimise seconds-per-token --tolerance 0.05 --validate 200",
                 "calibrate"),
            Step("Beside transformers, in turns", "bench {run}/train/model --exits {run}/classifier/exits "
                 "--prompts {run}/prompts.txt --limit 10 --max-new-tokens 40 --repeats 4 --arms 'static 3' "
                 "--policy {run}/calibrate/policy.json", "bench"),
            Step("Measures and prunings of the source document", f"evaluate {_T5} --limit 120 --static 2,3,4 "
                 f"{_CLAIMED}", "layers"),
            Step("Figures 4 to 9 and table 1 of the source document", "figures {run}/layers.json "
                 "--out {run}/figures", "figures"),
            Step("What it claims of them: differences between arms", "claims {run}/layers.json "
                 "--records {run}/layers", "claims"),
            Step("The certified policy on the whole validation set", f"evaluate {_T5} --batch-size 16 --static 2,3 "
                 "--policy {run}/calibrate/policy.json", "whole"),
        ),
    ),
    "summarisation": Study(
        "Summarisation: SmolLM2 with exits",
        "SmolLM2-135M-Instruct, LoRA and exits (lenses of rank 128) trained on 1,500 dialogues of DialogSum's training "
        "set, one epoch, for prompts that stop after layer 14: nine tenths of the work of a summary is its prompt, so "
        "a policy that takes the whole prompt through all layers can save little. Judged on DialogSum dev and, never "
        "trained on, SAMSum validation.",
        (
            Step("Training", "train smollm2 --task summarisation --data {data}/dialogsum/train.jsonl.gz --limit 1500 "
                 "--trainable lora --lora-rank 32 --rank 128 --objective labels --weights layer --layers 14,18,22,26 "
                 "--prompt-layer 14 --epochs 1 --batch-size 8 --window 448 --learning-rate 8e-4 --warmup 20 "
                 "--dtype bfloat16 --held-out 0.03 --validate-every 90 --save-every 25", "train"),
            Step("Consistency classifiers", "train {run}/train/model --exits {run}/train/exits --task summarisation "
                 "--data {data}/dialogsum/train.jsonl.gz --limit 300 --objective consistency --epochs 1 --batch-size 4 "
                 "--window 448 --prompt-layer 14 --dtype bfloat16", "classifier"),
            Step("Every policy at one threshold, DialogSum dev", f"evaluate {_SMOLLM2} {_SUMMARIES} --limit 30 "
                 "--arms default --prompt-layer 14", "evaluate"),
            Step("The same on SAMSum", f"evaluate {_SMOLLM2} --task summarisation "
                 "--data {data}/samsum/validation.json --longest 512 --limit 30 --confidence softmax "
                 "--threshold 0.6,0.9 --prompt-layer 14", "samsum"),
            Step("The baseline: the same training with full prompts", "train smollm2 --task summarisation "
                 "--data {data}/dialogsum/train.jsonl.gz --limit 1500 --trainable lora --lora-rank 32 --rank 128 "
                 "--objective labels --weights layer --layers 14,18,22,26 --epochs 1 --batch-size 8 --window 448 "
                 "--learning-rate 8e-4 --warmup 20 --dtype bfloat16 --held-out 0.03 --validate-every 90 "
                 "--save-every 25", "train-full"),
            Step("The baseline on the same dialogues", "evaluate {run}/train-full/model "
                 f"--exits {{run}}/train-full/exits --dtype bfloat16 {_SUMMARIES} --limit 30", "evaluate-full"),
            Step("Policies beside the baseline", "baseline {run}/evaluate {run}/evaluate-full", "baseline"),
            Step("Measures by minimum exit layer", f"evaluate {_SMOLLM2} {_SUMMARIES} --limit 30 --prompt-layer 14 "
                 "--confidence softmax,contrastive,jsd --threshold 0.9 --min-layer 14,18,22", "measures",
                 folder="layers"),
            Step("Pruning by minimum exit layer", f"evaluate {_SMOLLM2} {_SUMMARIES} --limit 30 --prompt-layer 14 "
                 "--confidence softmax,jsd --threshold 0.9 --min-layer 14,18,22 --vocabulary fixed,decaying,adaptive",
                 "pruning", folder="layers"),
            Step("Figures 4 to 9 and table 1 of the source document", _FIGURES, "figures"),
            Step("What it claims of them: differences between arms", _CLAIMS, "claims"),
            Step("A certificate at tolerance 0.05", f"calibrate {_SMOLLM2} {_SUMMARIES} --limit 200 --prompt-layer 14 "
                 "--batch-size 8 --bound wsr --threshold 0.95,0.8 --tolerance 0.05 --validate 200",
                 "calibrate-05", folder="calibrate"),
            Step("A certificate at tolerance 0.10", f"calibrate {_SMOLLM2} {_SUMMARIES} --limit 200 --prompt-layer 14 "
                 "--batch-size 8 --bound wsr --threshold 0.95,0.8 --tolerance 0.10 --validate 200",
                 "calibrate-10", folder="calibrate"),
            Step("Dialogues that nothing was trained or certified on", "rows {data}/dialogsum/dev.jsonl "
                 "{run}/later.jsonl 200 100", "later", shows=False),
            Step("The certified policy there", f"evaluate {_SMOLLM2} {_LATER} --prompt-layer 14 --static 26 "
                 "--policy {run}/calibrate/policy.json --confidence classifier --threshold 0.9", "evaluate-later"),
            Step("The baseline there", "evaluate {run}/train-full/model --exits {run}/train-full/exits "
                 f"--dtype bfloat16 {_LATER} --static 26", "evaluate-later-full"),
            Step("The certified policy beside the baseline", "baseline {run}/evaluate-later "
                 "{run}/evaluate-later-full", "baseline-later"),
        ),
    ),
    "short-prompts": Study(
        "Summarisation: all weights trained for prompts that stop halfway",
        "All weights of SmolLM2-135M-Instruct (bfloat16, float32 masters) trained with exits after layers 18 and 24 on "
        "6,000 dialogues of DialogSum's training set, one epoch, for prompts of which all but the last token stop "
        "after layer 14. Judged on 100 dialogues of dev, those of the last sections of "
        "[summarisation.md](summarisation.md); certified on lines of the training file that were not trained on.",
        (
            Step("Training", "train smollm2 --dtype bfloat16 --task summarisation "
                 "--data {data}/dialogsum/train.jsonl.gz --limit 6000 --trainable all --objective labels "
                 "--weights uniform --layers 18,24 --prompt-layer 14 --epochs 1 --batch-size 16 "
                 "--window 512 --learning-rate 3e-4 --warmup 30 --schedule cosine --held-out 0.02 --save-every 25",
                 "train"),
            Step("Dialogues to judge on", "rows {data}/dialogsum/dev.jsonl {run}/later.jsonl 200 100", "later",
                 shows=False),
            Step("Dialogues to certify on", "rows {data}/dialogsum/train.jsonl.gz {run}/certify.jsonl 6000 300",
                 "certify", shows=False),
            Step("Every policy, in turns", f"evaluate {_SHORT} --data {{run}}/later.jsonl --prompt-layer 14 "
                 "--confidence softmax --vocabulary frequent-fixed --threshold 0.9,0.6,0.4,0.2", "evaluate"),
            Step("What leaving early moved: paired differences between arms",
                 f"levers {{run}}/evaluate {shlex.join(SHORT_PAIRS)}", "levers"),
            Step("Exits that draft for the full model to check", f"evaluate {_SHORT} --data {{run}}/later.jsonl "
                 "--limit 30 --confidence static --min-layer 18,24 --skipped verify --vocabulary frequent "
                 "--static 24", "verify"),
            Step("A certificate in eight bits: at most 0.02 of ROUGE-L, the fewest seconds",
                 f"calibrate {_SHORT.replace('bfloat16', 'int8')} --reference-dtype bfloat16 "
                 "--data {run}/certify.jsonl --prompt-layer 14 --confidence softmax --vocabulary frequent-fixed "
                 "--threshold 0.9,0.6,0.4 --order path --kind signed --metric rougeL --tolerance 0.02 --failure 0.1 "
                 "--minimise seconds --tuning-share 0.15 --test-share 0.2 --static none", "calibrate"),
            Step("Dialogues to ask about", "asked {run}/later.jsonl {run}/asked.jsonl 5", "asked", shows=False),
            Step("Beside transformers and llama.cpp on the same weights, in turns", "bench {run}/train/model "
                 "--exits {run}/train/exits --dtype bfloat16 --with-int8 --prompts {run}/asked.jsonl --limit 5 "
                 "--max-new-tokens 40 --repeats 4 --arms 'static 24' --policy {run}/calibrate/policy.json "
                 "--peers llama.cpp", "bench"),
        ),
    ),
    "same-training": Study(
        "Summarisation: the same training without exits, with whole prompts, and of 24 layers alone",
        "What training for exits and for prompts that stop halfway costs SmolLM2-135M-Instruct, and whether 24 of its "
        "30 layers trained alone do as well: four trainings of all weights on the same 798 dialogues of DialogSum's "
        "training set in the same order, one epoch, float32, that differ in one thing each. All but one are for "
        "prompts of which all but the last token stop after layer 14. Judged in eight bits on 200 dialogues of dev. "
        "A seventh of the data of [short-prompts.md](short-prompts.md).",
        (
            Step("Training with exits", f"train smollm2 {_SAME_TRAINING} --weights uniform --layers 18,24 "
                 "--prompt-layer 14", "train-exits"),
            Step("Training without exits", f"train smollm2 {_SAME_TRAINING} --weights last --layers 24 "
                 "--prompt-layer 14", "train-plain"),
            Step("24 layers", "cut smollm2 {run}/base24 24", "base24", shows=False),
            Step("Training of the first 24 layers alone", f"train {{run}}/base24 {_SAME_TRAINING} --weights last "
                 "--layers 18 --prompt-layer 14", "train-alone"),
            Step("Training without exits, for whole prompts", f"train smollm2 {_SAME_TRAINING} --weights last "
                 "--layers 24", "train-whole"),
            Step("Dialogues to judge on", "rows {data}/dialogsum/dev.jsonl {run}/later.jsonl 200 200", "later",
                 shows=False),
            Step("With exits: every policy, in turns", f"evaluate {{run}}/train-exits/model --exits "
                 f"{{run}}/train-exits/exits {_JUDGED} --prompt-layer 14 --confidence softmax --vocabulary "
                 "frequent-fixed --threshold 0.6,0.4,0.2", "with-exits"),
            Step("What leaving early moved: paired differences between arms",
                 f"levers {{run}}/with-exits {shlex.join(SAME_PAIRS)}", "levers"),
            *(Step(f"{what}: judged", f"evaluate {{run}}/train-{name}/model --exits {{run}}/train-{name}/exits "
                   f"{_JUDGED} --static none{more}", into, shows=False)
              for what, name, into, more in (
                  ("Without exits", "plain", "without-exits", _SHORTENED),
                  ("24 layers alone", "alone", "24-layers-alone", _SHORTENED),
                  ("For whole prompts", "whole", "for-whole-prompts", ""))),
            Step("Beside the same training without exits", "baseline {run}/with-exits {run}/without-exits "
                 "{run}/24-layers-alone {run}/for-whole-prompts --arm 'prompt to 14'", "beside-plain"),
            Step("Beside 24 layers trained alone", "baseline {run}/with-exits {run}/24-layers-alone "
                 "{run}/without-exits {run}/for-whole-prompts --arm 'prompt to 14'", "beside-alone"),
            Step("Beside the same training for whole prompts", "baseline {run}/with-exits {run}/for-whole-prompts "
                 "{run}/without-exits {run}/24-layers-alone", "beside-whole"),
        ),
    ),
    "questions": Study(
        "Question answering: SmolLM2 that teaches its own exits",
        "SmolLM2-135M-Instruct as it is; lenses learn from its last layer on its own answers to the questions on the "
        "first 12 articles of XQuAD-en (part a), texts included. Judged on questions on the other articles.",
        (
            Step("Articles divided", "split {data}/xquad_en/dev_a.json {run}/train.json {run}/test.json", "split",
                 shows=False),
            Step("Training", f"train {_QUESTIONS} --data {{run}}/train.json --own-answers --with-prompts "
                 "--max-new-tokens 24 --positions 64 --layers 12,16,20,24,27 --epochs 1 --batch-size 1 --window 384",
                 "train"),
            Step("Every policy at one threshold", f"evaluate {_QUESTIONS} --exits {{run}}/train/exits "
                 "--data {run}/test.json --limit 60 --arms default --max-new-tokens 24", "evaluate"),
        ),
    ),
}  # fmt: skip


STUDIES["posteriors"] = Study(
    "Laplace and sets as exit rules: SmolLM2",
    "SmolLM2-135M-Instruct with the exits after layers 24 and 27 that come with offramp; Laplace, nested conformal "
    "sets and AVCS fitted to the model's own summaries of 200 dialogues of DialogSum's training set. Compared with the "
    "softmax gap of the same exits on dialogues of dev: does any of them save more at equal agreement with the full "
    "model?",
    (
        Step("Dialogues to fit on", "rows {data}/dialogsum/train.jsonl.gz {run}/fit.jsonl 1500 200", "rows",
             shows=False),
        Step("Fitting", "calibrate smollm2 --exits bundled --dtype bfloat16 --task summarisation "
             "--data {run}/fit.jsonl --own-answers --max-new-tokens 40 --longest 512 --layers 24,27 "
             "--posterior laplace,conformal,avcs",
             "posterior"),
        Step("Exit rules by threshold", "evaluate smollm2 --exits {run}/posterior/exits --dtype bfloat16 "
             f"{_SUMMARIES} --limit 20 --max-new-tokens 40 --static 24,27 "
             "--confidence softmax,laplace,conformal,avcs --threshold 0.3,0.6,0.9", "evaluate"),
    ),
)  # fmt: skip


def rows(source: Path, target: Path, skip: int, count: int) -> None:
    """Write some lines of JSON Lines behind those that other steps use."""
    with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8") as file:
        target.write_text("".join(islice(file, skip, skip + count)), encoding="utf-8")


def split(source: Path, first: Path, rest: Path) -> None:
    """Divide a SQuAD file by articles."""
    articles = json.loads(source.read_text(encoding="utf-8"))["data"]
    for path, part in ((first, articles[: len(articles) // 2]), (rest, articles[len(articles) // 2 :])):
        path.write_text(json.dumps({"version": "1.1", "data": part}, ensure_ascii=False), encoding="utf-8")


def prompts(source: Path, target: Path, count: int = 100) -> None:
    """Write the first sentences as a T5 is asked to translate them, one per line."""
    task = TASKS["translation"]
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = [task.prefix.format(source=line.strip(), languages=task.languages) for line in islice(file, count)]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def asked(source: Path, target: Path, count: int) -> None:
    """Write what a model is asked about the first dialogues, one JSON object per line."""
    task = TASKS["summarisation"]
    texts = [task.prompt(example, instruct=True) for example in read_examples(task, source)[:count]]
    target.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")


def cut(source: Path, target: Path, layers: int) -> None:
    """Write a Llama's first layers as a model of their own, with its final norm and head."""
    lm = offramp.load(str(source))
    lm.model.model.layers = lm.model.model.layers[:layers]
    lm.model.config.num_hidden_layers = layers
    save_model(lm, target)


PREPARATIONS: dict[str, Callable[..., None]] = {
    "split": split, "prompts": prompts, "rows": rows, "asked": asked, "cut": cut,
}  # fmt: skip
"""Commands that are a function of this script, and not shown."""


def run(step: Step, place: dict[str, str]) -> None:
    """One command; its output is kept beside its run folder, where it is found again."""
    folder, output = Path(place["run"]) / (step.folder or step.name), Path(place["run"]) / f"{step.name}.txt"
    if output.exists():
        return
    program, *arguments = shlex.split(step.command.format(**place))
    print(f"running: {step.title}", flush=True)
    if program in PREPARATIONS:
        PREPARATIONS[program](*(int(one) if one.isdecimal() else Path(one) for one in arguments))
        output.write_text("")
        return
    if program in SCRIPTS:
        command = [sys.executable, str(ROOT / "benchmarks" / f"{program}.py"), *arguments]
    else:
        extra = ["--out", str(folder), "--json", str(output.with_suffix(".json"))]
        command = [*OFFRAMP, program, *arguments, *extra]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{step.title} failed; run this script again to go on")
    output.write_text(done.stdout, encoding="utf-8")


def page(name: str, study: Study, place: dict[str, str]) -> None:
    """Write docs/results/NAME.md from the outputs and pictures of its commands."""
    runs, pictures = Path(place["run"]), PAGES / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines = [f"# {study.title}", "", study.about, "", f"{conditions()}"]
    for step in study.steps:
        shown = step.command.format(data="$DATA", run=f"runs/results/{name}")
        program, _, arguments = shown.partition(" ")
        if program in PREPARATIONS:
            continue
        shown = f"python benchmarks/{program}.py {arguments}" if program in SCRIPTS else f"offramp {shown}"
        lines += ["", f"## {step.title}", "", "```", shown, "```"]
        output = runs / f"{step.name}.txt"
        if not output.exists():
            lines += ["", "Not run yet."]
            continue
        if not step.shows:
            continue
        text = output.read_text(encoding="utf-8").strip().replace(str(runs), f"runs/results/{name}")
        text = text.replace(place["data"], "$DATA")
        lines += ["", text if text.startswith("|") or "\n|" in text else f"```\n{text}\n```"]
        last = [other for other in study.steps if other.folder == step.folder][-1]
        shared = bool(step.folder) and step is not last  # then the picture there is of another command
        for picture in () if shared else sorted((runs / (step.folder or step.name)).glob("*.svg")):
            target = pictures / f"{name}-{step.name}-{picture.name}"
            shutil.copyfile(picture, target)
            lines += ["", f"![{step.title}: {picture.stem}](pictures/{target.name})"]
    notes = PAGES / f"{name}-notes.md"
    if notes.exists():
        lines += ["", notes.read_text(encoding="utf-8").strip()]
    (PAGES / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {PAGES / name}.md")


def conditions() -> str:
    """What the figures were measured on."""
    return (
        f"Seed 0 everywhere. {platform.machine()} processor, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, offramp {offramp.__version__}. Brackets are 95 % bootstrap "
        "intervals over examples; ratios are to the full model on the same examples, prompt and encoder included."
    )


def main() -> None:
    """Run what has not run yet, then write the pages."""
    parser = argparse.ArgumentParser(description="Run the studies of docs/results.")
    parser.add_argument("data", type=Path)
    parser.add_argument("studies", nargs="*", default=list(STUDIES), metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--pages-only", action="store_true", help="run nothing, write the pages from what there is")
    parser.add_argument("--only", help="names of steps, with commas; default: all")
    options = parser.parse_args()
    only = options.only and options.only.split(",")
    for name in options.studies:
        place = {"data": str(options.data.resolve()), "run": str(RUNS / name)}
        Path(place["run"]).mkdir(parents=True, exist_ok=True)
        for step in () if options.pages_only else STUDIES[name].steps:
            if only is None or step.name in only:
                run(step, place)
        page(name, STUDIES[name], place)


if __name__ == "__main__":
    main()
